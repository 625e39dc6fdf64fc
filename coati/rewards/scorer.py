"""The weighted sum of rewards."""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future

from coati.errors import UserError
from coati.rewards.base import Reward
from coati.rewards.pool import Outcome, Pool, score_one
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

    Raises:
        UserError: no reward at all.
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
        self.have_worked: set[str] = set()  # rewards `per_response` that have scored a sample

    def begin(self, sample: Sample) -> "dict[str, Future[Outcome]]":
        """Has a finished sample scored by the rewards that work in processes of their own, for `score` to collect."""
        return {name: self.pool.submit(name, sample) for name in self.pooled}

    def score(self, samples: Sequence[Sample], begun: "Sequence[dict[str, Future[Outcome]]]" = ()) -> dict[str, float]:
        """Fills in what the samples earned: `rewards`, `failed`, `score` and `token_rewards`. A sample that no reward
        has an opinion on gets 0, and a line in the log.

        Args:
            begun: what `begin` gave for each sample; what it was not asked for is scored now.

        Returns:
            How many seconds each reward took; of one that worked meanwhile, how long it was waited for.

        Raises:
            UserError: a reward gives the wrong number of scores, or NaN or an infinity; it names the reward and the
                first response concerned. Or a reward `per_response` has failed for every sample so far.
        """
        begun = begun or [self.begin(sample) for sample in samples]
        seconds = {}
        for sample in samples:
            sample.score = 0.0
        for name, (reward, weight) in self.rewards.items():
            started = time.monotonic()
            if reward.per_response:
                self._score_alone(name, reward, weight, samples, begun)
            elif reward.on_tokens:
                _score_tokens(name, reward, weight, samples)
            else:
                scores = _numbers(name, reward.score(samples), samples)
                _add(name, weight, samples, scores)
            seconds[name] = time.monotonic() - started
        _warn_of_unjudged(samples)
        return seconds

    def _score_alone(self, name: str, reward: Reward, weight: float, samples, begun):
        if name in self.pooled:
            outcomes = [futures[name].result() for futures in begun]
        else:
            outcomes = [score_one(reward, sample) for sample in samples]
        failed = [outcome for outcome in outcomes if outcome.error]
        if len(failed) < len(outcomes):
            self.have_worked.add(name)
        elif failed and name not in self.have_worked:
            raise UserError(f"reward {name!r} failed for all {len(failed)} responses, the last with {failed[-1].error}")
        if failed:
            what = f"failed for {len(failed)} of {len(outcomes)} responses, which get {self.failure_score:g}"
            logger.warning(f"reward {name!r} {what}; the last with {failed[-1].error}")
        for sample, outcome in zip(samples, outcomes, strict=True):
            sample.failed[name] = bool(outcome.error)
        _add(name, weight, samples, [self.failure_score if o.error else o.score for o in outcomes])


def unique(names: list[str]) -> list[str]:
    """Two functions are often both called `reward`: the second becomes `reward_2`."""
    return [n if names[:i].count(n) == 0 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names)]


def _add(name: str, weight: float, samples: Sequence[Sample], scores: Sequence[float | None]):
    for sample, score in zip(samples, scores, strict=True):
        sample.rewards[name] = score
        sample.score += weight * (score or 0.0)


def _numbers(name: str, raw, samples: Sequence[Sample]) -> list[float | None]:
    """A reward's scores, one finite number or None per sample."""
    must = "it must return one number per response"
    scores = _as_list(name, raw, must)
    if len(scores) != len(samples):
        raise UserError(f"reward {name!r} gave {len(scores)} scores for {len(samples)} responses: {must}")
    return [_number(name, score, sample, must) for score, sample in zip(scores, samples, strict=True)]


def _score_tokens(name: str, reward: Reward, weight: float, samples: Sequence[Sample]):
    must = "it must return one number per token of each sample"
    rows = _as_list(name, reward.score(samples), must)
    if len(rows) != len(samples):
        raise UserError(f"reward {name!r} gave rewards for {len(rows)} of {len(samples)} responses: {must}")
    for sample, row in zip(samples, rows, strict=True):
        found = _as_list(name, row, must)
        if len(found) != len(sample.tokens):
            raise UserError(f"reward {name!r} gave {len(found)} numbers for {len(sample.tokens)} tokens: {must}")
        of_response = [
            _number(name, value, sample, must) if sampled else 0.0
            for value, sampled in zip(found, sample.response_mask, strict=True)
        ]
        sample.rewards[name] = sum(of_response)
        before = sample.token_rewards or [0.0] * len(found)
        sample.token_rewards = [old + weight * new for old, new in zip(before, of_response, strict=True)]


def _as_list(name: str, raw, must: str) -> list:
    """Tensors and arrays have `tolist`."""
    values = raw.tolist() if hasattr(raw, "tolist") else raw
    if not isinstance(values, list | tuple):
        raise UserError(f"reward {name!r} gave {str(raw)[:80]}: {must}")
    return list(values)


def _number(name: str, value, sample: Sample, must: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r} gave {str(value)[:80]}: {must}") from error
    if not math.isfinite(number):
        raise UserError(
            f"reward {name!r} gave {number} for the response {sample.response[:80]!r}: a reward must be finite, or "
            "None for a response that it has no opinion on"
        )
    return number


def _warn_of_unjudged(samples: Sequence[Sample]):
    unjudged = [s for s in samples if all(value is None for value in s.rewards.values())]
    if unjudged:
        what = f"{len(unjudged)} of {len(samples)} responses are scored by no reward and get 0"
        logger.warning(f"{what}, such as {unjudged[0].response[:80]!r}")
