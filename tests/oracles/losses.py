"""The losses as slow loops over python floats, written from the papers' equations.

Per-token arguments are lists of rows `[batch][seq]`; entries whose mask is False are never looked at.
"""

import math


def _tokens(mask):
    """(row, column) of every True entry."""
    return [(b, t) for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]


def _log_softmax(logits):
    top = max(logits)
    log_total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - log_total for x in logits]


def _log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def token_log_probs(logits, input_ids, temperature=1.0):
    """log p(token t | tokens < t) from the logits at t - 1; 0 for the first token."""
    rows = []
    for row_logits, ids in zip(logits, input_ids, strict=True):
        row = [0.0]
        for t in range(1, len(ids)):
            row.append(_log_softmax([x / temperature for x in row_logits[t - 1]])[ids[t]])
        rows.append(row)
    return rows


def token_entropy(logits, temperature=1.0):
    """-sum p log p of the distribution that token t was drawn from; 0 log 0 is 0."""
    rows = []
    for row_logits in logits:
        row = [0.0]
        for t in range(1, len(row_logits)):
            log_p = _log_softmax([x / temperature for x in row_logits[t - 1]])
            row.append(-math.fsum(math.exp(x) * x for x in log_p if x != -math.inf))
        rows.append(row)
    return rows


def response_targets(mask):
    """A token is a target if the loss wants it and a token stands before it."""
    return [[t > 0 and counts for t, counts in enumerate(row)] for row in mask]


def cross_entropy(log_probs, mask, denominator, kind="nll"):
    """-log p of each target; DFT: times p."""
    weights = {"nll": lambda x: 1.0, "dft": math.exp}[kind]
    return math.fsum(-weights(log_probs[b][t]) * log_probs[b][t] for b, t in _tokens(mask)) / denominator


def observation_loss(log_probs, observed, denominator):
    """ECHO, eq. 3: each row is normalized by its own number of observed tokens."""
    rows = [[log_probs[b][t] for t, counts in enumerate(row) if counts] for b, row in enumerate(observed)]
    return -math.fsum(math.fsum(row) / len(row) for row in rows if row) / denominator


def bounded_values(outputs, low, high):
    """BPCO, eq. 9."""
    return [[low + (high - low) * (0.5 + math.atan(z) / math.pi) for z in row] for row in outputs]


def z_loss(log_partition, mask, denominator):
    return math.fsum(log_partition[b][t] ** 2 for b, t in _tokens(mask)) / denominator


def step_reward_loss(logits, labels, mask, denominator):
    """Math-Shepherd's cross-entropy of the steps' probabilities."""
    losses = []
    sums = {"accuracy": 0, "right": 0, "probability": 0.0}
    for b, t in _tokens(mask):
        x, label = logits[b][t], labels[b][t]
        losses += [-label * _log_sigmoid(x), -(1 - label) * _log_sigmoid(-x)]
        probability = math.exp(_log_sigmoid(x))
        sums["right"] += label >= 0.5
        sums["accuracy"] += (x >= 0) == (label >= 0.5)
        sums["probability"] += probability
    loss = math.fsum(losses) / denominator
    return loss, {"loss": loss} | {name: value / denominator for name, value in sums.items()}


def objective_loss(predictions, scores, given, denominator):
    """ArmoRM eq. 1, the squared norm written out, without the scores that a response lacks."""
    loss = math.fsum((predictions[b][k] - scores[b][k]) ** 2 for b, k in _tokens(given)) / denominator
    return loss, {"loss": loss}


def first_wrong(is_right, mask):
    """By row, the first column in the mask that is not right; how many columns there are if all are."""
    found = []
    for row, counts in zip(is_right, mask, strict=True):
        found.append(next((t for t in range(len(row)) if counts[t] and not row[t]), len(row)))
    return found


def pairwise_reward_loss(
    chosen, rejected, denominator, margin=None, label_smoothing=0.0, centering=0.0, tie=None, tie_theta=1.0
):
    """InstructGPT eq. 1 with Llama 2's margin; a share of the labels taken to be wrong; Eisenstein's centring; Rao and
    Kupper's probability of ties, with log(l / (l + theta m)) as -log(1 + theta m / l)."""
    losses, right = [], []

    def log_wins(x):
        return _log_sigmoid(x - math.log(tie_theta))

    for i, (good, bad) in enumerate(zip(chosen, rejected, strict=True)):
        x = good - bad - (0.0 if margin is None else margin[i])
        is_tie = tie is not None and tie[i]
        if is_tie:
            loss = -math.log((tie_theta + 1) * (tie_theta - 1)) - log_wins(good - bad) - log_wins(bad - good)
        else:
            loss = -(1 - label_smoothing) * log_wins(x) - label_smoothing * log_wins(-x)
        losses.append(loss + centering * (good + bad) ** 2)
        right.append(0.5 if is_tie or good == bad else 1.0 if good > bad else 0.0)
    metrics = {
        "loss": math.fsum(losses) / denominator,
        "accuracy": math.fsum(right) / denominator,
        "margin": math.fsum(g - b for g, b in zip(chosen, rejected, strict=True)) / denominator,
        "reward_chosen": math.fsum(chosen) / denominator,
        "reward_rejected": math.fsum(rejected) / denominator,
    }
    return metrics["loss"], metrics


def confidence_gaps(differences, tie_theta=1.0):
    """Ten bins of the confidence in the response with the higher reward."""
    bins = [0.0] * 10
    for difference in differences:
        higher, lower = math.exp(0.0), math.exp(-min(abs(difference), 500.0))
        wins, loses = higher / (higher + tie_theta * lower), lower / (lower + tie_theta * higher)
        confidence = wins / (wins + loses)
        right = 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        number = min(int((confidence - 0.5) * 20), 9)
        bins[number] += confidence - right
    return bins


