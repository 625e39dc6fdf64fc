"""Partial rollouts (Kimi k1.5, 2501.12599): a response is drawn part by part, each with newer weights.

With S = `max_staleness` a response of iteration k has S parts of equally many tokens at most: the first is drawn with
the weights of version k - S, the next with those of k - S + 1, the last with those of k - 1, and none with a version
below 0. Each version draws one part of all responses of the S iterations after it, in one job. So a job takes as many
steps as a part has tokens, however long the longest response is, and the last tokens of long responses are from newer
weights than their first ones. Responses that end early wait for those that don't: what is trained on when is a matter
of the settings, and short responses are not trained on before long ones.

Jobs are numbered by the iteration that they complete: job k has version max(0, k - 1).
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from coati.config.generation import GenerationConfig
from coati.rollout.ahead import in_thread
from coati.rollout.remote.journal import row_of, sample_of
from coati.rollout.sampler import Prompt
from coati.rollout.source import Generated, Scored, ScoredGeneration, SynchronousRollouts
from coati.samples import Sample


@dataclass(frozen=True)
class Response:
    """A response of an iteration, as far as it has been drawn.

    Attributes:
        scores: those that are being computed, as `Scorer.begin` gives them, once it has ended.
    """

    iteration: int
    prompt: Prompt
    sample: Sample | None = None
    scores: dict = field(default_factory=dict)

    @property
    def length(self) -> int:
        return 0 if self.sample is None else self.sample.response_length

    @property
    def was_cut(self) -> bool:
        """Whether there may be another part."""
        return self.sample is None or self.sample.finish_reason == "length"


@dataclass(frozen=True)
class Drawn:
    """What a job leaves: the responses that have begun, by their prompts' seeds, and its seconds by name."""

    responses: dict[tuple, Response] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class GenerationInParts:
    """A `ScoredGeneration` whose responses are drawn part by part before they are asked for.

    Args:
        parts: of a response.
        longest: tokens of a response.

    Attributes:
        jobs: what they leave, by number; begun: the number of the next one.
        upcoming: the first iteration that hasn't begun.
        waited: seconds that `sample` has waited for generators in all.
    """

    def __init__(self, generation: ScoredGeneration, parts: int, longest: int):
        self.generation, self.sampler, self.scorer = generation, generation.sampler, generation.scorer
        self.parts, self.longest = parts, longest
        self.jobs: dict[int, Future[Drawn]] = {-1: finished(Drawn())}
        self.begun = self.upcoming = 0
        self.waited = 0.0

    def prepare(self, k: int, rollouts: SynchronousRollouts, iterations: int):
        """Begins the jobs up to that with version k.

        Args:
            iterations: of the whole run.
        """
        while self.begun <= min(k + 1, iterations - 1):
            job, new = self.begun, []
            last = min(job + self.parts - 1, iterations - 1) if job else 0
            for i in range(self.upcoming, last + 1):
                new += [Response(i, prompt) for prompt in rollouts.prompts_of(i)]
                self.upcoming = i + 1
            self.jobs[job] = in_thread(self.draw, job, self.jobs[job - 1], new, rollouts.sampling(job))
            self.begun += 1
        for job in [job for job in self.jobs if job < k]:
            del self.jobs[job]

    def draw(self, job: int, before: "Future[Drawn]", new: Iterable[Response], sampling: GenerationConfig) -> Drawn:
        """A job: the next part of the responses of the job before, and the first one of new ones."""
        version = max(0, job - 1)
        responses = {key: one for key, one in before.result().responses.items() if one.iteration >= job}
        responses |= {tuple(one.prompt.seed): one for one in new}
        open_keys = [key for key, one in responses.items() if one.was_cut and self.room(one, version) > 0]
        if not open_keys:
            return Drawn(responses)
        prompts = [self.next_part(responses[key], version) for key in open_keys]
        sampled = self.sampler.sample(prompts, sampling, version)
        for key, part in zip(open_keys, sampled.samples, strict=True):
            response = responses[key]
            sample = part if response.sample is None else continued(response.sample, part)
            responses[key] = self.scored_if_ended(replace(response, sample=sample))
        return Drawn(responses, sampled.seconds)

    def room(self, response: Response, version: int) -> int:
        """How many tokens a version may draw of a response."""
        parts = min(self.parts, version - (response.iteration - self.parts) + 1)
        return -(-self.longest * parts // self.parts) - response.length

    def next_part(self, response: Response, version: int) -> Prompt:
        """What a version is asked to go on from."""
        prompt = replace(response.prompt, max_new_tokens=self.room(response, version))
        if response.sample is None:
            return prompt
        return replace(prompt, input_ids=response.sample.tokens, begun=response.length)

    def scored_if_ended(self, response: Response) -> Response:
        """A response whose scoring has begun if it has ended."""
        if response.was_cut and response.length < self.longest:
            return response
        return replace(response, scores=self.scorer.begin(response.sample))

    def sample(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int = 0) -> Scored:
        """As `ScoredGeneration.sample`, for prompts of the oldest iteration that has begun."""
        started = time.monotonic()
        drawn = self.jobs[min(self.jobs)].result()
        self.waited += time.monotonic() - started
        responses = [drawn.responses[tuple(prompt.seed)] for prompt in prompts]
        samples = [response.sample for response in responses]
        return self.generation.score(Generated(samples, [one.scores for one in responses], drawn.seconds))

    def state(self, k: int, ranks) -> dict[str, Any]:
        """What has been drawn of the iterations from k on, when those before are done; of all ranks.

        Args:
            ranks: those that see different data.
        """
        drawn = self.jobs[k - 1].result().responses.values() if k - 1 in self.jobs else ()
        open_ones = [one for one in drawn if one.iteration >= k and one.sample is not None]
        rows = [{"iteration": one.iteration} | row_of(one.sample, one.prompt) for one in open_ones]
        return {"responses": [row for of_rank in ranks.gather(rows) for row in of_rank]}

    def load_state(self, state: dict[str, Any], k: int, rollouts: SynchronousRollouts):
        """The inverse of `state`. A run without partial rollouts has left nothing, and all is drawn anew."""
        stored = {tuple(row["seed"]): row for row in state.get("responses", ())}
        responses = {}
        for i in sorted({row["iteration"] for row in stored.values()}):
            for prompt in rollouts.prompts_of(i):
                row = {name: value for name, value in stored[tuple(prompt.seed)].items() if name != "iteration"}
                response = Response(i, prompt, sample_of(row, prompt))
                responses[tuple(prompt.seed)] = self.scored_if_ended(response)
        self.jobs = {k - 1: finished(Drawn(responses))}
        self.begun, self.upcoming = k, max((one.iteration for one in responses.values()), default=k - 1) + 1


def continued(earlier: Sample, part: Sample) -> Sample:
    """A response with its next part, which was drawn after all of the earlier ones' tokens."""
    start = len(earlier.tokens)
    before = earlier.parts or [[start, earlier.weights_version]]
    return replace(
        part,
        response_mask=earlier.response_mask + part.response_mask[start:],
        log_probs=earlier.log_probs + part.log_probs[start:],
        heads=earlier.heads + part.heads,
        parts=[*before, [len(part.tokens), part.weights_version]],
    )


def finished(result: Drawn) -> "Future[Drawn]":
    future: Future[Drawn] = Future()
    future.set_result(result)
    return future
