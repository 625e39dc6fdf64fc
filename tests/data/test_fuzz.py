"""A few examples of tools/fuzz_data.py, the same ones every time."""

import importlib

import pytest
from hypothesis import Phase

from tests.data.families import FAMILIES
from tools import fuzz_data

SAME = dict(derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_what_the_template_wrote_and_nothing_of_a_row_is_lost(name):
    """REPORT 7, 8 and 29: for drawn dialogues and rows, with what each family can take."""
    outcomes = fuzz_data.run(name, examples=15, **SAME)
    kept = [f"{kind} rows kept" for kind in fuzz_data.KINDS]
    seen = [outcomes["dialogues labeled"], outcomes["prompts labeled"], sum(outcomes[name] for name in kept)]
    assert min(seen) > 0, "a test of refused rows alone proves nothing"


def test_a_part_that_vanishes_is_found(monkeypatch):
    """REPORT 8: the fuzzer sees what it is for."""
    module = importlib.import_module("coati.data.tokenize")
    monkeypatch.setattr(module, "left_out", lambda *arguments, **options: [])
    with pytest.raises(AssertionError, match="is nowhere"):
        fuzz_data.run("gemma3", examples=60, **SAME)


def test_a_mask_that_is_wrong_is_found(monkeypatch):
    """REPORT 8: by a character, too."""
    from coati.data import templates

    span = templates._span
    monkeypatch.setattr(templates, "_span", lambda *arguments: (span(*arguments)[0] - 3, span(*arguments)[1]))
    with pytest.raises(AssertionError):
        fuzz_data.run("qwen2_5", examples=50, **SAME)
