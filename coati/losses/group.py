"""Groups of responses to one prompt: advantages, and the weights of tokens in the loss."""

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal[
    "grpo", "dr_grpo", "rloo", "rloo_std", "maxrl", "gdpo", "turns", "reinforce++", "reinforce++-baseline", "remax"
]
Aggregation = Literal["token", "sequence", "sum", "constant"]


def group_advantages(
    rewards: Tensor, group_size: int, advantage: Advantage, *, baseline: Tensor | None = None, min_std: float = 0.1
) -> Tensor:
    """One advantage per response, `[batch]`, where r is its reward and G the size of its group:

    * grpo: (r - mean) / (std + 1e-4), with the group's mean and (G - 1) standard deviation (DeepSeekMath, 2402.03300,
      section 4.1.2)
    * dr_grpo: r - mean: without the factor that favors prompts whose rewards differ little (Liu et al., 2503.20783,
      section 3.2)
    * rloo: r - mean of the others (Ahmadian et al., 2402.14740, section 2.2), which is unbiased
    * rloo_std: that, divided by the (population) standard deviation of the others, at least `min_std`: as neither
      depends on the response itself, the mean gradient of a prompt keeps its direction
    * maxrl: (r - mean) / mean, for rewards of at least 0; 0 where the mean is 0. With rewards of 0 and 1 the mean
      gradient is that of the log of the probability p of success, whose series 1/p = sum (1 - p)^k ends after G - 1
      terms (Tajwar et al., 2602.02710)
    * reinforce++-baseline: r - mean, for the caller to whiten over the global batch (Hu et al., 2501.03262)
    * remax: r - `baseline`, the reward of the prompt's greedy response (Li et al., 2310.10505, algorithm 1)

    Args:
        rewards: `[batch]`, the rows of a group one after the other.

    Raises:
        ValueError: unknown, or another function's (turns: `turn_advantages`; reinforce++: `returns_to_go` and gdpo:
            `decoupled_advantages`, both whitened over the global batch).
    """
    if advantage == "remax" and baseline is not None:
        return rewards - baseline
    groups = rewards.reshape(-1, group_size)
    centered = groups - groups.mean(1, keepdim=True)
    others = group_size - 1
    match advantage:
        case "grpo":
            result = centered / (centered.square().sum(1, keepdim=True).div(others).sqrt() + 1e-4)
        case "dr_grpo" | "reinforce++-baseline":
            result = centered
        case "rloo":
            result = centered * (group_size / others)
        case "rloo_std":
            mean = -centered / others  # of the others, which with the response itself add up to 0
            squares = (centered.square().sum(1, keepdim=True) - centered.square()) / others
            result = (centered - mean) / (squares - mean.square()).clamp(min=min_std**2).sqrt()
        case "maxrl":
            mean = groups.mean(1, keepdim=True)
            result = torch.where(mean > 0, centered / mean, 0.0)
        case _:
            raise ValueError(f"{advantage!r} is no advantage per response of a group")
    return result.reshape(-1)


def decoupled_advantages(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """GDPO's advantage of each response, `[batch]`, for the caller to whiten over the global batch (2601.05242): each
    kind of reward is normalized in its group as grpo does with their sum, and the results are added up by weight. So
    responses whose different rewards have the same sum differ, and each reward counts by its weight, not its spread.

    Args:
        rewards: `[batch, kinds]`, the rows of a group one after the other; NaN where a reward skipped the response,
            which leaves the response out of that reward's mean and standard deviation, and adds 0 to it.
        weights: `[kinds]`.
    """
    groups = rewards.reshape(-1, group_size, rewards.shape[1])
    given = ~groups.isnan()
    groups, counts = groups.nan_to_num(0.0), given.sum(1, keepdim=True)
    centered = (groups - groups.sum(1, keepdim=True) / counts.clamp(min=1)) * given
    std = (centered.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
    return (centered / (std + 1e-4)).reshape(rewards.shape) @ weights


def aggregation_weights(
    mask: Tensor, aggregation: Aggregation, tokens: float, responses: float, longest: int
) -> Tensor:
    """What each token weighs, `[batch, seq]`, in a loss that is divided by the global number of `tokens`:

    * token: 1, so that the loss is the mean over tokens (DAPO, 2503.14476, eq. 8)
    * sequence: the mean over responses of the mean over their tokens (GRPO, 2402.03300, eq. 3)
    * sum: the mean over responses of the sum over their tokens (LUSPO, 2602.05261)
    * constant: the sum over tokens, divided by responses x `longest` (Dr. GRPO, 2503.20783, section 3.2)

    Args:
        mask: `[batch, seq]` bool, True on the response tokens that count; the weights of others are 0.
        tokens, responses: of the whole step that count, over all ranks and micro-batches.

    Raises:
        ValueError: unknown aggregation.
    """
    match aggregation:
        case "token":
            return mask.float()
        case "sequence":
            return mask * (tokens / responses / mask.sum(1, keepdim=True).clamp(min=1))
        case "sum":
            return mask * (tokens / responses)
        case "constant":
            return mask * (tokens / responses / longest)
    raise ValueError(f"unknown aggregation {aggregation!r}: choose token, sequence, sum or constant")
