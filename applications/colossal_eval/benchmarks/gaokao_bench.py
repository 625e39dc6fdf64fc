"""GAOKAO-Bench (Zhang et al., 2305.12474), the objective questions: `{"example": [{question, answer, ...}, ...]}`.

An entry with several answers holds as many numbered questions on one passage; they are split. Where their number
isn't that of the answers (a cloze text without numbers), the entry is counted and skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.published_rows import Row, find_root, make_row
from colossal_eval.benchmarks.question import Question, letters
from colossal_eval.benchmarks.subjects import GAOKAO

LAYOUTS = (
    "Data/Objective_Questions",
    "Objective_Questions",
    "data/Multiple-choice_Questions",
    "Multiple-choice_Questions",
)
_NUMBER = re.compile(r"(?:^|(?<=[\s。．）)？?]))(\d{1,2})\s*[．.、]\s*(?=\D)")
_OPTION = re.compile(r"(?<![A-Za-z])([A-D])\s*[．.、]")


def gaokao_bench(folder: Path) -> Iterator[Row]:
    """Both the layout of 2023 (`data/Multiple-choice_Questions`) and the present `Data/Objective_Questions`."""
    expected = f"one of {', '.join(LAYOUTS)} in it"
    known = [folder / name for name in LAYOUTS if (folder / name).is_dir()]
    root = known[0] if known else find_root(folder, [f"{next(iter(GAOKAO))}.json"], (), expected)
    paths = [root / f"{name}.json" for name in GAOKAO if (root / f"{name}.json").is_file()]
    if not paths:
        raise UserError(f"{root} has no {next(iter(GAOKAO))}.json or the like; expected GAOKAO-Bench's objective part")
    for path in paths:
        for number, entry in enumerate(_entries(path)):
            location = f"{path}: entry {number + 1}"
            yield make_row("test", path.stem, location, _questions, entry, f"{path.stem}/{number}")


def _entries(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_bytes())["example"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}); expected a JSON object with a list 'example'") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no questions; expected a list 'example' in it")
    return entries


def _questions(entry: dict, id: str) -> list[Question]:
    text, answers = entry["question"].strip(), entry["answer"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("the answer is no list of letters")
    if len(answers) == 1:
        return [_question(id, "", text, answers[0])]
    passage, parts = split_numbered(text, len(answers))
    return [
        _question(f"{id}.{i}", passage, part, answer)
        for i, (part, answer) in enumerate(zip(parts, answers, strict=False))
    ]


def _question(id: str, passage: str, text: str, answer: str) -> Question:
    subject = id.split("/")[0]
    stem, choices = split_options(text)
    return Question(
        id=id,
        subject=subject,
        category=GAOKAO[subject].category,
        language="en" if "English" in subject else "zh",
        kind="single_choice" if len(answer) == 1 else "multi_choice",
        question=stem,
        choices=choices,
        labels=letters(4),
        answers=list(answer),
        passage=passage,
    )


def split_numbered(text: str, count: int) -> tuple[str, list[str]]:
    """The passage and the `count` questions with consecutive numbers after it, each with its own four options.

    Returns:
        `("", [])` if there are not exactly so many.
    """
    marks = list(_NUMBER.finditer(text))
    for first in range(len(marks) - count, -1, -1):
        chosen, wanted = [], int(marks[first][1])
        for mark in marks[first:]:
            if int(mark[1]) == wanted + len(chosen):
                chosen.append(mark)
        if len(chosen) != count:
            continue
        ends = [mark.start() for mark in chosen[1:]] + [len(text)]
        parts = [text[mark.end() : end].strip() for mark, end in zip(chosen, ends, strict=True)]
        if all(split_options(part)[1] for part in parts):
            return text[: chosen[0].start()].strip(), parts
    return "", []


def split_options(text: str) -> tuple[str, list[str]]:
    """The question and its four options; `(text, [])` if "A.", "B.", "C." and "D." don't follow each other in it."""
    marks = list(_OPTION.finditer(text))
    for first in range(len(marks) - 4, -1, -1):
        chosen = marks[first : first + 4]
        if "".join(mark[1] for mark in chosen) == "ABCD":
            ends = [mark.start() for mark in chosen[1:]] + [len(text)]
            options = [text[mark.end() : end].strip() for mark, end in zip(chosen, ends, strict=True)]
            if all(options) and chosen[0].start():
                return text[: chosen[0].start()].strip(), options
    return text, []
