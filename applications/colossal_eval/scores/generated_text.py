"""The score of a generated text: whether the answer that it states is accepted."""

from __future__ import annotations

import re

from coati.rewards.answers import Style, extract_letters, extract_number, to_number
from colossal_eval.benchmarks.question import Question
from colossal_eval.scores.metrics import exact_match, multi_choice


def score_text(question: Question, text: str) -> float:
    """The score of a response to a question of any kind, 0 to 1."""
    if question.kind == "math":
        return float(same_number(text, question.answers))
    if question.kind == "cloze":
        return float(same_text(text, question.answers))
    letters = extract_letters(text, question.labels, "anywhere")
    if question.kind == "multi_choice":
        return multi_choice(letters, question.answers, question.labels)
    return exact_match(letters, question.answers)


def same_number(text: str, accepted: list[str], style: Style = "marked") -> bool:
    """Whether the number that `text` gives as its answer, see `extract_number`, is one of the accepted."""
    number = extract_number(text, style)
    return number is not None and number in {to_number(answer) for answer in accepted}


def same_text(text: str, accepted: list[str]) -> bool:
    """Whether the first line of `text`, or what it states as its answer, equals an accepted text up to TeX's notation.

    Notation is compared as AGIEval does it: by the normalization of MATH (Hendrycks et al. 2021).
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    stated = re.findall(r"(?:answers?\s*(?:is|are|[:：=])|答案(?:是|为|[:：])+)\s*([^\n。]*)", text, re.IGNORECASE)
    lines = [*stated[-1:], *text.strip().splitlines()[:1]]
    candidates = {line.strip().strip("$").rstrip(".。").strip("$").strip() for line in lines}
    return any(is_equiv(candidate, answer.strip().strip("$")) for candidate in candidates for answer in accepted)
