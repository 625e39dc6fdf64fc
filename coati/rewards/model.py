"""A reward model that shares the policy's tokenizer: it reads the sampled ids, so nothing is tokenised twice."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ModelReward:
    """Scores with a `coati.models.RewardModel`.

    Args:
        forward_all: gives the rewards `[batch]` of each of several micro-batches, which are keywords of the model's
            forward (`Engine.forward_all`).
        micro_batch_size: rows a forward pass.
    """

    def __init__(
        self,
        forward_all: Callable[[Sequence[dict]], list[Tensor]],
        device: torch.device,
        micro_batch_size: int,
        name: str = "reward_model",
    ):
        self.forward_all, self.device, self.micro_batch_size, self.name = forward_all, device, micro_batch_size, name

    @torch.no_grad()
    def score(self, prompts, responses, *, input_ids: Tensor, attention_mask: Tensor, **columns) -> Tensor:
        """Rewards of whole sequences (prompt and response), `[batch]`."""
        size = self.micro_batch_size
        rows = zip(input_ids.to(self.device).split(size), attention_mask.to(self.device).split(size), strict=True)
        batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in rows]
        return torch.cat([rewards.float() for rewards in self.forward_all(batches)])
