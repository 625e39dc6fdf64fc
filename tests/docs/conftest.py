"""What the tests of several kinds of documentation share."""

import pytest

from tests.conftest import write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world) -> dict[str, str]:
    """The tiny world, with prompts that carry an answer for rewards by rule, and a root for documented paths."""
    root = tmp_path_factory.mktemp("documented")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    prompts = write_rows(root / "prompts.jsonl", rows)
    return tiny_world | {"prompts": prompts, "prompts_eval": prompts, "root": str(root)}
