"""A reward adapter: LoRA weights and a head on the policy's own base model, which needs no second model."""

import torch
from torch import Tensor, nn

from coati.models.classifier import at_last_token


class AdapterReward:
    """Scores with a model that has `compute_reward_score(input_ids, attention_mask)`, which gives per-token scores
    `[batch, seq]` or `[batch, seq, 1]`: an `AutoModelForCausalLMWithValueHead` with a reward adapter.

    Args:
        micro_batch_size: rows a forward pass.
    """

    def __init__(self, model: nn.Module, micro_batch_size: int = 8, name: str = "reward_adapter"):
        self.model, self.micro_batch_size, self.name = model, micro_batch_size, name

    @torch.no_grad()
    def score(self, prompts, responses, *, input_ids: Tensor, attention_mask: Tensor, **columns) -> Tensor:
        """The score at the last real token of each sampled sequence, float32 `[batch]`."""
        device, size, scores = next(self.model.parameters()).device, self.micro_batch_size, []
        for ids, mask in zip(input_ids.to(device).split(size), attention_mask.to(device).split(size), strict=True):
            per_token = self.model.compute_reward_score(ids, attention_mask=mask)
            scores.append(at_last_token(per_token.reshape(mask.shape).float(), mask))
        return torch.cat(scores)
