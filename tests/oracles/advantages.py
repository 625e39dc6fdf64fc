"""Advantages and statistics as definitions over python floats: sums written out, not recursions."""

import math


def _response(mask_row):
    return [t for t, counts in enumerate(mask_row) if counts]


def gae(values, rewards, mask, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l} (GAE, eq. 16), over the row's response tokens in order."""
    advantages = [[0.0] * len(row) for row in mask]
    returns = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        tokens = _response(row)
        v = [values[b][t] for t in tokens] + [0.0]
        of_row = lam if isinstance(lam, float) else lam[b]
        deltas = [rewards[b][t] + gamma * v[i + 1] - v[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            advantages[b][t] = math.fsum((gamma * of_row) ** k * d for k, d in enumerate(deltas[i:]))
            returns[b][t] = advantages[b][t] + v[i]
    return advantages, returns


def length_adaptive_lambda(mask, alpha):
    """VAPO, eq. 5; a response of at most 1 / alpha tokens has none that is positive."""
    return [1 - 1 / (alpha * len(_response(row))) if alpha * len(_response(row)) > 1 else 0.0 for row in mask]


def returns_to_go(rewards, mask, gamma):
    result = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        tokens = _response(row)
        for i, t in enumerate(tokens):
            result[b][t] = math.fsum(gamma**k * rewards[b][s] for k, s in enumerate(tokens[i:]))
    return result


def masked_sums(x, mask):
    """(count, sum, sum of squares) of the unmasked entries."""
    numbers = unmasked(x, mask)
    return [float(len(numbers)), math.fsum(numbers), math.fsum(n * n for n in numbers)]


def moments(numbers):
    """Population statistics in two passes; (0, 0) for none."""
    if not numbers:
        return 0.0, 0.0
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))


def unmasked(x, mask):
    return [x[b][t] for b, row in enumerate(mask) for t in _response(row)]


def whiten(x, mask, shift=True, min_std=1e-3):
    """(x - mean) / std over the unmasked entries; `shift` False puts the mean back."""
    mean, std = moments(unmasked(x, mask))
    result = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        for t in _response(row):
            result[b][t] = (x[b][t] - mean) / max(std, min_std) + (0.0 if shift else mean)
    return result
