"""What PPO learns from."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Experience:
    """Responses with everything known about them, one row a response, padding on the right.

    Per-token tensors are `[batch, seq]`, aligned with the tokens and meaningless outside `response_mask`.

    Attributes:
        input_ids: int64; attention_mask, response_mask: bool.
        log_probs: float32, of the policy that sampled, computed by the trainer's own forward pass.
        reference_log_probs: float32, of the reference model.
        values: float32, the critic's estimate before each token.
        rewards: float32, after KL penalty and shaping.
        advantages, returns: float32.
        scores: float32 `[batch]`, the reward of each response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: list[int] | Tensor) -> "Experience":
        """Some rows, cut to the longest of them."""
        index = torch.as_tensor(index, device=self.input_ids.device)
        seq = int(self.attention_mask[index].sum(1).max())
        cut = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        return replace(self, **{name: x[:, :seq] if x.ndim == 2 else x for name, x in cut.items()})
