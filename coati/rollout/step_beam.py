"""Beam search over the steps of a response by a reward of steps (Snell et al., 2408.03314, "beam search" against a
process reward model)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rewards import Reward, Scorer
from coati.rollout.best_of import BestOf
from coati.rollout.generate import PolicyGenerator
from coati.rollout.generator import Generator, Request
from coati.rollout.prompts import eos_ids, response_text
from coati.rollout.sampler import Prompt, prompts_of_texts
from coati.samples import Sample

OPEN = "stop"  # the finish reason of a response that ends with a separator, and goes on


@dataclass(frozen=True)
class Beam:
    """A response up to the end of a step, or whole: its tokens, why generation ended there, and its score."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = OPEN
    score: float = 0.0

    @property
    def is_open(self) -> bool:
        return self.finish_reason == OPEN


def step_beam_search(
    actor,
    reward: Reward,
    prompts: Sequence[str],
    *,
    beams: int = 4,
    expansions: int = 4,
    separator: str = "\n",
    tokenizer,
    config: GenerationConfig | None = None,
    columns: Sequence[dict[str, Any]] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[BestOf]:
    """Searches a good response to each prompt, step by step.

    From each of the `beams` that are kept, `expansions` next steps are sampled; of all these and of the responses that
    have ended, the `beams` of highest score stay, equal ones once, until all of them have ended. The first step is
    sampled `beams` x `expansions` times. With one beam it is the best next step each time.

    Args:
        actor: an `Actor`.
        reward: scores responses that may end with a step: a `ProcessReward` with `reduce` last, min or mean.
        prompts: as the model reads them (a chat template is already applied).
        separator: what ends a step.
        tokenizer: the actor's.
        config: how steps are sampled; `max_new_tokens` is of the whole response.
        columns: further fields that the reward reads, per prompt.
        seed: of the steps.
        batch_size: steps sampled at a time.

    Returns:
        The kept responses' scores, and the best one, for each prompt.

    Raises:
        UserError: a number below 1, greedy decoding, stop texts, an empty prompt, or scores that are not one finite
            number per response.
    """
    config = config or GenerationConfig()
    if min(beams, expansions) < 1:
        raise UserError(f"a search with {beams} beams and {expansions} expansions: give numbers from 1 on")
    if config.temperature == 0 or config.num_beams > 1:
        raise UserError("a search over steps needs steps that differ: temperature above 0 and num_beams 1")
    if config.stop:
        raise UserError(f"a search over steps stops at its separator: leave out stop {list(config.stop)}")
    asked = prompts_of_texts(prompts, tokenizer, columns, seed)
    scorer = Scorer([(reward, 1.0)])
    scorer.check([prompt.columns for prompt in asked])
    generator = PolicyGenerator.of_actor(actor, tokenizer, batch_size)
    search = StepSearch(generator, scorer, tokenizer, eos_ids(tokenizer, actor), replace(config, stop=[separator]))
    kept = [[Beam()] for _ in prompts]
    count, step = beams * expansions, 0
    while any(beam.is_open for of_prompt in kept for beam in of_prompt):
        candidates = search.expand(asked, kept, count, step)
        kept = [best_beams(of_prompt, beams) for of_prompt in candidates]
        count, step = expansions, step + 1
    responses = [search.sample_of(prompt, of_prompt[0]).response for prompt, of_prompt in zip(asked, kept, strict=True)]
    scores = [[beam.score for beam in of_prompt] for of_prompt in kept]
    return [BestOf(*found, 0) for found in zip(prompts, responses, scores, strict=True)]


def best_beams(candidates: Sequence[Beam], count: int) -> list[Beam]:
    """So many of the highest scores, and of those that are equal the first; the same tokens once."""
    distinct: dict[tuple[int, ...], Beam] = {}
    for beam in candidates:
        distinct.setdefault(tuple(beam.ids), beam)
    return sorted(distinct.values(), key=lambda beam: -beam.score)[:count]


class StepSearch:
    """What a search samples and scores.

    Args:
        ends: tokens that end a response, which are no part of its text.
        sampling: stops at the separator; `max_new_tokens` is of the whole response.
    """

    def __init__(self, generator: Generator, scorer: Scorer, tokenizer, ends: list[int], sampling: GenerationConfig):
        self.generator, self.scorer, self.tokenizer = generator, scorer, tokenizer
        self.ends, self.sampling = ends, sampling

    def expand(
        self, prompts: Sequence[Prompt], kept: Sequence[Sequence[Beam]], count: int, step: int
    ) -> list[list[Beam]]:
        """For each prompt the beams that have ended, and `count` next ones of each that is open, scored."""
        begun = [
            (prompt, beam, i)
            for prompt, of_prompt in zip(prompts, kept, strict=True)
            for place, beam in enumerate(of_prompt)
            if beam.is_open
            for i in range(place * count, (place + 1) * count)
        ]
        longest = self.sampling.max_new_tokens
        requests = [
            Request([*prompt.input_ids, *beam.ids], [*prompt.seed, step, i], longest - len(beam.ids))
            for prompt, beam, i in begun
        ]
        longer = []
        for (prompt, beam, _), completion in zip(begun, self.generator.generate(requests, self.sampling), strict=True):
            ids, reason = [*beam.ids, *completion.ids], completion.finish_reason
            is_full = reason == OPEN and len(ids) >= longest
            longer.append((prompt, Beam(ids, "length" if is_full else reason)))
        samples = [self.sample_of(prompt, beam) for prompt, beam in longer]
        self.scorer.score(samples)
        candidates = [[beam for beam in of_prompt if not beam.is_open] for of_prompt in kept]
        for (prompt, beam), sample in zip(longer, samples, strict=True):
            candidates[prompt.row].append(replace(beam, score=sample.total_reward))
        return candidates

    def sample_of(self, prompt: Prompt, beam: Beam) -> Sample:
        """A beam as rewards read it."""
        response = response_text(self.tokenizer, beam.ids, self.ends).strip()
        tokens = [*prompt.input_ids, *beam.ids]
        mask = [False] * len(prompt.input_ids) + [True] * len(beam.ids)
        return Sample(prompt.row, prompt.columns, prompt.text, response, tokens, mask, None, beam.finish_reason)
