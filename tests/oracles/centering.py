"""Score centering as loops over python floats, from 2609.20807, eq. 12 and 14."""

import math


def expected_scores(head_log_probs, sampling_head_log_probs, mask, clip_low, clip_high):
    """`[batch][seq]`, from heads `[batch][seq][head]`."""
    found = []
    for b, row in enumerate(mask):
        found.append([0.0] * len(row))
        for t, counts in enumerate(row):
            if counts:
                log_p, log_q = head_log_probs[b][t], sampling_head_log_probs[b][t]
                constants = coefficients(log_p, log_q, clip_low, clip_high)
                found[b][t] = math.fsum(c * x for c, x in zip(constants, log_p, strict=True))
    return found


def coefficients(log_p, log_q, clip_low, clip_high):
    """q w(p / q) - rho w(1 / rho) p of each token of a head."""

    def weight(ratio):
        return min(max(ratio, 1 - clip_low), 1 + clip_high)

    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    rho = max(1 - math.fsum(q), 1e-6) / max(1 - math.fsum(p), 1e-6)
    alpha = rho * weight(1 / rho)
    return [b * weight(a / b) - alpha * a for a, b in zip(p, q, strict=True)]
