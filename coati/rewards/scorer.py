"""The weighted sum of rewards."""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from coati.errors import UserError
from coati.rewards.base import Outcome, Reward
from coati.rewards.pool import Pool, score_one
from coati.samples import Sample

logger = logging.getLogger(__name__)


class Scorer:
    """Scores samples by several rewards, each checked and timed.

    Args:
        rewards: pairs of a reward and its weight.
        workers: processes that score one sample at a time, for rewards `per_response` with a `worker_spec`; 0 to do so
            in this thread.
        timeout: seconds that they may take for a sample.
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
        self.failure_score = failure_score
        self.rewards = dict(zip(unique([reward.name for reward, _ in rewards]), rewards, strict=True))
        specs = {name: r.worker_spec for name, (r, _) in self.rewards.items() if r.per_response and r.worker_spec}
        self.pool = Pool(specs, workers, timeout) if specs and workers else None
        self.pooled = set(specs) if self.pool else set()
        self.have_worked: set[str] = set()  # rewards that may fail for a sample, and have scored one
        self.has_details = any(reward.has_details for reward, _ in rewards)

    def check(self, rows: Sequence[dict[str, Any]]):
        """Has every reward check the rows that it will score, before anything is generated.

        Args:
            rows: the columns of some of the data's rows.

        Raises:
            UserError: a reward can't score such rows.
        """
        for reward, _ in self.rewards.values():
            reward.check(rows)

    def begin(self, sample: Sample) -> "dict[str, Future[Outcome]]":
        """Has a finished sample scored by the rewards that work in processes of their own or wait for an endpoint, for
        `score` to collect."""
        begun = {name: self.pool.submit(name, sample) for name in self.pooled}
        for name, (reward, _) in self.rewards.items():
            if (future := reward.begin(sample)) is not None:
                begun[name] = future
        return begun

    def score(self, samples: Sequence[Sample], begun: "Sequence[dict[str, Future[Outcome]]]" = ()) -> dict[str, float]:
        """Fills in the samples' `rewards`, `details`, `failed`, `score` and `token_rewards`. A sample that all rewards
        skip gets 0, and a line in the log.

        Args:
            begun: what `begin` gave for each sample; if not given, they are begun now.

        Returns:
            How many seconds each reward took; of one that worked meanwhile, how long it was waited for, once all that
            this process computes itself was done.

        Raises:
            UserError: a reward gives the wrong number of scores, or NaN or an infinity; it names the reward and the
                first response concerned. Or a reward `per_response` has failed for every sample so far.
        """
        begun = begun or [self.begin(sample) for sample in samples]
        for sample in samples:
            sample.rewards, sample.details, sample.failed = {}, {}, {}
            sample.score, sample.token_rewards = 0.0, None
        found: dict[str, list] = {}
        seconds = {}
        # those that work elsewhere go on while this process computes its own
        for name in sorted(self.rewards, key=lambda name: any(name in futures for futures in begun)):
            started, reward = time.monotonic(), self.rewards[name][0]
            if reward.on_tokens:
                found[name] = _token_scores(name, reward.score(samples), samples)
            else:
                found[name] = self._response_scores(name, reward, samples, begun)
            seconds[name] = time.monotonic() - started
        for name, (reward, weight) in self.rewards.items():
            if reward.on_tokens:
                _add_on_tokens(name, weight, samples, found[name])
            else:
                _add(name, weight, samples, found[name])
        if self.rewards:
            _warn_of_unscored(samples)
        return {name: seconds[name] for name in self.rewards}

    def _response_scores(self, name: str, reward: Reward, samples, begun) -> list[float | None]:
        """One reward's scores; `samples[i].failed` where it may fail for a sample."""
        outcomes = self._outcomes(name, reward, samples, begun)
        if outcomes is None:
            return _numbers(name, reward.score(samples), samples)
        self._report_failures(name, outcomes)
        for sample, outcome in zip(samples, outcomes, strict=True):
            sample.failed[name] = bool(outcome.error)
            sample.details |= {f"{name}/{detail}": value for detail, value in outcome.details.items()}
        return [self.failure_score if outcome.error else outcome.score for outcome in outcomes]

    def _outcomes(self, name: str, reward: Reward, samples, begun) -> list[Outcome] | None:
        """A result per sample, of a reward that gives such."""
        if not reward.per_response:
            return reward.outcomes(samples)
        return [
            futures[name].result() if name in futures else score_one(reward, sample)
            for sample, futures in zip(samples, begun, strict=True)
        ]

    def _report_failures(self, name: str, outcomes: list[Outcome]):
        failed = [outcome for outcome in outcomes if outcome.error]
        if len(failed) < len(outcomes):
            self.have_worked.add(name)
        if not failed:
            return
        if name not in self.have_worked:
            raise UserError(f"reward {name!r} failed for all {len(failed)} responses, the last with {failed[-1].error}")
        what = f"failed for {len(failed)} of {len(outcomes)} responses, which get {self.failure_score:g}"
        logger.warning(f"reward {name!r} {what}; the last with {failed[-1].error}")


