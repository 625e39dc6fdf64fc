"""Losses of reward models: of pairs, of the steps of a response, and of scores."""

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from coati.losses.masking import masked


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


CONFIDENCE_GAPS = [f"confidence_gap_{bin}" for bin in range(10)]


def confidence_gaps(differences: Tensor, tie_theta: float = 1.0) -> dict[str, Tensor]:
    """What the expected calibration error is made of (Guo et al., 1706.04599, eq. 3): by bins of the confidence in the
    response with the higher reward, the sum of this confidence less the number of pairs where that response was chosen.
    The error is the sum of the bins' absolute values, divided by the number of pairs.

    Args:
        differences: `[pairs]`, the reward of the chosen response less that of the rejected one; no ties.
        tie_theta: as `pairwise_reward_loss`; the confidence is that of a pair which is no tie.

    Returns:
        A number for each of ten bins of equal width from 0.5 to 1.
    """
    distance, threshold = differences.abs(), math.log(tie_theta)
    wins, loses = (distance - threshold).sigmoid(), (-distance - threshold).sigmoid()
    confidence = wins / (wins + loses)
    right = (differences > 0).to(confidence.dtype) + 0.5 * (differences == 0).to(confidence.dtype)
    count = len(CONFIDENCE_GAPS)
    bins = ((confidence - 0.5) * 2 * count).long().clamp(max=count - 1)
    gaps = torch.zeros(count, dtype=confidence.dtype, device=confidence.device).index_add(0, bins, confidence - right)
    return dict(zip(CONFIDENCE_GAPS, gaps.detach(), strict=True))


def step_reward_loss(
    logits: Tensor, labels: Tensor, mask: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of p = sigmoid(logit), how likely steps are right (Math-Shepherd, 2312.08935, section 3.2):

        loss = - sum over steps of label log p + (1 - label) log(1 - p)

    A label is 0 or 1, or an estimate between them, such as the share of continuations that arrive at the right answer
    (its section 3.3, soft estimation).

    Args:
        logits, labels: `[batch, seq]`, of each token what it says of the step that ends with it.
        mask: bool `[batch, seq]`, True on the last token of each labeled step.
        denominator: labeled steps of the whole update, over all ranks and micro-batches.

    Metrics: loss; accuracy, where a probability and a label of 0.5 or more say that the step is right; right, the share
    of steps whose labels say so; probability, its mean.
    """
    logits, labels = masked(logits, mask), masked(labels, mask)
    labels = labels.to(logits.dtype)
    per_step = masked(binary_cross_entropy_with_logits(logits, labels, reduction="none"), mask)
    loss = per_step.sum() / denominator
    said, true = logits >= 0, labels >= 0.5
    metrics = {
        "loss": loss,
        "accuracy": masked(said == true, mask).sum() / denominator,
        "right": masked(true, mask).sum() / denominator,
        "probability": masked(logits.sigmoid(), mask).sum() / denominator,
    }
    return loss, {name: value.detach().to(loss.dtype) for name, value in metrics.items()}


def first_wrong(is_right: Tensor, mask: Tensor) -> Tensor:
    """The column of each row's first step that is wrong, int64 `[batch]`; the number of columns where none is.

    Args:
        is_right: bool `[batch, seq]`; mask: bool `[batch, seq]`, True on the last token of each step.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask & ~is_right, columns, mask.shape[1]).amin(1)


def objective_loss(
    predictions: Tensor, scores: Tensor, given: Tensor, denominator: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the scores of several objectives, those that are given (ArmoRM, 2406.12845, eq. 1; HelpSteer2,
    2406.08673):

        loss = sum over given scores of (prediction - score)^2

    Args:
        predictions, scores: `[batch, objectives]`.
        given: bool `[batch, objectives]`, False where a response has no score of an objective.
        denominator: given scores of the whole step, over all ranks and micro-batches.

    Metrics: loss.
    """
    loss = (masked(predictions, given) - masked(scores, given)).square().sum() / denominator
    return loss, {"loss": loss.detach()}
