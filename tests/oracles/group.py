"""Groups of responses as loops over python floats, from the papers' equations."""

import math
import statistics


def group_advantages(rewards, group_size, advantage, baseline=None, min_std=0.1):
    result = []
    for i, reward in enumerate(rewards):
        start = i // group_size * group_size
        group = rewards[start : start + group_size]
        others = [r for k, r in enumerate(group) if k != i - start]
        mean = math.fsum(group) / len(group)
        match advantage:
            case "grpo":  # DeepSeekMath, section 4.1.2, with TRL's and verl's unbiased standard deviation
                result.append((reward - mean) / (statistics.stdev(group) + 1e-4))
            case "dr_grpo" | "reinforce++-baseline":
                result.append(reward - mean)
            case "rloo":
                result.append(reward - math.fsum(others) / len(others))
            case "rloo_std":
                std = statistics.pstdev(others)
                result.append((reward - math.fsum(others) / len(others)) / max(std, min_std))
            case "maxrl":  # Tajwar et al., the estimator of its algorithm 1
                result.append((reward - mean) / mean if mean > 0 else 0.0)
            case "remax":
                result.append(reward - baseline[i])
    return result


def decoupled_advantages(rewards, weights, group_size):
    """GDPO: the sum of each reward's advantage by itself; NaN is no reward."""
    result = [0.0] * len(rewards)
    for kind, weight in enumerate(weights):
        for start in range(0, len(rewards), group_size):
            rows = [i for i in range(start, start + group_size) if not math.isnan(rewards[i][kind])]
            if len(rows) < 2:
                continue
            given = [rewards[i][kind] for i in rows]
            mean, std = math.fsum(given) / len(given), statistics.stdev(given)
            for i in rows:
                result[i] += weight * (rewards[i][kind] - mean) / (std + 1e-4)
    return result


def aggregation_weights(mask, aggregation, tokens, responses, longest):
    """Weights with which sum(weight * x) / tokens is the aggregate of x."""
    rows = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        for t, counts in enumerate(row):
            if counts:
                share = {"token": 1 / tokens, "sequence": 1 / responses / sum(row)}
                share |= {"sum": 1 / responses, "constant": 1 / responses / longest}
                rows[b][t] = tokens * share[aggregation]
    return rows


def punish_overlong(scores, lengths, longest, buffer, penalty=1.0):
    """DAPO, eq. 13, for responses that are cut at `longest`."""
    result = []
    for score, length in zip(scores, lengths, strict=True):
        if buffer == 0 or length <= longest - buffer:
            punishment = 0.0
        elif length <= longest:
            punishment = ((longest - buffer) - length) / buffer
        else:
            punishment = -1.0
        result.append(score + penalty * punishment)
    return result
