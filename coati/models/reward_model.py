"""The reward model."""

import torch
from torch import Tensor

from coati.errors import UserError
from coati.models.adapters import merged
from coati.models.base import ValueHeadModel, cast
from coati.models.classifier import at_last_token, save_classifier


class RewardModel(ValueHeadModel):
    """Scores a whole sequence by the head's output at its last real token.

    The head has no bias: pairs only determine differences, so a bias would learn nothing but rounding errors.
    """

    head_bias = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        right_padded: bool = False,
        shared_prefix_group: int = 1,
    ) -> Tensor:
        """Rewards, float32 `[batch]`.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding (either side). Without it, padding is recognized by the
                config's pad token, unless that is also EOS (a real EOS would be indistinguishable from padding): then
                every token counts as real.
            right_padded, shared_prefix_group: see `lay_out`.
        """
        if attention_mask is None:
            attention_mask = self._mask_from_padding(input_ids)
        outputs = self.token_outputs(input_ids, attention_mask, right_padded, shared_prefix_group)
        return at_last_token(outputs.squeeze(-1), attention_mask)

    def _mask_from_padding(self, input_ids: Tensor) -> Tensor:
        pad, eos = getattr(self.config, "pad_token_id", None), getattr(self.config, "eos_token_id", None)
        if pad is None or pad == eos or (isinstance(eos, list) and pad in eos):
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids != pad

    def save_pretrained(
        self,
        folder,
        state_dict=None,
        merge: bool = False,
        dtype: torch.dtype | None = None,
        as_sequence_classifier: bool = False,
        pad_token_id: int | None = None,
    ):
        """As `ValueHeadModel.save_pretrained`, or a folder that plain `AutoModelForSequenceClassification` opens.

        Args:
            as_sequence_classifier: one file with the head as `score`; adapters must be merged.
            pad_token_id: written to such a folder's config.json if the config has none: transformers scores batches
                above one only with it. It takes every such token for padding, EOS included if they are the same.

        Raises:
            UserError: transformers has no classifier of this architecture with one linear head at the last token.
        """
        if not as_sequence_classifier:
            return super().save_pretrained(folder, state_dict, merge, dtype)
        if self.has_adapter and not merge:
            raise UserError("a sequence classifier is saved without adapters: merge them (merge=True)")
        state = self.state_dict() if state_dict is None else state_dict
        trunk = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        if self.has_adapter:
            trunk = merged(self.model, trunk).state_dict()
        trunk = trunk if dtype is None else cast(trunk, dtype)
        save_classifier(folder, self.config, trunk, state["value_head.weight"], pad_token_id)
