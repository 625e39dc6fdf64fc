"""Sums that are worked out step by step, and solutions in which one step is wrong.

A prompt is `6+5+4=`, its solution a line for each step: `06+5=11` and `11+4=15`. Tokens are single characters.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from examples.tokenizer import character_tokenizer

SIZES = {"sft": 3000, "prompts": 2000, "labeled": 2400, "labeled_eval": 1300}
TERMS, LARGEST = (4, 5), 6  # numbers of a sum, and the largest of them
MISTAKES = (-10, -2, -1, 1, 2, 10)  # what a wrong step is off by
CHARACTERS = "0123456789+=\n"


def solution(numbers: list[int], wrong: int | None = None, off: int = 0, start_off: int = 0) -> list[str]:
    """The steps; the result of step `wrong` is off by so much, or the number it starts from; later ones go on from it.

    >>> solution([6, 5, 4]), solution([6, 5, 4], 0, off=-1), solution([6, 5, 4], 1, start_off=2)
    (['06+5=11', '11+4=15'], ['06+5=10', '10+4=14'], ['06+5=11', '13+4=17'])
    """
    steps, total = [], numbers[0]
    for i, number in enumerate(numbers[1:]):
        before = total + (start_off if i == wrong else 0)
        total = before + number + (off if i == wrong else 0)
        steps.append(f"{before:02d}+{number}={total:02d}")
    return steps


def mistaken_solutions(numbers: list[int], draw: random.Random, largest: int = LARGEST) -> list[tuple[list[str], int]]:
    """Five solutions and the place of their wrong step: one with a wrong result, one that adds another number, one
    whose step starts from another number than the result before, one whose step is no step of a sum, and one that goes
    on after the last number.

    Args:
        largest: the largest number that a wrong step may add.
    """
    places = [*(draw.randrange(len(numbers) - 1) for _ in range(4)), len(numbers) - 1]
    results = [sum(numbers[: place + 2]) for place in places]
    wrong_result = solution(numbers, places[0], off=draw_mistake(results[0], draw))
    changed = list(numbers)
    changed[places[1] + 1] = draw.choice([n for n in range(1, largest + 1) if n != numbers[places[1] + 1]])
    before = results[2] - numbers[places[2] + 1]
    wrong_start = solution(numbers, places[2], start_off=draw_mistake(before, draw))
    malformed = solution(numbers, places[3], off=draw_mistake(results[3], draw))
    malformed[places[3]] = garble(malformed[places[3]], draw)
    too_long = solution([*numbers, draw.randint(1, largest)])
    return list(zip([wrong_result, solution(changed), wrong_start, malformed, too_long], places, strict=True))


def draw_mistake(value: int, draw: random.Random) -> int:
    """What a number is off by, so that it stays above 0."""
    return draw.choice([off for off in MISTAKES if value + off > 0])


def garble(step: str, draw: random.Random) -> str:
    """A step with a character too many or too few."""
    place = draw.randrange(len(step))
    if draw.random() < 0.5:
        return step[:place] + step[place + 1 :]
    return step[:place] + draw.choice(CHARACTERS.strip()) + step[place:]


def labeled_rows(numbers: list[int], draw: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A right solution and five with a wrong step: six rows of labeled steps, and five pairs. What comes after the
    wrong step has no label, as in PRM800K."""
    prompt, right = "+".join(map(str, numbers)) + "=", solution(numbers)
    rows: list[dict[str, Any]] = [{"prompt": prompt, "steps": right, "labels": [1] * len(right)}]
    pairs = []
    for steps, wrong in mistaken_solutions(numbers, draw):
        rows.append({"prompt": prompt, "steps": steps, "labels": [1] * wrong + [0] + [None] * (len(steps) - wrong - 1)})
        pairs.append({"prompt": prompt, "chosen": "\n".join(right), "rejected": "\n".join(steps)})
    return rows, pairs


def make_data(folder: Path, seed: int) -> dict[str, Path]:
    """Files by name, and the tokenizer's folder. No prompt stands in two files; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, sums = random.Random(seed), {}
    while len(sums) < sum(SIZES.values()):
        numbers = [draw.randint(1, LARGEST) for _ in range(draw.choice(TERMS))]
        sums["+".join(map(str, numbers)) + "="] = numbers
    left = draw.sample(list(sums.items()), len(sums))
    parts = {}
    for name, count in SIZES.items():
        parts[name], left = left[:count], left[count:]
    rows = {"sft": [{"prompt": p, "completion": "\n".join(solution(n))} for p, n in parts["sft"]]}
    rows["prompts_train"] = [{"prompt": prompt} for prompt, _ in parts["sft"]]
    rows["prompts"] = [{"prompt": prompt, "answer": f"{sum(numbers):02d}"} for prompt, numbers in parts["prompts"]]
    for suffix in ("", "_eval"):
        both = [labeled_rows(numbers, draw) for _, numbers in parts["labeled" + suffix]]
        rows["steps" + suffix] = [row for of_sum, _ in both for row in of_sum]
        rows["pairs" + suffix] = [pair for _, of_sum in both for pair in of_sum]
    return write_files(folder, rows, tokenizer())


def write_files(folder: Path, rows: dict[str, list[dict]], tokenizer) -> dict[str, Path]:
    """Rows by the name of their file, and a tokenizer: where they are, by name."""
    files = {"tokenizer": folder / "tokenizer"}
    for name, some in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    tokenizer.save_pretrained(files["tokenizer"])
    return files


def tokenizer():
    """A token a character."""
    return character_tokenizer(CHARACTERS, r"[\s\S]")


def complete(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """0 for a response that adds the numbers of its prompt, one with each line, which goes on from the line before;
    else -1. Whether a line's sum is right is not looked at."""
    return [0.0 if is_complete(prompt, response) else -1.0 for prompt, response in zip(prompts, responses, strict=True)]


def is_complete(prompt: str, response: str) -> bool:
    first, *numbers = prompt.rstrip("=").split("+")
    lines = [re.fullmatch(r"(\d\d)\+(\d)=(\d\d)", line) for line in response.split("\n")]
    if not all(lines) or [line[2] for line in lines] != numbers:
        return False
    return [line[1] for line in lines] == [f"{int(first):02d}", *(line[3] for line in lines[:-1])]


def correct(prompts: list[str], responses: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a response whose last `=` is followed by `answer`, else 0."""
    return [float(response.rpartition("=")[2] == right) for response, right in zip(responses, answer, strict=True)]


def flawless(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """1 for a response that is its prompt's solution, so that every step is right, else 0."""
    right = [solution([int(number) for number in prompt.rstrip("=").split("+")]) for prompt in prompts]
    return [float(response.split("\n") == steps) for response, steps in zip(responses, right, strict=True)]
