"""Best-of-n: of n responses, the one of highest reward (Stiennon et al., 2009.01325, section 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rewards import Reward, Scorer
from coati.rollout.generate import PolicyGenerator
from coati.rollout.prompts import eos_ids
from coati.rollout.sampler import ResponseSampler, prompts_of_texts
from coati.rollout.source import ScoredGeneration


@dataclass(frozen=True)
class BestOf:
    """The response of highest score to a prompt, and the scores of all n (`scores[best]` is its own)."""

    prompt: str
    response: str
    scores: list[float]
    best: int


def best_of_n_kl(n: int) -> float:
    """KL of the best of n responses from the policy, nats per response: log n - (n - 1) / n (2009.01325, appendix G.3).

    Exact when no two responses have the same score, an upper bound otherwise (Beirami et al., 2401.01879).

    Examples:
        >>> round(best_of_n_kl(16), 3)
        1.835
    """
    return math.log(n) - (n - 1) / n


def best_of_n(
    actor,
    reward: Reward,
    prompts: Sequence[str],
    n: int,
    *,
    tokenizer,
    config: GenerationConfig | None = None,
    columns: Sequence[dict[str, Any]] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[BestOf]:
    """Samples n responses to each prompt and keeps the best.

    Args:
        actor: an `Actor`.
        prompts: as the model reads them (a chat template is already applied).
        tokenizer: the actor's.
        config: how responses are sampled; at temperature 0 all n would be the same.
        columns: further fields that the reward reads, per prompt.
        seed: of the responses.
        batch_size: responses generated at a time.

    Raises:
        UserError: n < 1, greedy decoding, an empty prompt, or scores that are not one finite number per response.
    """
    config = config or GenerationConfig()
    if n < 1:
        raise UserError(f"best of {n}: n must be at least 1")
    if n > 1 and (config.temperature == 0 or config.num_beams > 1):
        raise UserError("best-of-n needs responses that differ: temperature above 0 and num_beams 1")
    asked = prompts_of_texts(prompts, tokenizer, columns, seed)
    scorer = Scorer([(reward, 1.0)])
    scorer.check([prompt.columns for prompt in asked])
    generator = PolicyGenerator.of_actor(actor, tokenizer, batch_size)
    generation = ScoredGeneration(ResponseSampler(generator, tokenizer, eos_ids(tokenizer, actor)), scorer)
    requests = [replace(prompt, seed=[*prompt.seed, i]) for prompt in asked for i in range(n)]
    samples = generation.sample(requests, config).samples
    chosen = []
    for row, prompt in enumerate(prompts):
        of_this = samples[row * n : (row + 1) * n]
        scores = [sample.total_reward for sample in of_this]
        best = scores.index(max(scores))
        chosen.append(BestOf(prompt, of_this[best].response, scores, best))
    return chosen
