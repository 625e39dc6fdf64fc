"""Corrections of rollouts as loops over python floats: r = p / mu of a token, of its response, or their mean."""

import math


def ratios(log_probs, sampling_log_probs, mask, level):
    """The ratio of each token; None where masked."""
    rows = []
    for b, row in enumerate(mask):
        logs = {t: _bounded(log_probs[b][t] - sampling_log_probs[b][t]) for t, counts in enumerate(row) if counts}
        found = [None] * len(row)
        for t in logs:
            match level:
                case "none":
                    found[t] = 1.0
                case "token":
                    found[t] = math.exp(logs[t])
                case "sequence":
                    found[t] = math.exp(_bounded(math.fsum(logs.values())))
                case "geometric":
                    found[t] = math.exp(math.fsum(logs.values()) / len(logs))
        rows.append(found)
    return rows


def _bounded(log_ratio):
    return min(max(log_ratio, -60.0), 60.0)


def importance_weights(log_probs, sampling_log_probs, mask, level, cap=2.0):
    rows = ratios(log_probs, sampling_log_probs, mask, level)
    return [[1.0 if ratio is None else min(ratio, cap) for ratio in row] for row in rows]


def is_accepted(log_probs, sampling_log_probs, mask, level, below=0.5, above=2.0):
    rows = ratios(log_probs, sampling_log_probs, mask, level)
    return [[ratio is not None and below <= ratio <= above for ratio in row] for row in rows]


def is_near_policy(log_probs, sampling_log_probs, advantages, mask, bound):
    """DeepSeek-V3.2, eq. 9: M is 0 where the advantage is negative and the mean of log(pi_old / pi) above the bound."""
    result = []
    for b, row in enumerate(mask):
        moved = [_bounded(sampling_log_probs[b][t] - log_probs[b][t]) for t, counts in enumerate(row) if counts]
        near = not moved or math.fsum(moved) / len(moved) <= bound
        result.append([counts and (near or advantages[b][t] >= 0) for t, counts in enumerate(row)])
    return result


def mismatch_sums(log_probs, sampling_log_probs, mask, weights, accepted):
    tokens = [(b, t) for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    rows = [b for b, row in enumerate(mask) if any(row)]
    log_r = {(b, t): _bounded(log_probs[b][t] - sampling_log_probs[b][t]) for b, t in tokens}
    used = [weights[b][t] if accepted[b][t] else 0.0 for b, t in tokens]
    of_responses = [_bounded(math.fsum(x for (row, _), x in log_r.items() if row == b)) for b in rows]
    return [
        len(tokens),
        len(rows),
        math.fsum(used),
        math.fsum(w * w for w in used),
        sum(not accepted[b][t] for b, t in tokens),
        math.fsum(-x for x in log_r.values()),
        math.fsum(math.expm1(x) - x for x in log_r.values()),
        math.fsum(math.exp(2 * x) for x in log_r.values()),
        math.fsum(math.exp(2 * x) for x in of_responses),
    ]


def mismatch_metrics(sums):
    tokens, responses, weight, squares, rejected, k1, k3, of_tokens, of_responses = sums
    if not tokens:
        return dict.fromkeys(
            ("weight", "effective_sample_size", "rejected", "k1", "k3", "chi_square", "chi_square_sequence"), 0.0
        )
    mean, second = weight / tokens, squares / tokens
    return {
        "weight": mean,
        "effective_sample_size": mean * mean / second if second else 0.0,
        "rejected": rejected / tokens,
        "k1": k1 / tokens,
        "k3": k3 / tokens,
        "chi_square": of_tokens / tokens - 1.0,
        "chi_square_sequence": of_responses / responses - 1.0,
    }
