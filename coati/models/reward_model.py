"""The reward model."""

import torch
from torch import Tensor

from coati.models.base import ValueHeadModel


class RewardModel(ValueHeadModel):
    """Scores a whole sequence by the head's output at its last real token.

    The head has no bias: pairs only tell differences, so a bias would learn nothing but rounding errors.
    """

    head_bias = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards, float32 `[batch]`.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding (either side). Without it, padding is told by the config's
                pad token, unless that is also EOS (a real EOS could not be told from padding then): every token
                counts as real.
        """
        if attention_mask is None:
            attention_mask = self._mask_from_padding(input_ids)
        values = self.token_values(input_ids, attention_mask)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.long() * positions).argmax(dim=1)
        return values.gather(1, last[:, None]).squeeze(1)

    def _mask_from_padding(self, input_ids: Tensor) -> Tensor:
        pad, eos = getattr(self.config, "pad_token_id", None), getattr(self.config, "eos_token_id", None)
        if pad is None or pad == eos or (isinstance(eos, list) and pad in eos):
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids != pad
