"""A reward model that shares the policy's tokenizer: it reads the sampled ids, so nothing is tokenised twice."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class ModelReward:
    """Scores with a `coati.models.RewardModel`.

    Args:
        open_model: gives the model with all its weights (`Engine.full`, or `lambda: nullcontext(model)`); the model is
            called as `model(input_ids, attention_mask)` and gives `[batch]`.
        micro_batch_size: rows a forward pass.
    """

    def __init__(
        self,
        open_model: Callable[[], AbstractContextManager[nn.Module]],
        device: torch.device,
        micro_batch_size: int,
        name: str = "reward_model",
    ):
        self.open_model, self.device, self.micro_batch_size, self.name = open_model, device, micro_batch_size, name

    @torch.no_grad()
    def score(self, prompts, responses, *, input_ids: Tensor, attention_mask: Tensor, **columns) -> Tensor:
        """Rewards of whole sequences (prompt and response), `[batch]`."""
        size = self.micro_batch_size
        rows = zip(input_ids.to(self.device).split(size), attention_mask.to(self.device).split(size), strict=True)
        with self.open_model() as model:
            return torch.cat([model(ids, mask).float() for ids, mask in rows])
