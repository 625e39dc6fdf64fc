"""What every loss needs: masked entries that can't contaminate a sum."""

import torch
from torch import Tensor

# exp(60) is 1e26: far beyond any ratio that training survives, and still finite in float32 and bfloat16.
MAX_LOG_RATIO = 60.0


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in at least float32 with masked entries 0; unlike with `x * mask`, a masked NaN vanishes, in the gradient
    too."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def log_ratio(log_probs: Tensor, other_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log (p / q) of each token, 0 where masked, clamped to +-60 so that its exponential is finite.

    The clamp lets no gradient through beyond 60, where a ratio has no meaning left.
    """
    return (masked(log_probs, mask) - masked(other_log_probs, mask)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
