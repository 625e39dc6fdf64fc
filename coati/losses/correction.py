"""What is done about responses that another distribution sampled than the one that is trained: a sampler of lower
precision, other kernels, or older weights.

With the probability p of a token in training and mu in sampling, each function has a level, which says what its ratio
r is:

* token: p / mu, of each token by itself
* sequence: the product of the response's, which is the exact ratio of a response
* geometric: the geometric mean of the response's, which doesn't grow with its length

Weights and rejection are two things. A rejected token is left out of the loss but still counts in its denominators,
as in IcePop, in DeepSeek-V3.2 and in TRL (verl leaves it out of them too).
"""

from typing import Literal

import torch
from torch import Tensor

from coati.losses.masking import MAX_LOG_RATIO, log_ratio, masked

Level = Literal["none", "token", "sequence", "geometric"]


def importance_weights(
    log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor, level: Level, cap: float = 2.0
) -> Tensor:
    """min(r, `cap`) of each token, `[batch, seq]`, no gradient (truncated importance sampling: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"; by sequence: Liu et al. 2025, "When speed kills
    stability"); 1 for level none, and where masked.

    Args:
        log_probs, sampling_log_probs: `[batch, seq]`, in training and in sampling.
        mask: `[batch, seq]` bool, True on response tokens.

    Raises:
        ValueError: unknown level.
    """
    ratio = level_log_ratio(log_probs, sampling_log_probs, mask, level).exp().clamp(max=cap)
    return torch.where(mask, ratio, 1.0)


def is_accepted(
    log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor, level: Level, below: float = 0.5, above: float = 2.0
) -> Tensor:
    """Whether `below` <= r <= `above`, bool `[batch, seq]`, False where masked (by token: IcePop, Ring-1T, 2510.18855;
    by sequence and by geometric mean: Liu et al. 2025, "When speed kills stability"); level none accepts every response
    token.

    Args:
        log_probs, sampling_log_probs, mask: as in `importance_weights`.

    Raises:
        ValueError: unknown level.
    """
    ratio = level_log_ratio(log_probs, sampling_log_probs, mask, level).exp()
    return mask & (ratio >= below) & (ratio <= above)


def is_near_policy(
    log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor, mask: Tensor, bound: float
) -> Tensor:
    """Which tokens the off-policy mask leaves, bool `[batch, seq]`: those of responses whose mean of log mu - log p is
    at most `bound`, and all whose advantage isn't negative (DeepSeek-V3.2, 2512.02556, eq. 9). False where masked.

    Args:
        log_probs: `[batch, seq]`, of the policy as it is now, after the updates since sampling.
        sampling_log_probs, advantages: `[batch, seq]`.
        mask: `[batch, seq]` bool, True on response tokens.
    """
    moved = -level_log_ratio(log_probs, sampling_log_probs, mask, "geometric")
    return mask & ((masked(advantages, mask) >= 0) | (moved <= bound))


def level_log_ratio(log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor, level: Level) -> Tensor:
    """log r of each token, `[batch, seq]`, no gradient, within +-60; 0 for level none.

    Raises:
        ValueError: unknown level.
    """
    of_tokens = log_ratio(log_probs, sampling_log_probs, mask).detach()
    match level:
        case "none":
            return torch.zeros_like(of_tokens)
        case "token":
            return of_tokens
        case "sequence":
            of_responses = of_tokens.sum(1, keepdim=True)
        case "geometric":
            of_responses = of_tokens.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        case _:
            raise ValueError(f"unknown level {level!r}: choose none, token, sequence or geometric")
    return of_responses.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(of_tokens)


def mismatch_sums(
    log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor, weights: Tensor, accepted: Tensor
) -> Tensor:
    """What `mismatch_metrics` needs, float64 `[9]`: add them over ranks.

    Args:
        log_probs, sampling_log_probs, mask, weights: as `importance_weights` takes and gives them.
        accepted: bool `[batch, seq]`.
    """
    log_r = log_ratio(log_probs, sampling_log_probs, mask).double()
    of_responses = log_r.sum(1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    used = masked(weights.double(), mask & accepted)
    sums = [
        mask.sum(),
        mask.any(1).sum(),
        used.sum(),
        used.square().sum(),
        (mask & ~accepted).sum(),
        -log_r.sum(),
        (log_r.expm1() - log_r).sum(),
        masked((2 * log_r).exp(), mask).sum(),
        masked((2 * of_responses).exp(), mask.any(1)).sum(),
    ]
    return torch.stack([entry.double() for entry in sums])


def mismatch_metrics(sums: Tensor) -> dict[str, float]:
    """How far sampling is from training, from the globally added `mismatch_sums`; all 0 for no tokens:

    * weight: mean weight of a token, 0 if rejected
    * effective_sample_size: (sum w)^2 / sum w^2 of these weights, as a share of the tokens (Kish)
    * rejected: share of the tokens
    * k1, k3: estimates of KL(mu || p), nats per token (Schulman 2020, "Approximating KL")
    * chi_square, chi_square_sequence: of p to mu, E[r^2] - 1 over tokens and over whole responses; estimated from the
      sampled ones, so that the sequences' is a few responses' where the distributions are far apart
    """
    tokens, responses, weight, squares, rejected, k1, k3, of_tokens, of_responses = sums.tolist()
    if tokens == 0:
        tokens, responses, of_tokens, of_responses = 1.0, 1.0, 1.0, 1.0
    return {
        "weight": weight / tokens,
        "effective_sample_size": weight**2 / squares / tokens if squares > 0 else 0.0,
        "rejected": rejected / tokens,
        "k1": k1 / tokens,
        "k3": k3 / tokens,
        "chi_square": of_tokens / tokens - 1,
        "chi_square_sequence": of_responses / responses - 1,
    }
