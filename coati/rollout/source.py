"""Where a policy's rollouts come from: prompts are completed, and completions are scored and batched.

`RolloutSource` is all that an algorithm knows of it. `SynchronousRollouts` generates on demand; `coati.rollout.ahead`
has what was begun before.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from coati.config.generation import GenerationConfig
from coati.rewards import Scorer
from coati.rollout.batch import RolloutBatch
from coati.rollout.sampler import Prompt, Sampler
from coati.samples import Sample, SampleGroup

if TYPE_CHECKING:
    from coati.rollout.ahead import GenerationAhead
    from coati.rollout.partial import GenerationInParts


class RolloutSource(Protocol):
    """Gives an algorithm finished, scored samples."""

    def next(self, k: int) -> tuple[RolloutBatch, dict[str, float]]:
        """This rank's samples of iteration k, minibatch after minibatch and group after group, and metrics that are the
        same on all ranks."""

    def state(self) -> dict[str, Any]:
        """What must be saved to resume, as JSON."""

    def load_state(self, state: dict[str, Any], k: int):
        """The inverse of `state`; iteration k comes next."""


class ScoredGeneration:
    """Completes prompts and scores the responses.

    Rewards that work in processes of their own begin with a sample as soon as it has ended.
    """

    def __init__(self, sampler: Sampler, scorer: Scorer):
        self.sampler, self.scorer = sampler, scorer

    def sample(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int = 0) -> "Scored":
        """One scored sample per prompt.

        Args:
            version: of the weights that sample.
        """
        return self.score(self.generate(prompts, sampling, version))

    def generate(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int = 0) -> "Generated":
        """One sample per prompt, whose scoring has begun."""
        begun: list[dict] = [{}] * len(prompts)

        def begin(i: int, sample: Sample):
            begun[i] = self.scorer.begin(sample)

        started = time.monotonic()
        sampled = self.sampler.sample(prompts, sampling, version, begin)
        return Generated(sampled.samples, begun, {"generate": time.monotonic() - started} | sampled.seconds)

    def score(self, generated: "Generated") -> "Scored":
        """Waits for the scores."""
        started = time.monotonic()
        seconds = self.scorer.score(generated.samples, generated.begun)
        times = generated.seconds | {"score": time.monotonic() - started}
        begun = {name for of_sample in generated.begun for name in of_sample}
        if begun:
            times["reward_wait"] = sum(seconds[name] for name in begun)
        return Scored(generated.samples, times | {f"reward/{name}": value for name, value in seconds.items()})


@dataclass(frozen=True)
class Generated:
    """Samples, the scores that are being computed for each, and the seconds that parts of generation took."""

    samples: list[Sample]
    begun: list[dict]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """Samples, and the seconds that this rank spent on each part."""

    samples: list[Sample]
    seconds: dict[str, float]


@dataclass(frozen=True)
class RolloutShape:
    """How many samples an iteration has, and in what order.

    Attributes:
        prompts: of an iteration, over all ranks; group_size: samples per prompt.
        minibatches: optimizer steps that the samples are split into.
    """

    prompts: int
    group_size: int = 1
    minibatches: int = 1

    def of_rank(self, items: list, rank: int, world_size: int) -> list:
        """A rank's part of what an iteration has per prompt, minibatch after minibatch."""
        return [x for m in range(self.minibatches) for x in items[m :: self.minibatches][rank::world_size]]


