"""Completions as the batch that an algorithm learns from."""

from collections.abc import Sequence

import torch

from coati.rollout import Completion, RolloutBatch
from coati.samples import Sample


def batch_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], pad_id: int, temperature: float = 1.0
) -> RolloutBatch:
    """One row per prompt."""
    samples = [
        Sample(
            row=row,
            columns={},
            prompt="",
            response="",
            tokens=[*prompt, *completion.ids],
            response_mask=[False] * len(prompt) + [True] * len(completion.ids),
            log_probs=[0.0] * len(prompt) + completion.log_probs,
            finish_reason=completion.finish_reason,
        )
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    return RolloutBatch.from_samples(samples, pad_id, temperature, torch.device("cpu"))


def response_ids(batch: RolloutBatch) -> list[list[int]]:
    """The sampled tokens of each row."""
    return [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
