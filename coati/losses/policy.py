"""PPO's policy loss."""

import torch
from torch import Tensor

from coati.losses.masking import keep, log_ratio


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict]:
    """The clipped surrogate of PPO (Schulman et al., 1707.06347, eq. 7), negated, over response tokens.

    Args:
        log_probs, old_log_probs, advantages: `[batch, seq]`; the old ones are those of the policy that sampled.
        mask: `[batch, seq]` bool, True on response tokens.
        denominator: response tokens of the whole step, over all ranks and micro-batches.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1 bounds the objective at c * advantage for negative advantages (Ye et al., 1912.09729, eq. 5).

    Metrics: loss, clip_fraction (tokens whose clipped branch is the active one), ratio (mean), approximate_kl (k3 of
    old against new).
    """
    advantages = keep(advantages, mask)
    log_r = log_ratio(log_probs, old_log_probs, mask)
    ratio = log_r.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    loss = -keep(objective, mask).sum() / denominator
    metrics = {
        "policy_loss": loss,
        "clip_fraction": keep((clipped < unclipped).to(ratio.dtype), mask).sum() / denominator,
        "ratio": keep(ratio, mask).sum() / denominator,
        "approximate_kl": keep(ratio - 1 - log_r, mask).sum() / denominator,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
