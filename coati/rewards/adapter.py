"""A reward adapter: LoRA weights and a head on the policy's own base model, which needs no second model."""

import torch
from torch import nn

from coati.models.classifier import at_last_token
from coati.rewards.base import Reward
from coati.rewards.model import pad_right


class AdapterReward(Reward):
    """Scores with a model that has `compute_reward_score(input_ids, attention_mask)`, which gives per-token scores
    `[batch, seq]` or `[batch, seq, 1]`: an `AutoModelForCausalLMWithValueHead` with a reward adapter.

    Args:
        micro_batch_size: rows of a forward pass.
    """

    def __init__(self, model: nn.Module, micro_batch_size: int = 8, name: str = "reward_adapter"):
        self.model, self.micro_batch_size, self.name = model, micro_batch_size, name

    @torch.no_grad()
    def score(self, samples):
        """The score at the last token of each sample, float32 `[batch]`."""
        device, scores = next(self.model.parameters()).device, []
        for start in range(0, len(samples), self.micro_batch_size):
            ids, mask = pad_right(samples[start : start + self.micro_batch_size], 0, device)
            per_token = self.model.compute_reward_score(ids, attention_mask=mask)
            scores.append(at_last_token(per_token.reshape(mask.shape).float(), mask))
        return torch.cat(scores)
