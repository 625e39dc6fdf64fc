"""Reward-model loss."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    denominator: Tensor | float,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> tuple[Tensor, dict]:
    """Bradley-Terry loss: -log sigmoid(chosen - rejected - margin), as in InstructGPT (2203.02155, eq. 1).

    Args:
        chosen, rejected: rewards `[batch]`.
        denominator: pairs of the whole step, over all ranks and micro-batches.
        margin: `[batch]`, how much better the chosen response is known to be (Llama 2, 2307.09288, eq. 2).
        label_smoothing: the fraction of pairs whose preference is taken to be flipped.
        centering: weight of (chosen + rejected)^2, which keeps rewards near zero (Eisenstein et al., 2312.09244).

    Metrics: loss, accuracy (a tie counts one half), margin between the two, mean of the chosen and rejected rewards.
    """
    chosen, rejected = (r if r.dtype == torch.float64 else r.float() for r in (chosen, rejected))
    difference = chosen - rejected
    scored = difference if margin is None else difference - margin.to(difference.dtype)
    per_pair = -(1 - label_smoothing) * logsigmoid(scored) - label_smoothing * logsigmoid(-scored)
    if centering:
        per_pair = per_pair + centering * (chosen + rejected).square()
    loss = per_pair.sum() / denominator
    right = (difference > 0).to(difference.dtype) + 0.5 * (difference == 0).to(difference.dtype)
    metrics = {
        "loss": loss,
        "accuracy": right.sum() / denominator,
        "margin": difference.sum() / denominator,
        "reward_chosen": chosen.sum() / denominator,
        "reward_rejected": rejected.sum() / denominator,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
