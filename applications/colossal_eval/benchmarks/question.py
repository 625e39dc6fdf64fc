"""The one record that every benchmark's questions are turned into, and the folder that holds them.

`FOLDER/BENCHMARK/test/SUBJECT.jsonl` has the scored questions, `dev/SUBJECT.jsonl` those that few-shot examples are
taken from, and `summary.json` the counts. One JSON object a line with the fields of `Question`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coati.errors import UserError

LETTERS = "ABCDEFGHIJ"
KINDS = ("single_choice", "multi_choice", "cloze", "math", "dialogue", "text")
SUMMARY = "summary.json"


@dataclass
class Question:
    """One question.

    Attributes:
        id: unique in its benchmark and stable: subject and place in the published file.
        subject: the published file's name of it; `category` groups subjects.
        language: "en" or "zh".
        kind: "single_choice", "multi_choice" (several letters), "cloze" (a short text), "math" (a number at the end of
            the reasoning), "dialogue" (judged, not scored here), "text" (`question` is a document that is read).
        choices: the texts, without letters; empty where the question's own text lists them.
        labels: the letters, one a choice.
        answers: the right letters, or the accepted texts.
        passage: read before the question.
        solution: reasoning that ends in the answer, for few-shot examples.
        turns: what the user says after `question`, for dialogues.
    """

    id: str
    subject: str
    category: str
    language: str
    kind: str
    question: str
    choices: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    passage: str = ""
    solution: str = ""
    turns: list[str] = field(default_factory=list)


def check(question: Question) -> Question:
    """The question itself.

    Raises:
        ValueError: what is wrong with it, in words.
    """
    if not question.question.strip():
        raise ValueError(f"the {'text' if question.kind == 'text' else 'question'} is empty")
    if question.kind not in KINDS:
        raise ValueError(f"the kind {question.kind!r} is none of {', '.join(KINDS)}")
    if question.kind.endswith("choice"):
        if len(question.labels) < 2 or question.labels != list(LETTERS[: len(question.labels)]):
            raise ValueError(f"the letters of the choices are {question.labels}, not A, B, ...")
        if wrong := [answer for answer in question.answers if answer not in question.labels]:
            raise ValueError(f"the answer {wrong[0]!r} is none of {', '.join(question.labels)}")
        # AGIEval has two questions with an empty wrong choice
        empty = [label for label, text in zip(question.labels, question.choices, strict=False) if not text.strip()]
        if len(empty) > 1 or set(empty) & set(question.answers):
            raise ValueError(f"the choice {empty[0]} is empty")
    if not question.answers and question.kind not in ("dialogue", "text"):
        raise ValueError("there is no answer")
    return question


def to_line(question: Question) -> str:
    """The question as a line of JSON."""
    return json.dumps(dataclasses.asdict(question), ensure_ascii=False) + "\n"


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of one file.

    Raises:
        UserError: the file is absent, or a line is no question; names file and line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with applications/colossal_eval/prepare.py")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield check(Question(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}:{number} is no question ({error}): prepare the benchmark again") from None


def read_summary(folder: Path) -> dict:
    """`summary.json` of one benchmark's folder.

    Raises:
        UserError: it is absent or broken.
    """
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no prepared benchmark ({SUMMARY} is missing): "
            f"run applications/colossal_eval/prepare.py --benchmark {folder.name}"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / SUMMARY} is not JSON ({error}): prepare the benchmark again") from None
