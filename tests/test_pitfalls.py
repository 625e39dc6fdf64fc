"""Every known bug of the systems we replace has a test that names it: "PITFALL n" in the test's docstring.

python tests/test_pitfalls.py    # writes docs/pitfalls.md
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pitfalls.md"

PITFALLS = {
    1: "the sequence reward is added to every response token",
    2: "critic values sliced for the other padding side",
    3: "logged KL has the wrong sign and averages over padding",
    4: "the seed is reset before every rollout",
    5: "reward placed on, or read at, a PAD token",
    6: "pad token = EOS hides the real EOS",
    7: "a masked NaN poisons the loss",
    8: "advantages explode when the standard deviation is tiny",
    9: "a mean of micro-batch means",
    10: "log(1 + exp(-x)) written out",
    11: "metrics pass through float16",
    12: "adaptive decisions taken per rank",
    13: "the trained actor becomes the reference on resume",
    14: "assistant spans found by text search",
    15: "everything padded to max_length",
    16: "a prompt tokenized alone is no prefix of prompt and answer",
    17: "truncation removes the EOS or all labels",
    18: "double BOS",
    19: "retokenizing a decoded response",
    20: "bad rows crash hours in, or vanish",
    21: "LoRA's alpha and dropout ignored; the value head frozen",
    22: "a slow tokenizer asked for, or none",
    23: "checkpoints without config.json",
    24: "saves only after the epoch",
    25: "resume loses the sampler, the shuffle, random and KL state",
    26: "an interrupted save looks whole",
    27: "the learning-rate schedule never steps",
    28: "evaluation reads the training data",
    29: "a run without a reference crashes on the absent reference",
    30: "untrusted pickles, trust_remote_code",
    31: "a dead worker leaves the others waiting",
    32: "rollout and training log-probs differ unseen",
    33: "nobody can see the samples",
    34: "dependencies that exclude each other; a compile at import",
    35: "CUDA-only code",
    36: "generate can only sample",
    37: "host memory grows",
    38: "an extended vocabulary holds pieces that are never produced",
    39: "the residue of a packing window is dropped",
    40: "a mask that compares ids with the pad id hides the real EOS",
    41: "slow and fast tokenizers disagree after an extension",
    42: "the first capital letter counts as the answer",
    43: "a multi-choice metric that gives ABCD full marks",
    44: "scores without standard errors; questions depend on the ranks; no resume",
    45: "fewer buckets than were asked for",
}


def named_tests(word: str = "PITFALL") -> dict[int, list[str]]:
    """Number -> tests whose docstring names it, as in PITFALL 3 or PITFALLS 3 and 4."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for group in re.findall(rf"{word}S? (\d+(?:(?:, | and )\d+)*)", ast.get_docstring(node) or ""):
                    for number in re.findall(r"\d+", group):
                        found.setdefault(int(number), []).append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def page() -> str:
    from tests.test_reports import REPORTS

    return "\n".join(
        [
            "# Known bugs, and the tests that we don't have them",
            "",
            "Written by `python tests/test_pitfalls.py`. Each was seen or reported in ColossalChat, TRL, OpenRLHF or",
            "verl.",
            "",
            *table("bug", PITFALLS, named_tests()),
            "",
            "## Faults that people's files and models brought to light",
            "",
            "Tried on coati with inputs from public bug trackers and real file formats; each stands for its kind.",
            "",
            *table("fault", REPORTS, named_tests("REPORT")),
            "",
        ]
    )


def table(what: str, names: dict[int, str], tests: dict[int, list[str]]) -> list[str]:
    rows = [f"| {n} | {names.get(n, '')} | {'<br>'.join(f'`{test}`' for test in tests[n])} |" for n in sorted(tests)]
    return [f"| | {what} | tests |", "|---|---|---|", *rows]


def test_every_pitfall_has_a_test_that_names_it():
    missing = sorted(PITFALLS.keys() - named_tests().keys())
    assert not missing, f"no test names pitfall {missing}"


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python tests/test_pitfalls.py"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
