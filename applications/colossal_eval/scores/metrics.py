r"""Scores of answers, and means with their standard errors. Pure functions; log-probs are in nats.

Means: with scores x_1 ... x_n of the questions, the mean m = sum(x) / n has the standard error
se = sqrt(sum((x - m)^2) / (n (n - 1))). The macro mean over k subjects is the mean of their means, with
se = sqrt(sum(se_s^2)) / k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Score:
    """A mean over `n` questions and its standard error, None where one question leaves it open."""

    value: float
    stderr: float | None
    n: int


def log_sum_exp(values: Sequence[float]) -> float:
    r"""log sum_i exp(v_i), without overflow; -inf if all are."""
    top = max(values)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(value - top) for value in values))


def choice_log_probs(variants: Sequence[Sequence[float]]) -> list[float]:
    r"""l_c = log sum_v p(v | prompt), over the tokens v that spell choice c ("A", " A"): `[choices][variants]` in,
    `[choices]` out. Tokens exclude each other, so their probabilities add."""
    return [log_sum_exp(of_choice) for of_choice in variants]


def argmax(values: Sequence[float]) -> int:
    """The first place of the largest value."""
    return values.index(max(values))


def first_token(log_probs: Sequence[float], right: int) -> float:
    r"""1 if argmax_c l_c is the right choice, else 0. The first of equals counts as chosen."""
    return float(argmax(log_probs) == right)


def exact_match(predicted: Sequence[str], right: Sequence[str]) -> float:
    """1 if the letters that were read out of the text are exactly the right ones, else 0."""
    return float(sorted(predicted) == sorted(right))


def combined(exact: float, first: float) -> float:
    r"""max(exact match, first token): right if either is, as the Colossal-LLaMA-2 card scores AGIEval."""
    return max(exact, first)


def choice_perplexity(log_probs: Sequence[float], tokens: Sequence[int], right: int) -> float:
    r"""1 if the right choice's text has the lowest perplexity, argmin_c exp(-l_c / tokens_c), else 0."""
    return float(argmax([log_prob / count for log_prob, count in zip(log_probs, tokens, strict=True)]) == right)


def multi_choice(predicted: Sequence[str], right: Sequence[str], labels: Sequence[str]) -> float:
    r"""max(0, |given and right| / |right| - |given and wrong| / |wrong|): an extra letter costs its share of the wrong
    ones, so that all letters score 0, and the right ones alone 1."""
    predicted, right = set(predicted) & set(labels), set(right)
    wrong = set(labels) - right
    share = len(predicted & right) / len(right)
    return max(0.0, share - len(predicted & wrong) / len(wrong)) if wrong else share


def random_guess(kind: str, labels: Sequence[str], answers: Sequence[str]) -> float:
    r"""The average score of blind guessing: 1 / choices for one letter; for several, `multi_choice` averaged over all
    non-empty sets of letters; 0 for free text."""
    if kind == "single_choice":
        return 1 / len(labels)
    if kind == "multi_choice":
        sets = [predicted for size in range(1, len(labels) + 1) for predicted in combinations(labels, size)]
        return math.fsum(multi_choice(predicted, answers, labels) for predicted in sets) / len(sets)
    return 0.0


def mean(scores: Sequence[float]) -> Score:
    """The mean of at least one score."""
    n = len(scores)
    value = math.fsum(scores) / n
    variance = math.fsum((score - value) ** 2 for score in scores) / (n - 1) if n > 1 else None
    return Score(value, None if variance is None else math.sqrt(variance / n), n)


def macro_mean(parts: Sequence[Score]) -> Score:
    """The mean of the parts' means, each of the same weight; its standard error is None if one part has none."""
    value = math.fsum(part.value for part in parts) / len(parts)
    errors = [part.stderr for part in parts]
    known = None if None in errors else math.sqrt(math.fsum(e * e for e in errors)) / len(parts)
    return Score(value, known, sum(part.n for part in parts))


def utf8_bytes(text: str) -> int:
    """UTF-8 bytes."""
    return len(text.encode("utf-8", errors="replace"))


def per_byte_perplexity(log_probs: Sequence[float], sizes: Sequence[int]) -> Score:
    r"""exp(r), r = -sum(l_i) / sum(b_i), over documents of b_i UTF-8 bytes: comparable between tokenizers.

    The standard error is the ratio estimator's by linearization (Cochran, Sampling Techniques, 6.4):
    exp(r) sqrt(n / (n - 1) sum((-l_i - r b_i)^2)) / sum(b_i).
    """
    n, total = len(log_probs), sum(sizes)
    rate = -math.fsum(log_probs) / total
    value = math.exp(min(rate, 700.0))
    if n < 2:
        return Score(value, None, n)
    square = math.fsum((-l - rate * b) ** 2 for l, b in zip(log_probs, sizes, strict=True))  # noqa: E741
    return Score(value, value * math.sqrt(n / (n - 1) * square) / total, n)
