"""Intervals of measured shares."""


def wilson_interval(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in n trials (Wilson 1927), which stays within 0 and 1."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(center - half, 0.0), min(center + half, 1.0)  # rounding would leave them
