"""Rollouts that are sampled while the policy trains: generators run ahead of the trainer.

Iteration k is sampled with the weights of version max(0, k - S), where version v is what v iterations have made and S
is `max_staleness`. So what an iteration trains on is a matter of the settings, whatever was slow; S = 0 is the
synchronous run. While iteration k trains, those up to k + S are being sampled.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from coati.config.generation import GenerationConfig
from coati.rollout.batch import RolloutBatch
from coati.rollout.remote import WeightVersions
from coati.rollout.sampler import Prompt
from coati.rollout.source import Generated, Scored, ScoredGeneration, SynchronousRollouts
from coati.samples import Sample

if TYPE_CHECKING:
    from coati.rollout.partial import GenerationInParts


class GenerationAhead:
    """A `ScoredGeneration` that can begin before its samples are asked for.

    Attributes:
        begun: what has begun, by version and prompts.
        upcoming: the first iteration that hasn't been begun ahead.
        waited: seconds that `sample` has waited for generators in all.
    """

    def __init__(self, generation: ScoredGeneration):
        self.generation, self.sampler, self.scorer = generation, generation.sampler, generation.scorer
        self.begun: dict[tuple, Future[Generated]] = {}
        self.upcoming, self.waited = 0, 0.0

    def prepare(self, k: int, rollouts: SynchronousRollouts, iterations: int):
        """Begins the iterations that may be sampled while iteration k trains.

        Args:
            iterations: of the whole run.
        """
        if rollouts.staleness == 0:  # refills may change which prompts there are
            return
        for i in range(max(k, self.upcoming), min(k + rollouts.staleness + 1, iterations)):
            self.begin(rollouts.prompts_of(i), rollouts.sampling(i), rollouts.version_of(i))
            self.upcoming = i + 1

    def begin(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int):
        """Has these sampled, unless that has begun."""
        key = key_of(prompts, version)
        if key not in self.begun:
            self.begun[key] = in_thread(self.generation.generate, prompts, sampling, version)

    def sample(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int = 0) -> Scored:
        """As `ScoredGeneration.sample`; what has begun is waited for."""
        self.begin(prompts, sampling, version)
        started = time.monotonic()
        generated = self.begun.pop(key_of(prompts, version)).result()
        self.waited += time.monotonic() - started
        return self.generation.score(generated)

    def state(self, k: int, ranks) -> dict[str, Any]:
        """What must be saved to resume at iteration k: nothing, as samples are found in the journal or drawn again."""
        return {}

    def load_state(self, state: dict[str, Any], k: int, rollouts: SynchronousRollouts):
        pass


class AsynchronousRollouts:
    """A `RolloutSource` whose samples come from generators.

    Args:
        rollouts: what an iteration's prompts are, and what becomes of its samples.
        ahead: what samples for it.
        versions: where the weights are published that generators sample with.
        iterations: of the whole run.

    Attributes:
        done: iterations whose samples have been given.
    """

    def __init__(
        self,
        rollouts: SynchronousRollouts,
        ahead: "GenerationAhead | GenerationInParts",
        versions: WeightVersions,
        iterations: int,
    ):
        self.rollouts, self.ahead, self.versions, self.iterations = rollouts, ahead, versions, iterations
        self.done = 0

    def next(self, k: int) -> tuple[RolloutBatch, dict[str, float]]:
        """See `RolloutSource`."""
        started = time.monotonic()
        size = self.versions.publish(k)
        published, waited = time.monotonic(), self.ahead.waited
        self.ahead.prepare(k, self.rollouts, self.iterations)
        batch, metrics = self.rollouts.next(k)
        self.done = k + 1
        of_generators = {"seconds/publish": published - started, "bytes/publish": size}
        of_generators["seconds/wait"] = self.ahead.waited - waited
        if self.rollouts.staleness:
            metrics["staleness"] = mean_staleness(batch.samples, k, self.rollouts.ranks)
        return batch, metrics | of_generators

    def state(self) -> dict[str, Any]:
        return self.rollouts.state() | self.ahead.state(self.done, self.rollouts.ranks)

    def load_state(self, state: dict[str, Any], k: int):
        self.rollouts.load_state(state, k)
        self.ahead.load_state(state, k, self.rollouts)
        self.done = k


def mean_staleness(samples: Sequence[Sample], k: int, ranks) -> float:
    """How many iterations before iteration k the weights were made that have drawn a token, on average over all ranks'
    sampled tokens."""
    tokens = behind = 0.0
    for sample in samples:
        start = 0
        for end, version in sample.parts or [[len(sample.tokens), sample.weights_version]]:
            drawn = sum(sample.response_mask[start:end])
            tokens, behind, start = tokens + drawn, behind + drawn * (k - version), end
    total = ranks.sum_metrics([{"tokens": tokens, "behind": behind}])
    return total["behind"] / total["tokens"]


def key_of(prompts: Sequence[Prompt], version: int) -> tuple:
    """Tells generations apart: a prompt's seed has its iteration in it."""
    return version, *((prompt.row, *prompt.seed) for prompt in prompts)


def in_thread(function, *arguments) -> Future:
    """Calls a function in a thread that doesn't keep the process from ending."""
    future: Future = Future()

    def call():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True, name="rollouts").start()
    return future
