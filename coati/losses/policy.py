"""The policy losses of PPO and its successors."""

from typing import Literal

import torch
from torch import Tensor

from coati.losses.masking import MAX_LOG_RATIO, log_ratio, masked

PolicyLoss = Literal["clip", "gspo", "cispo", "sapo", "dppo", "vespo", "dis", "none"]


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    *,
    kind: PolicyLoss = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    gates: tuple[float, float] = (1.0, 1.05),
    powers: tuple[float, float] = (2.0, 3.0),
    decays: tuple[float, float] = (3.0, 2.0),
    weights: Tensor | None = None,
    centering: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """A surrogate objective of the response tokens, negated. With the ratio r of a token's probability to its old one,
    and clip(r) = r within [1 - clip_low, 1 + clip_high]:

    * clip: min(r A, clip(r) A) (PPO, Schulman et al., 1707.06347, eq. 7; two bounds as in DAPO, 2503.14476)
    * gspo: the same with one r for all tokens of a response, the geometric mean of theirs (Zheng et al., 2507.18071,
      eq. 5 and 7)
    * cispo: clip(r) A log p, where clip(r) is a constant: every token keeps a gradient (MiniMax-M1, 2506.13585, eq. 4)
    * sapo: g(r) A with the soft gate g(r) = 4 / tau * sigmoid(tau (r - 1)), whose slope at r = 1 is 1 and falls to 0 on
      both sides; tau is `gates[0]` for positive advantages, `gates[1]` for others (SAPO, 2511.20347)
    * dppo: r A for tokens in the trust region: not those whose probability p, not r, has moved further than `clip_high`
      up where A > 0, or `clip_low` down where A < 0 (Qi et al., 2602.04879, with binary total variation)
    * vespo: phi(w) A log p, where w is the product of the response's ratios and phi(w) = w^k exp(c (1 - w)), a constant
      that is 1 at w = 1: every token keeps a gradient, that of responses far from the policy fades. Power k and decay
      c are `powers[0]` and `decays[0]` for advantages of at least 0, `powers[1]` and `decays[1]` for others (VESPO,
      2602.10693)
    * dis: r A for tokens with 1 - clip_low < r < 1 + clip_high; others are left out, whichever way they have moved
      (SAO, Hou et al., 2607.07508)
    * none: r A; where the policy is still the one that sampled, its gradient is REINFORCE's

    Args:
        log_probs, old_log_probs, advantages: `[batch, seq]`; the old ones are those of the policy that sampled.
        mask: `[batch, seq]` bool, True on response tokens.
        denominator: response tokens of the whole step, over all ranks and micro-batches.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; of dppo, differences of probability.
        dual_clip: c > 1 bounds the objective at c * advantage for negative advantages (Ye et al., 1912.09729, eq. 5).
        weights: `[batch, seq]`, of the tokens in the loss, see `aggregation_weights`; None for 1 each.
        centering: `[batch, seq]`, A times it is taken off a token's objective: for cispo, `expected_scores` with its
            bounds.

    Metrics: loss, clip_fraction (tokens whose clipped branch is the active one; cispo: whose ratio is clipped; dppo and
    dis: outside of the trust region), ratio (mean), approximate_kl (k3 of old against new).

    Raises:
        ValueError: unknown kind.
    """
    advantages = masked(advantages, mask)
    log_r = log_ratio(log_probs, old_log_probs, mask)
    ratio = of_token = log_r.exp()
    if kind == "gspo":
        per_response = log_r.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = per_response.expand_as(log_r).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    unclipped, clipped = ratio * advantages, bounded * advantages
    match kind:
        case "clip" | "gspo":
            objective, is_clipped = torch.minimum(unclipped, clipped), clipped < unclipped
            if dual_clip is not None:
                objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
        case "cispo":
            objective, is_clipped = clipped.detach() * masked(log_probs, mask), bounded != ratio
        case "sapo":
            tau = chosen(advantages > 0, gates, ratio)
            objective, is_clipped = 4 / tau * (tau * (ratio - 1)).sigmoid() * advantages, torch.zeros_like(mask)
        case "dppo":
            moved = (masked(log_probs, mask).exp() - masked(old_log_probs, mask).exp()).detach()
            is_clipped = ((advantages > 0) & (moved > clip_high)) | ((advantages < 0) & (moved < -clip_low))
            objective = masked(unclipped, ~is_clipped)
        case "vespo":
            log_w = log_r.sum(1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
            power = chosen(advantages >= 0, powers, ratio)
            decay = chosen(advantages >= 0, decays, ratio)
            phi = (power * log_w + decay * (1 - log_w.exp())).exp()
            objective, is_clipped = phi * advantages * masked(log_probs, mask), torch.zeros_like(mask)
        case "dis":
            is_clipped = (ratio <= 1 - clip_low) | (ratio >= 1 + clip_high)
            objective = masked(unclipped, ~is_clipped)
        case "none":
            objective, is_clipped = unclipped, torch.zeros_like(mask)
        case _:
            raise ValueError(f"unknown policy loss {kind!r}: choose clip, gspo, cispo, sapo, dppo, vespo, dis or none")
    objective = objective if centering is None else objective - advantages * masked(centering, mask)
    objective = objective if weights is None else objective * masked(weights, mask)
    loss = -masked(objective, mask).sum() / denominator
    metrics = {
        "policy_loss": loss,
        "clip_fraction": masked(is_clipped.to(ratio.dtype), mask).sum() / denominator,
        "ratio": masked(ratio, mask).sum() / denominator,
        "approximate_kl": masked(of_token - 1 - log_r, mask).sum() / denominator,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def chosen(is_good: Tensor, of_both: tuple[float, float], like: Tensor) -> Tensor:
    """The first number where `is_good`, the second elsewhere, in the dtype of `like`."""
    return torch.where(is_good, like.new_full((), of_both[0]), like.new_full((), of_both[1]))
