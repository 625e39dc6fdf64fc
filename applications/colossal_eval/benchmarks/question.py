"""The one record that every benchmark's questions are turned into."""

from __future__ import annotations

from dataclasses import dataclass, field

LETTERS = "ABCDEFGHIJ"
KINDS = ("single_choice", "multi_choice", "cloze", "math", "dialogue", "text")


@dataclass
class Question:
    """One question.

    Attributes:
        id: unique in its benchmark and stable: subject and place in the published file.
        subject: the published file's name of it; `category` groups subjects.
        language: "en" or "zh".
        kind: "single_choice", "multi_choice" (several letters), "cloze" (a short text), "math" (a number at the end of
            the reasoning), "dialogue" (for an LLM judge, not scored here), "text" (`question` is a document that is
            read).
        choices: the texts, without letters; empty where the question's own text lists them.
        labels: the letters, one per choice.
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


def letters(count: int) -> list[str]:
    """The first `count` letters."""
    return list(LETTERS[:count])


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
        if len(question.labels) < 2 or question.labels != letters(len(question.labels)):
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
