"""Agreement between people, by its definitions."""

from collections import Counter
from itertools import permutations


def cohens_kappa(units: list[tuple[str, str]]) -> float:
    """(observed - expected) / (1 - expected), Cohen (1960)."""
    n = len(units)
    observed = sum(a == b for a, b in units) / n
    first, second = Counter(a for a, _ in units), Counter(b for _, b in units)
    expected = sum(first[value] * second[value] for value in first) / n**2
    return (observed - expected) / (1 - expected)


def krippendorffs_alpha(units: list[list[str]]) -> float:
    """1 - observed / expected disagreement of nominal values, Krippendorff (2011), from all ordered pairs of values."""
    n = sum(len(unit) for unit in units)
    observed = sum(sum(a != b for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / n
    values = [value for unit in units for value in unit]
    expected = sum(a != b for a, b in permutations(values, 2)) / (n * (n - 1))
    return 1 - observed / expected
