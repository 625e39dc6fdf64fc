"""Comparing the answer that generated text gives with those that are accepted."""

from __future__ import annotations

import re

from coati.rewards.answers import extract_letters, extract_number, to_number

__all__ = ["extract_letters", "extract_number", "same_number", "same_text", "to_number"]


def same_number(text: str, accepted: list[str], stated: bool = True) -> bool:
    """Whether the number that `text` gives as its answer, see `extract_number`, is one of the accepted."""
    number = extract_number(text, stated)
    return number is not None and number in {to_number(answer) for answer in accepted}


def same_text(text: str, accepted: list[str]) -> bool:
    """Whether the first line of `text`, or what it states as its answer, equals an accepted text up to TeX's notation.

    Notation is compared as AGIEval does it: by the normalisation of MATH (Hendrycks et al. 2021).
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    stated = re.findall(r"(?:answers?\s*(?:is|are|[:：=])|答案(?:是|为|[:：])+)\s*([^\n。]*)", text, re.IGNORECASE)
    lines = [*stated[-1:], *text.strip().splitlines()[:1]]
    candidates = {line.strip().strip("$").rstrip(".。").strip("$").strip() for line in lines}
    return any(is_equiv(candidate, answer.strip().strip("$")) for candidate in candidates for answer in accepted)
