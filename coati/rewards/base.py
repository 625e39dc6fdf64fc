"""The protocol of a reward, and the weighted sum of several."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coati.errors import UserError
from coati.rewards.pool import Outcome, Pool, score_one
from coati.rewards.verifiable import Verifier

logger = logging.getLogger(__name__)


class Reward(Protocol):
    """Anything that scores responses.

    It may also have `score_tokens(prompts, responses, **columns) -> float tensor [batch, seq]`, aligned with
    `columns["input_ids"]`; only positions in `columns["response_mask"]` count. Where these columns are given, it is
    asked instead of `score`, and its rewards fall on the tokens.

    With the attribute `per_response = True` it looks at each answer alone: it is asked for one at a time, without the
    columns that are tensors, and an answer that it fails for is counted and gets a set score.
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
        parts: each reward by itself, unweighted, by name, `[batch]`; those of tokens summed over the response. Of a
            reward `per_response` also `NAME/failed`, 1 where it failed.
        seconds: how long each took, by name; of one that worked while answers were generated, how long it was waited
            for.
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
        workers: processes that score answers one at a time, for the rewards `per_response` that are named in the
            settings; 0 to do so in this thread.
        timeout: seconds that they may take for an answer.
        failure_score: the score where they fail.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[Reward, float]],
        *,
        workers: int = 0,
        timeout: float = 60.0,
        failure_score: float = 0.0,
    ):
        self.rewards, self.failure_score = rewards, failure_score
        names = [reward.name for reward, _ in rewards]
        # two functions are often both called `reward`: the second is `reward_2`
        self.names = [n if names[:i].count(n) == 0 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names)]
        named = zip(self.names, (reward for reward, _ in rewards), strict=True)
        self.alone = {name: reward for name, reward in named if getattr(reward, "per_response", False)}
        # what another process can make again: a verifier, or a function by its place
        sent = {n: getattr(r, "place", isinstance(r, Verifier) and r) for n, r in self.alone.items()}
        sent = {name: reward for name, reward in sent.items() if reward}
        self.pool = Pool(sent, workers, timeout) if sent and workers else None
        self.pooled = set(sent) if self.pool else set()
        self.have_worked: set[str] = set()  # those of self.alone that have scored an answer

    def start(self) -> "PendingScores":
        """For a batch whose answers come one by one."""
        return PendingScores(self)

    def score(self, prompts: list[str], responses: list[str], **columns) -> Scores:
        """The rewards of a batch.

        Raises:
            UserError: a reward gives the wrong number of scores, or NaN or an infinity; it names the reward and the
                first response concerned. Or a reward `per_response` has failed for every answer so far.
        """
        return self.start().finish(prompts, responses, **columns)

    def collect(self, name: str, outcomes: list[Outcome]) -> tuple[Tensor, Tensor]:
        """Scores of one reward's answers, and 1 where it failed, float32 `[batch]` both."""
        failed = [outcome for outcome in outcomes if outcome.score is None]
        if len(failed) < len(outcomes):
            self.have_worked.add(name)
        elif failed and name not in self.have_worked:
            raise UserError(f"reward {name!r} failed for all {len(failed)} answers, the last with {failed[-1].error}")
        if failed:
            what = f"failed for {len(failed)} of {len(outcomes)} answers, which get {self.failure_score:g}"
            logger.warning(f"reward {name!r} {what}; the last with {failed[-1].error}")
        scores = [self.failure_score if outcome.score is None else outcome.score for outcome in outcomes]
        return torch.tensor(scores, dtype=torch.float32), torch.tensor([float(o.score is None) for o in outcomes])


class PendingScores:
    """The scores of a batch whose answers come one by one. What is not submitted is scored in the end."""

    def __init__(self, rewards: WeightedRewards):
        self.rewards = rewards
        self.submitted: dict[int, tuple[str, str, dict[str, Future[Outcome]]]] = {}

    def submit(self, index: int, prompt: str, response: str, columns: dict[str, Any]):
        """Has the answer scored by the rewards that work in processes of their own.

        Args:
            index: its place in the batch; the last one submitted for it counts.
            columns: the data's other fields of its row.
        """
        futures = {n: self.rewards.pool.submit(n, prompt, response, columns) for n in self.rewards.pooled}
        self.submitted[index] = prompt, response, futures

    def finish(self, prompts: list[str], responses: list[str], **columns) -> Scores:
        """The scores of the whole batch, see `WeightedRewards.score`: the same whatever was submitted, and when."""
        sequence, per_token, parts, seconds = torch.zeros(len(responses)), None, {}, {}
        plain = {name: values for name, values in columns.items() if not isinstance(values, Tensor)}
        each = []  # what rewards that look at an answer alone are given
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True) if self.rewards.alone else ()):
            each.append((prompt, response, {name: values[i] for name, values in plain.items()}))
            if self.submitted.get(i, ())[:2] != (prompt, response):
                self.submit(i, *each[i])
        for name, (reward, weight) in zip(self.rewards.names, self.rewards.rewards, strict=True):
            started = time.monotonic()
            if name in self.rewards.alone:
                if name in self.rewards.pooled:
                    outcomes = [self.submitted[i][2][name].result() for i in range(len(responses))]
                else:
                    outcomes = [score_one(reward, *one) for one in each]
                parts[name], parts[f"{name}/failed"] = self.rewards.collect(name, outcomes)
                sequence += weight * parts[name]
            elif hasattr(reward, "score_tokens") and "response_mask" in columns:
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
