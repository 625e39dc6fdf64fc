"""The preference losses as loops over python floats, written from the papers' equations.

A response is (log-prob under the policy, its length in tokens, log-prob under the reference).
"""

import math

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def _log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def _log_odds(log_p, eps):
    """A probability closer to 1 than rounding can tell counts as 1 - eps."""
    log_p = min(log_p, -eps)
    return log_p - (math.log(-math.expm1(log_p)) if log_p > -0.7 else math.log1p(-math.exp(log_p)))


def _compare(name, chosen, rejected, beta, smoothing, gamma, eps):
    """Rewards of both responses, and the loss of the pair."""
    (good, n, good_reference), (bad, k, bad_reference) = chosen, rejected
    n, k = max(n, 1), max(k, 1)
    if name in ("dpo", "robust-dpo", "hinge"):
        good, bad = beta * (good - good_reference), beta * (bad - bad_reference)
    elif name == "ipo":
        good, bad = beta * (good - good_reference) / n, beta * (bad - bad_reference) / k
    elif name in ("simpo", "orpo"):
        good, bad = beta * good / n, beta * bad / k
    else:
        good, bad = beta * good, beta * bad
    m = good - bad
    right, wrong = -_log_sigmoid(m), -_log_sigmoid(-m)
    if name in ("dpo", "cpo"):
        loss = (1 - smoothing) * right + smoothing * wrong
    elif name == "robust-dpo":
        loss = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    elif name == "hinge":
        loss = max(0.0, 1 - m)
    elif name == "ipo":
        loss = (m / beta - 1 / (2 * beta)) ** 2
    elif name == "simpo":
        loss = -(1 - smoothing) * _log_sigmoid(m - gamma) - smoothing * _log_sigmoid(gamma - m)
    else:
        loss = -beta * _log_sigmoid(_log_odds(good / beta, eps) - _log_odds(bad / beta, eps))
    return good, bad, loss


def preference_loss(
    name, chosen, rejected, denominator, beta, smoothing, gamma, nll=0.0, normalized=False, dtype="float64"
):
    """RPO's likelihood term on top. With `normalized`, log-probs are averages from the start."""
    sums = {}

    def add(metric, value):
        sums.setdefault(metric, []).append(value)

    for good, bad in zip(chosen, rejected, strict=True):
        read = (good, bad)
        if normalized:
            read = tuple((p / max(n, 1), n, q / max(n, 1)) for p, n, q in read)
        reward, other, loss = _compare(name, *read, beta, smoothing, gamma, EPS[dtype])
        likelihood = -good[0] / max(good[1], 1)
        if nll:
            add("nll", likelihood)
            loss += nll * likelihood
        add("loss", loss)
        add("accuracy", 1.0 if reward > other else 0.5 if reward == other else 0.0)
        add("margin", reward - other)
        for side, value, response in (("chosen", reward, good), ("rejected", other, bad)):
            add(f"reward_{side}", value)
            add(f"log_probs_{side}", response[0])
            add(f"length_{side}", response[1])
    metrics = {name: math.fsum(values) / denominator for name, values in sums.items()}
    return metrics["loss"], metrics


def kto_loss(responses, desirable, kl, denominator, beta, desirable_weight, undesirable_weight):
    """KTO eq. 7 with z_0 = max(0, kl)."""
    z, losses = max(kl, 0.0), []
    sums = {f"{name}_{sort}": [0.0] for name in ("reward", "log_probs") for sort in ("desirable", "undesirable")}
    for (log_p, _, reference), good in zip(responses, desirable, strict=True):
        reward = beta * (log_p - reference)
        x = reward - beta * z if good else beta * z - reward
        # 1 - sigmoid(x)
        value = math.exp(-x) / (1 + math.exp(-x)) if x >= 0 else 1 / (1 + math.exp(x))
        losses.append((desirable_weight if good else undesirable_weight) * value)
        sort = "desirable" if good else "undesirable"
        sums[f"reward_{sort}"].append(reward)
        sums[f"log_probs_{sort}"].append(log_p)
    sums |= {"loss": losses, "kl": [z] * len(losses), "desirable": [float(good) for good in desirable]}
    metrics = {name: math.fsum(values) / denominator for name, values in sums.items()}
    return metrics["loss"], metrics
