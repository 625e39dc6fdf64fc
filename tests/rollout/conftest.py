import pytest


@pytest.fixture(scope="session")
def tokenizer():
    """With Qwen 2.5's chat template."""
    from coati.data import prepare_tokenizer
    from tests.data.families import FAMILIES

    return prepare_tokenizer(FAMILIES["qwen2_5"].tokenizer())[0]
