"""Greedy answers by coati's rollout engine."""

from __future__ import annotations

import numpy as np

from coati.config.generation import GenerationConfig
from coati.rollout.engine import RolloutEngine
from coati.rollout.generate import generate, has_keys_and_values, stop_at
from coati.rollout.generator import Request
from colossal_eval.run.log_probs import Scorer


def answer(scorer: Scorer, tokenizer, prompts: list[np.ndarray], limit: tuple[int, tuple[str, ...]], ends: list[int]):
    """Greedy responses, lists of ids, up to `limit`: the most tokens, and texts that end a response.

    Args:
        ends: ids that end a response.
    """
    config = GenerationConfig(max_new_tokens=limit[0], temperature=0.0, stop=list(limit[1]))
    asked = [prompt.tolist() for prompt in prompts]
    if has_keys_and_values(scorer.actor):
        stop = stop_at(tokenizer, config.stop) if config.stop else None
        engine = RolloutEngine(scorer.actor, config, eos_ids=ends, stop=stop, slots=len(prompts))
        responses = [made.ids for made in engine.generate([Request(prompt) for prompt in asked])]
        scorer.usage.read += engine.prompt_tokens
        scorer.usage.padding += engine.padding_tokens
    else:
        rollout = generate(scorer.actor, asked, config, eos_ids=ends, pad_id=0, tokenizer=tokenizer)
        responses = rollout.response_ids()
        scorer.usage.read += sum(map(len, asked))
    scorer.usage.read += sum(map(len, responses))
    return responses
