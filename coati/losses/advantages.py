"""Advantage estimation and whitening."""

import torch
from torch import Tensor

from coati.losses.masking import masked


def gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 1506.02438, eq. 11 and 16) over response tokens.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, where t + 1 is the next response
    token of the row; after the last one V and A are 0.

    Args:
        values, rewards: `[batch, seq]`; values are those before the token was chosen.
        mask: `[batch, seq]` bool, True on response tokens; masked entries are skipped, wherever they stand.
        lam: one for all rows, or one for each, `[batch]`.

    Returns:
        advantages and returns (advantage + value), `[batch, seq]`, 0 where masked.
    """
    values, rewards = masked(values, mask), masked(rewards, mask)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        is_unmasked = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(is_unmasked, advantage, next_advantage)
        next_value = torch.where(is_unmasked, values[:, t], next_value)
        advantages[:, t] = masked(advantage, is_unmasked)
    return advantages, masked(advantages + values, mask)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """GAE's lambda by the length l of a response: 1 - 1 / (alpha l), at least 0 (VAPO, 2504.05118, eq. 5).

    With any one lambda below 1 the last reward hardly reaches the first tokens of a long response: what reaches them is
    lam^(l - 1). With this one that is about exp(-1 / alpha), however long the response is.

    Args:
        mask: `[batch, seq]` bool, True on response tokens.

    Returns:
        float32 `[batch]`.
    """
    return (1 - 1 / (alpha * mask.sum(1))).clamp(min=0)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of this and later rewards of the row, `[batch, seq]`: GAE's returns with lam = 1, no critic."""
    return gae(torch.zeros_like(rewards), rewards, mask, gamma, 1.0)[1]


def masked_sums(x: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of the unmasked entries, float64 `[3]`: add them over ranks, then `moments`."""
    unmasked = masked(x.double(), mask)
    return torch.stack([mask.sum().double(), unmasked.sum(), unmasked.square().sum()])


def moments(sums: Tensor) -> tuple[float, float]:
    """Mean and (population) standard deviation from the globally added `masked_sums`; (0, 0) for no entries."""
    count, total, squares = sums.tolist()
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    return mean, max(squares / count - mean * mean, 0.0) ** 0.5


def whiten(x: Tensor, mask: Tensor, mean: float, std: float, *, shift: bool = True, min_std: float = 1e-3) -> Tensor:
    """(x - mean) / std with the GLOBAL mean and standard deviation; masked entries are 0.

    A standard deviation under `min_std` is replaced by it: nearly equal values are then noise, and dividing by their
    spread would blow that noise up to the size of a signal.
    """
    centered = masked(x, mask) - mean
    return masked(centered / max(std, min_std) + (0.0 if shift else mean), mask)
