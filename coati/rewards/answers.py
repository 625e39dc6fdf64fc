"""Reading the answer out of generated text, for verifiers here and for the benchmarks of colossal_eval.

A letter counts where the text states it ("The answer is B", "答案：B", "故选 AC"), or where it opens the text as a
letter does ("B", "(B)", "B. because"), or where one letter alone stands in brackets. The A of "A good question." is a
word.
"""

from __future__ import annotations

import re
from fractions import Fraction

_STATED = (
    r"(?:(?:answers?|choices?|options?)\s*(?:is|are|was|must be|should be|would be|has to be|[:：=])"
    r"|答案(?:应该|应当|应)?[是为选:：]*|(?:正确|应|故|因此|所以)?(?:选择|选项|选)[是为:：]*|正确的?(?:答案|选项)?是)"
)
_FILLER = r"(?:\s|[:：*_\"'`“”‘’\[(（【]|therefore|thus|option|choice|either|选项|选)*"
_BREAK = r"(?![A-Za-z])"
_ARTICLE = r"A\s+(?!because|since|as\b|and\b|or\b|is\b|which|with)[a-z]"
_NUMBER = re.compile(r"[-−+]?\$?\s*\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")


def extract_letters(text: str, labels: list[str]) -> list[str]:
    """The letters that `text` gives as its answer, in alphabetical order; empty if it gives none, or not clearly.

    The last statement counts. Without one, what opens the text; without that, the letter in brackets, if it is the
    same everywhere.
    """
    letter = f"(?-i:(?!{_ARTICLE})[{labels[0]}-{labels[-1]}])"
    group = rf"({letter}(?:[ ,，、&/]*(?:and\b|和|及|与)? *{letter})*){_BREAK}"
    stated = re.findall(rf"{_STATED}{_FILLER}{group}", text, re.IGNORECASE)
    if stated:
        return _letters(stated[-1], labels)
    opening = re.match(rf"\s*[(（\[【*\"'“]*{group}\s*(?:[)）\]】.．、,，:：;；。*\"'”]|\n|$)", text)
    if opening:
        return _letters(opening[1], labels)
    bracketed = set(re.findall(rf"[(（\[【]\s*{group}\s*[)）\]】]", text))
    return _letters(bracketed.pop(), labels) if len(bracketed) == 1 else []


def _letters(text: str, labels: list[str]) -> list[str]:
    return [label for label in labels if label in text]


def extract_number(text: str, stated: bool = False) -> Fraction | None:
    r"""The number after "####", "The answer is", "答案是" or in \boxed{}, whichever is last.

    Without one of those: the last number of the text, which even noise may hit; None if `stated`.
    """
    marks = list(re.finditer(r"####|\\boxed\{|answers?\s*(?:is|are|[:：=])|答案(?:是|为|[:：])", text, re.IGNORECASE))
    for mark in reversed(marks):
        if found := _NUMBER.search(text, mark.end()):
            return to_number(found[0])
    found = [] if stated else _NUMBER.findall(text)
    return to_number(found[-1]) if found else None


def to_number(text: str) -> Fraction | None:
    """The value of "1,234.50", "$3" or "3/4"; None if the text is no number."""
    plain = text.replace(",", "").replace("$", "").replace("−", "-").replace(" ", "").rstrip(".").removeprefix("+")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None
