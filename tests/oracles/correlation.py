"""Pearson's correlation, as a slow loop in float64."""

import math
from collections.abc import Sequence


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The mean product of standardized values."""
    n = len(xs)
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    deviation_x = math.sqrt(math.fsum((x - mean_x) ** 2 for x in xs) / n)
    deviation_y = math.sqrt(math.fsum((y - mean_y) ** 2 for y in ys) / n)
    products = [(x - mean_x) / deviation_x * ((y - mean_y) / deviation_y) for x, y in zip(xs, ys, strict=True)]
    return math.fsum(products) / n
