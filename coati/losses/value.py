"""PPO's value loss, and values that stay within the range of the rewards."""

import math

import torch
from torch import Tensor

from coati.losses.masking import masked


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    *,
    clip: float | None = 0.2,
) -> tuple[Tensor, dict]:
    """Half the squared error to the returns, optionally clipped around the values at rollout.

    The clipping is that of OpenAI's baselines (PPO2): max of the plain error and the error of old + clamp(new - old).

    Args:
        values, old_values, returns: `[batch, seq]`.
        mask: `[batch, seq]` bool, True on response tokens.
        denominator: response tokens of the whole step, over all ranks and micro-batches.
        clip: how far a value may move from the old one before its gradient is cut off; None for no clipping.
    """
    values, old_values, returns = masked(values, mask), masked(old_values, mask), masked(returns, mask)
    squared = (values - returns).square()
    clip_fraction = torch.zeros((), dtype=values.dtype, device=values.device)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        clipped = (near - returns).square()
        moved = (values - old_values).abs() > clip
        clip_fraction = (moved & (clipped > squared)).to(values.dtype).sum() / denominator
        squared = torch.maximum(squared, clipped)
    loss = 0.5 * squared.sum() / denominator
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": clip_fraction}


def bounded_values(outputs: Tensor, low: float, high: float) -> Tensor:
    """low + (high - low) (1/2 + arctan(z) / pi) of a critic's outputs z, of any shape: never out of the range of the
    rewards, and at first, where z is near 0, in its middle (BPCO, Qi et al., 2608.23566, eq. 9)."""
    return low + (high - low) * (0.5 + outputs.atan() / math.pi)
