"""The protocol of a reward, and the weighted sum of several."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coati.errors import UserError


class Reward(Protocol):
    """Anything that scores responses.

    It may also have `score_tokens(prompts, responses, **columns) -> float tensor [batch, seq]`, aligned with
    `columns["input_ids"]`; only positions in `columns["response_mask"]` count. Where these columns are given, it is
    asked instead of `score`, and its rewards fall on the tokens.
    """

    name: str

    def score(self, prompts: list[str], responses: list[str], **columns) -> Tensor:
        """One float a response, `[batch]`."""


@dataclass(frozen=True)
class Scores:
    """What rewards gave, float32 on the CPU.

    Attributes:
        sequence: `[batch]`, the weighted sum of the rewards of whole responses.
        per_token: `[batch, seq]`, the weighted sum of the rewards of tokens, 0 outside responses; None without any.
        parts: each reward by itself, unweighted, by name, `[batch]`; those of tokens summed over the response.
        seconds: how long each took, by name.
    """

    sequence: Tensor
    per_token: Tensor | None
    parts: dict[str, Tensor]
    seconds: dict[str, float]

    @property
    def total(self) -> Tensor:
        """`[batch]`, the rewards of sequences and tokens together."""
        return self.sequence if self.per_token is None else self.sequence + self.per_token.sum(1)


class WeightedRewards:
    """The weighted sum of rewards, each checked and timed.

    Args:
        rewards: pairs of a reward and its weight.
    """

    def __init__(self, rewards: list[tuple[Reward, float]]):
        self.rewards = rewards
        names = [reward.name for reward, _ in rewards]
        # two functions are often both called `reward`: the second is `reward_2`
        self.names = [n if names[:i].count(n) == 0 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names)]

    def score(self, prompts: list[str], responses: list[str], **columns) -> Scores:
        """The rewards of a batch.

        Raises:
            UserError: a reward gives the wrong number of scores, or NaN or an infinity; it names the reward and the
                first response concerned.
        """
        sequence, per_token, parts, seconds = torch.zeros(len(responses)), None, {}, {}
        for name, (reward, weight) in zip(self.names, self.rewards, strict=True):
            started = time.monotonic()
            if hasattr(reward, "score_tokens") and "response_mask" in columns:
                mask = columns["response_mask"].cpu()
                on_tokens = _checked(name, reward.score_tokens(prompts, responses, **columns), responses, mask)
                parts[name] = on_tokens.sum(1)
                per_token = weight * on_tokens + (0 if per_token is None else per_token)
            else:
                parts[name] = _checked(name, reward.score(prompts, responses, **columns), responses)
                sequence += weight * parts[name]
            seconds[name] = time.monotonic() - started
        return Scores(sequence, per_token, parts, seconds)


def _checked(name: str, raw, responses: list[str], mask: Tensor | None = None) -> Tensor:
    """A reward's scores as float32: `[batch]`, or with a response mask `[batch, seq]`, 0 outside it."""
    shape, must = (len(responses),), "it must return one number a response"
    if mask is not None:
        shape, must = mask.shape, "it must return one number a token of input_ids"
    try:
        scores = torch.as_tensor(raw, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"reward {name!r} gave {str(raw)[:80]}: {must} ({error})") from error
    if scores.shape != shape:
        raise UserError(
            f"reward {name!r} gave shape {list(scores.shape)} for {len(responses)} responses: {must}, {list(shape)}"
        )
    if mask is not None:
        scores = torch.where(mask, scores, 0.0)
    if not scores.isfinite().all():
        row, *_ = worst = (~scores.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"reward {name!r} gave {scores[tuple(worst)].item()} for the response {responses[row][:80]!r}: "
            "a reward must be finite"
        )
    return scores
