"""Greedy responses by coati's rollout engine."""

from __future__ import annotations

import numpy as np

from coati.config.generation import GenerationConfig
from coati.rollout import Request, RolloutEngine, complete, has_kv_cache
from coati.rollout.generate import stop_at
from colossal_eval.run.log_probs import LogProbScorer


def respond(
    scorer: LogProbScorer, tokenizer, prompts: list[np.ndarray], max_new_tokens: int, stop: list[str], ends: list[int]
) -> list[list[int]]:
    """One response per prompt, as ids; what goes through the model is added to the scorer's usage.

    Args:
        stop: texts that end a response.
        ends: ids that end a response.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=0.0, stop=stop)
    requests = [Request(prompt.tolist()) for prompt in prompts]
    if has_kv_cache(scorer.actor):
        stopped = stop_at(tokenizer, stop) if stop else None
        engine = RolloutEngine(scorer.actor, config, eos_ids=ends, stop=stopped, slots=len(requests))
        completions = engine.generate(requests)
        scorer.usage.read += engine.reader.prompt_tokens
        scorer.usage.padding += engine.reader.padding_tokens
    else:
        completions = complete(scorer.actor, requests, config, eos_ids=ends, tokenizer=tokenizer)
        scorer.usage.read += sum(map(len, prompts))
    responses = [completion.ids for completion in completions]
    scorer.usage.read += sum(map(len, responses))
    return responses