def policy_loss(
    log_probs,
    old,
    advantages,
    mask,
    denominator,
    kind="clip",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    gates=(1.0, 1.05),
    powers=(2.0, 3.0),
    decays=(3.0, 2.0),
    weights=None,
    centering=None,
):
    """PPO eq. 7; with dual_clip, Ye et al. eq. 5; GSPO eq. 5 and 7; MiniMax-M1 eq. 4; SAPO; DPPO; VESPO; SAO. The
    exponent is bounded by 60, as the docstrings say."""
    objectives, clipped, ratios, kls = [], [], [], []
    for b, t in _tokens(mask):
        columns = [s for s, counts in enumerate(mask[b]) if counts]
        log_ratios = {s: min(max(log_probs[b][s] - old[b][s], -60.0), 60.0) for s in columns}
        of_token, advantage = log_ratios[t], advantages[b][t]
        ratio = math.exp(math.fsum(log_ratios.values()) / len(columns) if kind == "gspo" else of_token)
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        was_clipped = bounded * advantage < ratio * advantage
        if kind in ("clip", "gspo"):
            objective = min(ratio * advantage, bounded * advantage)
            if dual_clip is not None and advantage < 0:
                objective = max(objective, dual_clip * advantage)
        elif kind == "cispo":
            objective, was_clipped = bounded * advantage * log_probs[b][t], bounded != ratio
        elif kind == "sapo":
            tau = gates[0] if advantage > 0 else gates[1]
            objective, was_clipped = 4 / tau * math.exp(_log_sigmoid(tau * (ratio - 1))) * advantage, False
        elif kind == "dppo":
            moved = math.exp(log_probs[b][t]) - math.exp(old[b][t])
            was_clipped = moved > clip_high if advantage > 0 else moved < -clip_low and advantage < 0
            objective = 0.0 if was_clipped else ratio * advantage
        elif kind == "vespo":
            of_response = min(max(math.fsum(log_ratios.values()), -60.0), 60.0)
            k, c = (powers[0], decays[0]) if advantage >= 0 else (powers[1], decays[1])
            log_phi = c + k * of_response - c * math.exp(of_response)
            objective, was_clipped = math.exp(log_phi) * advantage * log_probs[b][t], False
        elif kind == "dis":
            was_clipped = not 1 - clip_low < ratio < 1 + clip_high
            objective = 0.0 if was_clipped else ratio * advantage
        else:
            objective, was_clipped = ratio * advantage, False
        if centering is not None:
            objective -= advantage * centering[b][t]
        objectives.append(objective * (1.0 if weights is None else weights[b][t]))
        clipped.append(float(was_clipped))
        ratios.append(ratio)
        kls.append(math.exp(of_token) - 1 - of_token)
    metrics = {
        "policy_loss": -math.fsum(objectives) / denominator,
        "clip_fraction": math.fsum(clipped) / denominator,
        "ratio": math.fsum(ratios) / denominator,
        "approximate_kl": math.fsum(kls) / denominator,
    }
    return metrics["policy_loss"], metrics


def value_loss(values, old_values, returns, mask, denominator, clip=0.2):
    """PPO2: half of max((V - R)^2, (V_old + clamp(V - V_old) - R)^2). A token counts as clipped if clamping moved
    its value and the clamped error is the larger one."""
    losses, clipped = [], []
    for b, t in _tokens(mask):
        value, old, target = values[b][t], old_values[b][t], returns[b][t]
        error, was_clipped = (value - target) ** 2, 0.0
        if clip is not None and abs(value - old) > clip:
            bounded_error = (old + math.copysign(clip, value - old) - target) ** 2
            if bounded_error > error:
                error, was_clipped = bounded_error, 1.0
        losses.append(0.5 * error)
        clipped.append(was_clipped)
    loss = math.fsum(losses) / denominator
    return loss, {"value_loss": loss, "value_clip_fraction": math.fsum(clipped) / denominator}


def kl_divergence(log_probs, reference, mask, estimator):
    rows = [[0.0] * len(row) for row in mask]
    for b, t in _tokens(mask):
        x = min(max(log_probs[b][t] - reference[b][t], -60.0), 60.0)
        rows[b][t] = {"k1": x, "k2": x * x / 2, "k3": math.expm1(-x) + x}[estimator]
    return rows


def adapt_kl_coefficient(coefficient, kl, target, horizon, samples):
    """Ziegler et al., section 2.2: the proportional error is clipped to +-0.2, and K_beta is samples / horizon."""
    error = (kl - target) / target
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    return coefficient + coefficient * error * samples / horizon


def shape_rewards(scores, kl, mask, coefficient):
    """InstructGPT eq. 2, token by token: the KL penalty everywhere, the score on the response's last token."""
    rows = [[0.0] * len(row) for row in mask]
    for b, t in _tokens(mask):
        rows[b][t] = -coefficient * kl[b][t]
    for b, row in enumerate(mask):
        response = [t for t, counts in enumerate(row) if counts]
        if response:
            rows[b][response[-1]] += scores[b]
    return rows


def penalize_missing_eos(scores, finished, penalty):
    if penalty is None:
        return list(scores)
    return [score if done else score - penalty for score, done in zip(scores, finished, strict=True)]


def clip_scores(scores, limit):
    if limit is None:
        return list(scores)
    return [-limit if score < -limit else limit if score > limit else score for score in scores]
