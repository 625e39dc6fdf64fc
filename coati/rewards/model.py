"""A reward model that shares the policy's tokenizer: it reads the sampled ids, so nothing is tokenised twice."""

import torch
from torch import Tensor


class ModelReward:
    """Scores with a `coati.models.RewardModel`.

    Args:
        model: called as `model(input_ids, attention_mask)`; gives `[batch]`.
        micro_batch_size: rows a forward pass.
    """

    def __init__(self, model, device: torch.device, micro_batch_size: int, name: str = "reward_model"):
        self.model, self.device, self.micro_batch_size, self.name = model, device, micro_batch_size, name

    @torch.no_grad()
    def score(self, prompts, responses, *, input_ids: Tensor, attention_mask: Tensor, **columns) -> Tensor:
        """Rewards of whole sequences (prompt and response), `[batch]`."""
        rows = zip(
            input_ids.to(self.device).split(self.micro_batch_size),
            attention_mask.to(self.device).split(self.micro_batch_size),
            strict=True,
        )
        return torch.cat([self.model(ids, mask).float() for ids, mask in rows])
