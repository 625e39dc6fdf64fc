"""From one score per response to one reward per token."""

import torch
from torch import Tensor

from coati.losses.masking import masked


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """-kl_coefficient * KL on every response token, plus the score on the LAST response token only.

    As in InstructGPT (2203.02155, eq. 2), per token as in Ziegler et al. (1909.08593).

    Args:
        scores: `[batch]`, one per response.
        kl: `[batch, seq]` per-token KL to the reference.
        mask: `[batch, seq]` bool, True on response tokens. A row without response tokens gets no reward.
    """
    rewards = -kl_coefficient * masked(kl, mask)
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards + masked(scores[:, None].to(rewards.dtype).expand_as(rewards), is_last)


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores `[batch]` clamped to [-limit, limit]; unchanged for None."""
    return scores if limit is None else scores.clamp(-limit, limit)


def penalize_missing_eos(scores: Tensor, finished: Tensor, penalty: float | None) -> Tensor:
    """Scores `[batch]`, less `penalty` where the response did not end by itself (`finished` False)."""
    return scores if penalty is None else torch.where(finished, scores, scores - penalty)


def punish_overlong(scores: Tensor, lengths: Tensor, longest: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """Scores `[batch]`, less up to `penalty` for a response that reaches into the last `buffer` tokens before
    `longest`: DAPO's soft overlong punishment (2503.14476, eq. 13). `buffer` 0 leaves them as they are.

    Args:
        lengths: `[batch]`, response tokens, at most `longest`.
    """
    if buffer == 0:
        return scores
    return scores - penalty * (lengths - (longest - buffer)).clamp(min=0).to(scores) / buffer
