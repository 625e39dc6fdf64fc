"""Worked sums, half of them with a mistake, and how they are judged: the steps as they should be, each with a mark, and
a verdict.

A prompt is a sum and a response to it, `6+5+4=`, `06+5=11`, `11+4=16` and an empty line; the judge's response is
`06+5=11 ok`, `11+4=15 no` and `wrong`. A token is a character, a mark or a verdict.
"""

import itertools
import random
from pathlib import Path

from examples.process_reward.data import CHARACTERS, mistaken_solutions, solution, write_files
from examples.tokenizer import character_tokenizer

# Sums: solved ones, judged ones with marks, judged ones of which only the verdict is known. Settings were chosen on
# `validation`; `held_out` is for the figures alone.
SIZES = {"solved": 2000, "marked": 800, "verdicts": 2200, "validation": 500, "held_out": 1000}
TERMS, LARGEST = 4, 9  # numbers of a sum, and the largest of them
KINDS = ("result", "number", "start", "form", "too long")  # of mistakes, as `mistaken_solutions` makes them
WORDS = (" ok\n", " no\n", "right", "wrong")
VERDICT = r"^(?:[^\n]+ (?:ok|no)\n)+(right|wrong)\Z"  # the whole of a response: marked steps, then one verdict


def judgment(steps: list[str], right: list[str]) -> str:
    """A judge's response: the steps as they should be, each with a mark, up to the first that isn't so; the verdict.

    >>> print(judgment(["06+5=11", "11+4=16"], solution([6, 5, 4])))
    06+5=11 ok
    11+4=15 no
    wrong
    """
    lines = []
    for i, step in enumerate(steps):
        expected = right[i] if i < len(right) else step  # what comes after the last number is copied
        if i >= len(right) or step != expected:
            return "\n".join([*lines, f"{expected} no", "wrong"])
        lines.append(f"{expected} ok")
    return "\n".join([*lines, "right"])


def judged_rows(numbers: list[int], draw: random.Random) -> list[dict[str, str]]:
    """Two rows: the sum's solution, and one with a mistake of a kind that is drawn."""
    right = solution(numbers)
    kind = draw.randrange(len(KINDS))
    mistaken, _ = mistaken_solutions(numbers, draw, LARGEST)[kind]
    rows = []
    for steps, name in ((right, "none"), (mistaken, KINDS[kind])):
        completion = judgment(steps, right)
        row = {"prompt": "\n".join([question(numbers), *steps, "", ""]), "completion": completion}
        rows.append(row | {"answer": completion.rpartition("\n")[2], "mistake": name})
    return rows


def question(numbers: list[int]) -> str:
    return "+".join(map(str, numbers)) + "="


def solved_row(numbers: list[int]) -> dict[str, str]:
    """A sum and its solution, which nobody has judged."""
    return {"prompt": question(numbers) + "\n", "completion": "\n".join(solution(numbers))}


def outcome_row(row: dict[str, str]) -> dict:
    """What a model of steps learns from a verdict: the last step's label is the verdict, the others have none."""
    first, *steps = row["prompt"].strip("\n").split("\n")
    return {"prompt": first + "\n", "steps": steps, "labels": [None] * (len(steps) - 1) + [row["answer"] == "right"]}


def make_data(folder: Path, seed: int, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """Files by name, and the tokenizer's folder. No sum stands in two files; the same seed gives the same bytes.

    Args:
        sizes: how many sums each file has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    sums = list(itertools.product(range(1, LARGEST + 1), repeat=TERMS))
    left = draw.sample(sums, len(sums))
    rows = {}
    for name, count in sizes.items():
        some, left = [list(numbers) for numbers in left[:count]], left[count:]
        judged = [row for numbers in some for row in judged_rows(numbers, draw)]
        rows[name] = [solved_row(numbers) for numbers in some] if name == "solved" else judged
    for row in rows["verdicts"]:
        del row["completion"]
    for name in ("verdicts", "held_out"):
        rows[f"{name}_outcome"] = [outcome_row(row) for row in rows[name]]
    return write_files(folder, rows, tokenizer())


def tokenizer():
    """A token a character, a mark with its line break, or a verdict."""
    return character_tokenizer([*CHARACTERS, *WORDS], "|".join(WORDS) + r"|[\s\S]")
