"""Rollouts that are sampled while the policy trains: generators run ahead of the trainer.

Iteration k is sampled with the weights of version max(0, k - S), where version v is what v iterations have made and S
is `max_staleness`. So what an iteration trains on is a matter of the settings, whatever was slow; S = 0 is the
synchronous run. While iteration k trains, those up to k + S are being sampled.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from coati.config.generation import GenerationConfig
from coati.rollout.batch import RolloutBatch
from coati.rollout.remote import WeightVersions
from coati.rollout.sampler import Prompt
from coati.rollout.source import Generated, Scored, ScoredGeneration, SynchronousRollouts


class GenerationAhead:
    """A `ScoredGeneration` that can begin before its samples are asked for.

    Attributes:
        begun: what has begun, by version and prompts.
        waited: seconds that `sample` has waited for generators in all.
    """

    def __init__(self, generation: ScoredGeneration):
        self.generation, self.sampler, self.scorer = generation, generation.sampler, generation.scorer
        self.begun: dict[tuple, Future[Generated]] = {}
        self.waited = 0.0

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


class AsynchronousRollouts:
    """A `RolloutSource` whose samples come from generators.

    Args:
        rollouts: what an iteration's prompts are, and what becomes of its samples.
        ahead: what samples for it.
        versions: where the weights are published that generators sample with.
        iterations: of the whole run.

    Attributes:
        upcoming: the first iteration that hasn't been begun ahead.
    """

    def __init__(
        self, rollouts: SynchronousRollouts, ahead: GenerationAhead, versions: WeightVersions, iterations: int
    ):
        self.rollouts, self.ahead, self.versions, self.iterations = rollouts, ahead, versions, iterations
        self.upcoming = 0

    def next(self, k: int) -> tuple[RolloutBatch, dict[str, float]]:
        """See `RolloutSource`."""
        started = time.monotonic()
        size = self.versions.publish(k)
        published, waited = time.monotonic(), self.ahead.waited
        staleness = self.rollouts.staleness
        if staleness:  # else refills may change which prompts there are
            for i in range(max(k, self.upcoming), min(k + staleness + 1, self.iterations)):
                prompts = self.rollouts.prompts_of(i)
                self.ahead.begin(prompts, self.rollouts.sampling(i), self.rollouts.version_of(i))
                self.upcoming = i + 1
        batch, metrics = self.rollouts.next(k)
        of_generators = {"seconds/publish": published - started, "bytes/publish": size}
        of_generators["seconds/wait"] = self.ahead.waited - waited
        if staleness:
            metrics["staleness"] = k - self.rollouts.version_of(k)
        return batch, metrics | of_generators

    def state(self) -> dict[str, Any]:
        return self.rollouts.state()

    def load_state(self, state: dict[str, Any], k: int):
        self.rollouts.load_state(state, k)


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
