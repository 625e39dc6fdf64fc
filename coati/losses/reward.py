"""Reward-model loss."""

import math

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
    tie: Tensor | None = None,
    tie_theta: float = 1.0,
) -> tuple[Tensor, dict]:
    """Bradley-Terry loss: -log sigmoid(chosen - rejected - margin), as in InstructGPT (2203.02155, eq. 1).

    With `tie_theta` above 1, the loss of Rao and Kupper (1967), who give ties a probability: with l = exp(reward),

        P(chosen wins) = l_chosen / (l_chosen + theta l_rejected)
        P(tie) = (theta^2 - 1) l_chosen l_rejected / ((l_chosen + theta l_rejected) (l_rejected + theta l_chosen))

    Args:
        chosen, rejected: rewards `[batch]`.
        denominator: pairs of the whole step, over all ranks and micro-batches.
        margin: `[batch]`, how much better the chosen response is known to be (Llama 2, 2307.09288, eq. 2).
        label_smoothing: the fraction of pairs whose preference is taken to be flipped.
        centering: weight of (chosen + rejected)^2, which keeps rewards near zero (Eisenstein et al., 2312.09244).
        tie: bool `[batch]`, pairs of which neither response is better: no margin, no smoothing. They need `tie_theta`.
        tie_theta: theta; between equal rewards a tie has the probability (theta - 1) / (theta + 1).

    Metrics: loss, accuracy (equal rewards count one half; of ties all do), margin between the two, mean of the chosen
    and rejected rewards.
    """
    chosen, rejected = (r if r.dtype == torch.float64 else r.float() for r in (chosen, rejected))
    difference, threshold = chosen - rejected, math.log(tie_theta)
    scored = difference if margin is None else difference - margin.to(difference.dtype)
    wins, loses = logsigmoid(scored - threshold), logsigmoid(-scored - threshold)
    per_pair = -(1 - label_smoothing) * wins - label_smoothing * loses
    if tie is not None and tie_theta > 1:
        both = logsigmoid(difference - threshold) + logsigmoid(-difference - threshold)
        per_pair = torch.where(tie, -both - math.log(tie_theta**2 - 1), per_pair)
    if centering:
        per_pair = per_pair + centering * (chosen + rejected).square()
    loss = per_pair.sum() / denominator
    right = (difference > 0).to(difference.dtype) + 0.5 * (difference == 0).to(difference.dtype)
    right = right if tie is None else right.masked_fill(tie, 0.5)
    metrics = {
        "loss": loss,
        "accuracy": right.sum() / denominator,
        "margin": difference.sum() / denominator,
        "reward_chosen": chosen.sum() / denominator,
        "reward_rejected": rejected.sum() / denominator,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
