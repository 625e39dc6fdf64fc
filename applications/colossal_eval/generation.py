"""Greedy answers by coati's rollout engine, for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from coati.rollout.config import GenerationConfig
from coati.rollout.engine import Prefilled, Request, RolloutEngine
from coati.rollout.generate import generate, stop_at
from coati.rollout.prompts import pad_left
from colossal_eval.forward import SHORTEST_PREFIX, Scorer, common_prefix


class SharedPrefixEngine(RolloutEngine):
    """A `RolloutEngine` that reads the common beginning of its prompts once.

    Args:
        scorer: lends keys and values of `prefix`, ids that every prompt begins with and goes on after.
    """

    def __init__(self, scorer: Scorer, prefix: np.ndarray, config: GenerationConfig, **settings):
        super().__init__(scorer.actor, config, **settings)
        self.scorer, self.prefix = scorer, prefix

    def prefill(self, rows: list) -> Iterator[list[Prefilled]]:
        """The model reads what comes after the beginning, a batch at a time and as late as possible."""
        start = len(self.prefix)
        while rows:
            count = 1
            while (
                count < min(len(rows), self.slots) and (count + 1) * (rows[count].length - start) <= self.prefill_tokens
            ):
                count += 1
            batch, rows = rows[:count], rows[count:]
            ids, mask = pad_left([list(row.request.prompt[start:]) for row in batch], 0, self.device)
            whole = torch.cat([mask.new_ones(count, start), mask], dim=1)
            cache = self.scorer.lend(self.prefix, count)
            positions = (whole.long().cumsum(1) - 1)[:, start:]
            logits = self.model.next_logits(ids, whole, positions, cache)
            _close_gaps(cache, whole.shape[1], mask)
            self.scorer.count(mask)
            yield [Prefilled(cache, i, logits, row) for i, row in enumerate(batch)]


def _close_gaps(cache, width: int, mask: torch.Tensor) -> None:
    """Moves each row's beginning to where its rest begins: what was beginning, padding, rest is padding, beginning,
    rest, as the engine expects it."""
    padding = (~mask).sum(1, keepdim=True)
    columns = torch.arange(width, device=mask.device).expand(len(mask), -1)
    rest = columns >= width - mask.sum(1, keepdim=True)
    source = torch.where(rest, columns, (columns - padding).clamp(min=0))[:, None, :, None]
    for layer in cache.layers:
        layer.keys, layer.values = (x.take_along_dim(source, dim=2) for x in (layer.keys, layer.values))


def answer(scorer: Scorer, tokenizer, prompts: list[np.ndarray], limit: tuple[int, tuple[str, ...]], ends: list[int]):
    """Greedy responses, lists of ids, up to `limit`: the most tokens, and texts that end a response.

    Args:
        ends: ids that end a response.
    """
    config = GenerationConfig(max_new_tokens=limit[0], temperature=0.0, stop=list(limit[1]))
    prefix = common_prefix([prompt[:-1] for prompt in prompts]) if scorer.sharing and len(prompts) > 1 else 0
    if prefix < SHORTEST_PREFIX:
        asked = [prompt.tolist() for prompt in prompts]
        rollout = generate(
            scorer.actor, asked, config, eos_ids=ends, pad_id=0, seeds=[0] * len(asked), tokenizer=tokenizer
        )
        responses = rollout.response_ids()
        scorer.usage.read += sum(map(len, asked))
    else:
        stop = stop_at(tokenizer, config.stop) if config.stop else None
        engine = SharedPrefixEngine(scorer, prompts[0][:prefix], config, eos_ids=ends, stop=stop, slots=len(prompts))
        responses = [made.ids for made in engine.generate([Request(prompt.tolist()) for prompt in prompts])]
    scorer.usage.read += sum(map(len, responses))
    return responses
