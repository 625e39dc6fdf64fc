r"""Whether two models differ on the same questions. Paired: what both get right or wrong doesn't count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colossal_eval.scores.metrics import mean


@dataclass(frozen=True)
class Difference:
    """Second minus first: the mean difference, its standard error over questions, and the two-sided p-value."""

    value: float
    stderr: float | None
    p_value: float


def compare(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The paired difference of two models' scores of the same questions, `[questions]` each.

    Right-or-wrong scores: McNemar's exact test. Others: the sign-flip permutation test (10,000 draws of a fixed seed).
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    score = mean(differences)
    binary = set(first) | set(second) <= {0.0, 1.0}
    return Difference(score.value, score.stderr, (mcnemar if binary else sign_flip)(differences))


def mcnemar(differences: Sequence[float]) -> float:
    r"""The two-sided p-value of b wins in b + c questions where one model alone is right, under Binomial(b + c, 1/2)
    (McNemar 1947, the exact form)."""
    from scipy.stats import binomtest

    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip(differences: Sequence[float], draws: int = 10_000) -> float:
    r"""The share of signs s for which |sum s_i d_i| >= |sum d_i|: of all where 2^n <= draws, else of random ones, the
    observed ones included (Phipson and Smyth 2010)."""
    import numpy as np
    from scipy.stats import permutation_test

    d = np.asarray([x for x in differences if x], dtype=float)
    if len(d) < 2:
        return 1.0
    result = permutation_test(
        (d, np.zeros_like(d)),
        lambda a, b, axis: np.round((a - b).sum(axis=axis), 9),  # sums that are equal but for rounding are equal
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, 2**22 // len(d)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