class SynchronousRollouts:
    """Iteration k's prompts are completed when they are asked for.

    With `max_refills` (dynamic sampling, DAPO, 2503.14476, section 3.2) groups whose samples all have the same reward
    are replaced by groups of further prompts, up to so many times. With `oversampling` more groups are drawn at a time
    than are missing; those that come first in the data are taken, not those that end first, so that short responses
    are not favored, and the others are drawn anew in the next iteration. With `rest_epochs` the prompts of groups with
    the same reward, which are too easy or too hard to learn from, are left out for so many epochs.

    Args:
        data: rows of `PromptSample`.
        order: the rows of each batch (`BatchSampler`).
        ranks: those that see different data (`Communicator`).
        sampling: how iteration k's tokens are drawn.
        max_refills: None for no dynamic sampling.
        oversampling: groups that dynamic sampling draws for each that is missing.
        staleness: how many iterations older than the current weights those are that sample.

    Attributes:
        position: rows of the data, epoch after epoch, that have been drawn or left out.
        resting: rows that are left out, each with the epoch that it comes back in.
    """

    def __init__(
        self,
        generation: "ScoredGeneration | GenerationAhead | GenerationInParts",
        data,
        order,
        shape: RolloutShape,
        ranks,
        *,
        seed: int,
        sampling: Callable[[int], GenerationConfig],
        pad_id: int,
        device,
        max_refills: int | None = None,
        oversampling: float = 1.0,
        rest_epochs: int = 0,
        staleness: int = 0,
    ):
        self.generation, self.data, self.order, self.shape, self.ranks = generation, data, order, shape, ranks
        self.seed, self.sampling, self.pad_id, self.device = seed, sampling, pad_id, device
        self.max_refills, self.oversampling = max_refills, oversampling
        self.rest_epochs, self.position = rest_epochs, order.start[1]
        self.staleness = staleness
        self.resting: dict[int, int] = {}

    def next(self, k: int) -> tuple[RolloutBatch, dict[str, float]]:
        """See `RolloutSource`."""
        if self.max_refills is None:
            groups, metrics = self._sample_all(k)
        else:
            groups, metrics = self._sample_unequal(k)
        samples = [sample for group in groups for sample in group.samples]
        temperature = self.sampling(k).temperature or 1.0  # greedy responses are scored at 1
        return RolloutBatch.from_samples(samples, self.pad_id, temperature, self.device), metrics

    def prompts_of(self, k: int) -> list[Prompt]:
        """This rank's prompts of iteration k without dynamic sampling."""
        if not self.rest_epochs:
            self.position = self.order.position(k)
        local_rows = self.shape.of_rank(self._draw([], self.shape.prompts), self.ranks.rank, self.ranks.world_size)
        return self._prompts(k, local_rows)

    def version_of(self, k: int) -> int:
        """That of the weights that iteration k is sampled with: the iterations that have made them."""
        return max(0, k - self.staleness)

    def state(self) -> dict[str, Any]:
        of_rest = {"resting": sorted(self.resting.items())} if self.rest_epochs else {}
        return {"position": self.position} | of_rest

    def load_state(self, state: dict[str, Any], k: int):
        if "position" in state:  # PPO's first checkpoints have none
            self.position = state["position"]
            self.order.start = (k, self.position)
        self.resting = dict(state.get("resting", ()))

    def _sample_all(self, k: int) -> tuple[list[SampleGroup], dict[str, float]]:
        scored = self.generation.sample(self.prompts_of(k), self.sampling(k), self.version_of(k))
        groups = self._groups(scored.samples)
        equal = self.ranks.sum(sum(group.all_equal for group in groups)).item()
        metrics = self._metrics(scored.samples) | seconds_of([scored]) | self._rest(groups)
        return groups, metrics | ({"equal_groups": equal / self.shape.prompts} if self.shape.group_size > 1 else {})

    def _sample_unequal(self, k: int) -> tuple[list[SampleGroup], dict[str, float]]:
        """Dynamic sampling: all ranks see all groups and choose alike, in the order of the data."""
        wanted, world, rank = self.shape.prompts, self.ranks.world_size, self.ranks.rank
        start = self.position
        drawn: list[tuple[int, int]] = []
        groups: list[SampleGroup] = []  # of what was drawn
        places: list[int] = []  # of those that don't have equal rewards
        of_this_rank: list[tuple[int, SampleGroup]] = []  # with their places
        rounds: list[Scored] = []
        while len(places) < wanted and len(rounds) <= self.max_refills:
            new = self._draw(drawn, math.ceil((wanted - len(places)) * self.oversampling))
            own_places = range(len(drawn) + rank, len(drawn) + len(new), world)
            drawn += new
            # ranks complete equally many prompts; the copies that fill up are left out
            filled = new + new[:1] * (-len(new) % world)
            prompts = self._prompts(k, filled[rank::world])
            rounds.append(self.generation.sample(prompts, self.sampling(k), self.version_of(k)))
            found = self._groups(rounds[-1].samples)
            of_this_rank += zip(own_places, found, strict=False)
            by_turn = zip(*self.ranks.gather(found), strict=True)
            groups += [group for turn in by_turn for group in turn][: len(new)]
            places = [place for place, group in enumerate(groups) if not group.all_equal]
        used = places[wanted - 1] + 1 if len(places) >= wanted else len(drawn)
        if used < len(drawn):  # what is drawn after the last group that is needed comes again
            self.position = start
            self._draw([], used)
        kept, spare = ([group for group in groups[:used] if group.all_equal == equal] for equal in (False, True))
        chosen = self.shape.of_rank((kept + spare)[:wanted], rank, world)
        counted = [sample for place, group in of_this_rank if place < used for sample in group.samples]
        metrics = self._metrics(counted) | seconds_of(rounds) | self._rest(kept + spare)
        metrics |= {"equal_groups": len(spare) / used, "refills": len(rounds) - 1}
        return chosen, metrics | ({"unused_groups": 1 - used / len(drawn)} if self.oversampling > 1 else {})

    def _metrics(self, samples: list[Sample]) -> dict[str, float]:
        metrics = sample_metrics(samples, self.ranks)
        if self.generation.scorer.has_details:
            details = [sample.details for sample in samples]
            metrics |= {f"reward/{name}": value for name, value in means_where_told(details, self.ranks).items()}
        if self.generation.sampler.plays_episodes:
            metrics |= mean_environment_metrics(samples, self.ranks)
        return metrics

    def _draw(self, before: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        """The next rows of the data that don't rest, each with how often the iteration has drawn it before."""
        rows = [row for row, _ in before]
        while len(rows) < len(before) + count:
            row = self.order.row(self.position)
            if self.resting.get(row, 0) <= self.epoch:
                rows.append(row)
            self.position += 1
        return [(row, rows[:place].count(row)) for place, row in enumerate(rows)][len(before) :]

    @property
    def epoch(self) -> int:
        """That the next row is of."""
        return self.position // self.order.epoch_size

    def _rest(self, groups: list[SampleGroup]) -> dict[str, float]:
        """Puts rows to rest. Returns the share of the data that rests now.

        Args:
            groups: any ranks' or all ranks', which are brought together.
        """
        if not self.rest_epochs:
            return {}
        equal = {group.samples[0].row for group in groups if group.all_equal}
        back = self.epoch + self.rest_epochs + 1
        self.resting = {row: end for row, end in self.resting.items() if end > self.epoch}
        self.resting |= {row: back for of_rank in self.ranks.gather(equal) for row in of_rank}
        return {"resting": len(self.resting) / len(self.data)}

    def _prompts(self, k: int, drawn: list[tuple[int, int]]) -> list[Prompt]:
        """A group of prompts for each row. Seeds are of the run, the iteration and the row, whatever the number of
        processes."""
        n = self.shape.group_size
        return [
            prompt_of(self.data, row, [self.seed, k, row, repeat * n + i]) for row, repeat in drawn for i in range(n)
        ]

    def _groups(self, samples: list[Sample]) -> list[SampleGroup]:
        n = self.shape.group_size
        return [SampleGroup(samples[i : i + n]) for i in range(0, len(samples), n)]


def prompt_of(data, row: int, seed: Sequence[int]) -> Prompt:
    """A row of prompt data as a `Prompt`."""
    sample = data[row]
    return Prompt(row, seed, sample.input_ids, sample.text, sample.columns)


def sample_metrics(samples: Sequence[Sample], ranks) -> dict[str, float]:
    """Means over all ranks' samples: the total reward with its standard deviation and its correlation with the length
    (where both vary), and each reward (over the samples that it scores), if there are rewards; lengths and how
    responses ended."""
    sums: Counter[str] = Counter()
    for sample in samples:
        sums.update({"samples": 1, "reward": sample.total_reward, "squares": sample.total_reward**2})
        sums.update({"response_length": sample.response_length, "truncated": sample.truncated})
        sums.update({"length_squares": sample.response_length**2})
        sums.update({"products": sample.total_reward * sample.response_length})
        for name, value in sample.rewards.items():
            sums.update({f"reward/{name}": value or 0.0, f"scored/{name}": value is not None})
        sums.update({f"reward/{name}/failed": failed for name, failed in sample.failed.items()})
    total = ranks.sum_metrics([{name: float(value) for name, value in sums.items()}])
    count, scored = total.pop("samples"), {}
    for name in [name for name in total if name.startswith("scored/")]:
        scored[name.removeprefix("scored/")] = total.pop(name)
    squares, has_rewards = total.pop("squares"), bool(scored)
    length_squares, products = total.pop("length_squares"), total.pop("products")
    moments = (count, total["reward"], total["response_length"], squares, length_squares, products)
    if not has_rewards:
        del total["reward"]
    metrics = {name: value / count for name, value in total.items()}
    for name, n in scored.items():
        metrics[f"reward/{name}"] = total[f"reward/{name}"] / n if n else float("nan")
        if n < count:
            metrics[f"reward/{name}/scored"] = n / count
    if has_rewards:
        metrics["reward_std"] = max(squares / count - metrics["reward"] ** 2, 0.0) ** 0.5
        found = correlation(*moments)
        metrics |= {} if found is None else {"reward/length_correlation": found}
    return metrics | {"finished": 1 - metrics["truncated"]}


def correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    """Pearson's correlation of two variables from sums: of ones, of each, of their squares and of their products. None
    where one does not vary, but for what rounding leaves of a variance."""
    variances = (n * xx - x * x, n * yy - y * y)
    if any(variance <= 1e-12 * n * square for variance, square in zip(variances, (xx, yy), strict=True)):
        return None
    return min(max((n * xy - x * y) / math.sqrt(variances[0] * variances[1]), -1.0), 1.0)


def environment_metrics(sample: Sample) -> dict[str, float]:
    """Numbers about an episode, `environment/...`."""
    own = {"turns": len(sample.turns), "failed": sample.finish_reason == "failed"}
    return {f"environment/{name}": float(value) for name, value in (own | sample.metrics).items()}


def mean_environment_metrics(samples: Sequence[Sample], ranks) -> dict[str, float]:
    """Their means over all ranks' samples."""
    return means_where_told([environment_metrics(sample) for sample in samples], ranks)


def means_where_told(told: Sequence[dict[str, float]], ranks) -> dict[str, float]:
    """Means over those of all ranks' samples that have a number of a name. Which there are may differ between samples.

    Args:
        told: numbers by name, of each of this rank's samples.
    """
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for numbers in told:
        sums.update(numbers)
        counts.update(numbers.keys())
    everywhere = ranks.gather((dict(sums), dict(counts)))
    names = sorted({name for of_rank, _ in everywhere for name in of_rank})
    return {
        name: sum(of_rank.get(name, 0.0) for of_rank, _ in everywhere)
        / sum(number.get(name, 0) for _, number in everywhere)
        for name in names
    }


def seconds_of(rounds: Sequence[Scored]) -> dict[str, float]:
    """Seconds of generation and rewards on this rank, `seconds/...`."""
    total: Counter[str] = Counter()
    for scored in rounds:
        total.update(scored.seconds)
    return {f"seconds/{name}": value for name, value in total.items()}
