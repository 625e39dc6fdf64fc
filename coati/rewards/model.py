"""A reward model that shares the policy's tokenizer: it reads the sampled ids, so nothing is tokenised twice."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ModelReward:
    """Scores with a `coati.models.RewardModel`.

    Args:
        forward_all: gives the rewards `[batch]` of each of several micro-batches, which are keywords of the model's
            forward (`Engine.forward_all`).
        split: from a mask `[batch, seq]` to the rows of each forward pass.
    """

    def __init__(
        self,
        forward_all: Callable[[Sequence[dict]], list[Tensor]],
        device: torch.device,
        split: Callable[[Tensor], list[list[int]]],
        name: str = "reward_model",
    ):
        self.forward_all, self.device, self.split, self.name = forward_all, device, split, name

    @torch.no_grad()
    def score(self, prompts, responses, *, input_ids: Tensor, attention_mask: Tensor, **columns) -> Tensor:
        """Rewards of whole sequences (prompt and response), `[batch]`."""
        parts, batches = self.split(attention_mask), []
        for rows in parts:
            used = attention_mask[rows].any(0).nonzero()
            columns = slice(int(used.min()), int(used.max()) + 1)
            batch = {"input_ids": input_ids[rows, columns], "attention_mask": attention_mask[rows, columns]}
            batches.append({name: x.to(self.device) for name, x in batch.items()})
        scores = torch.empty(len(input_ids), device=self.device)
        for rows, rewards in zip(parts, self.forward_all(batches), strict=True):
            scores[rows] = rewards.float()
        return scores