def unique(names: Sequence[str]) -> list[str]:
    """Two functions are often both called `reward`: the second becomes `reward_2`."""
    result: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in result:
            number += 1
            candidate = f"{name}_{number}"
        result.append(candidate)
    return result


def _add(name: str, weight: float, samples: Sequence[Sample], scores: Sequence[float | None]):
    for sample, score in zip(samples, scores, strict=True):
        sample.rewards[name] = score
        if score is not None:
            sample.score += weight * score


def _add_on_tokens(name: str, weight: float, samples: Sequence[Sample], rows: Sequence[list[float] | None]):
    for sample, row in zip(samples, rows, strict=True):
        if row is None:
            sample.rewards[name] = None
            continue
        sample.rewards[name] = sum(row)
        before = sample.token_rewards or [0.0] * len(row)
        sample.token_rewards = [old + weight * new for old, new in zip(before, row, strict=True)]


# --- what a reward returns, checked


def _numbers(name: str, raw, samples: Sequence[Sample]) -> list[float | None]:
    """One finite number or None per sample."""
    must = "it must return one number per response"
    scores = _as_list(name, raw, must)
    if len(scores) != len(samples):
        raise UserError(f"reward {name!r} gave {len(scores)} scores for {len(samples)} responses: {must}")
    numbers: list[float | None] = []
    for score, sample in zip(scores, samples, strict=True):
        numbers.append(None if score is None else _number(name, score, sample, must))
    return numbers


def _token_scores(name: str, raw, samples: Sequence[Sample]) -> list[list[float] | None]:
    """One finite number per token of each sample, 0 where it wasn't sampled; or None for a sample."""
    must = "it must return one number per token of each sample"
    rows = _as_list(name, raw, must)
    if len(rows) != len(samples):
        raise UserError(f"reward {name!r} gave rewards for {len(rows)} of {len(samples)} responses: {must}")
    token_scores: list[list[float] | None] = []
    for row, sample in zip(rows, samples, strict=True):
        if row is None:
            token_scores.append(None)
            continue
        values = _as_list(name, row, must)
        if len(values) != len(sample.tokens):
            raise UserError(f"reward {name!r} gave {len(values)} numbers for {len(sample.tokens)} tokens: {must}")
        of_tokens = zip(values, sample.response_mask, strict=True)
        token_scores.append([_number(name, value, sample, must) if sampled else 0.0 for value, sampled in of_tokens])
    return token_scores


def _as_list(name: str, raw, must: str) -> list:
    if isinstance(raw, torch.Tensor | np.ndarray):
        raw = raw.tolist()
    if not isinstance(raw, list | tuple):
        raise UserError(f"reward {name!r} gave {str(raw)[:80]}: {must}")
    return list(raw)


def _number(name: str, value, sample: Sample, must: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # the last from a tensor of several numbers
        raise UserError(f"reward {name!r} gave {str(value)[:80]}: {must}") from error
    if isinstance(value, str):
        raise UserError(f"reward {name!r} gave the text {value[:80]!r}: {must}")
    if not math.isfinite(number):
        raise UserError(
            f"reward {name!r} gave {number} for the response {sample.response[:80]!r}: a reward must be finite, or "
            "None to skip a response"
        )
    return number


def _warn_of_unscored(samples: Sequence[Sample]):
    unscored = [s for s in samples if all(value is None for value in s.rewards.values())]
    if unscored:
        what = f"{len(unscored)} of {len(samples)} responses are scored by no reward and get 0"
        logger.warning(f"{what}, such as {unscored[0].response[:80]!r}")
