"""The value function."""

from torch import Tensor

from coati.models.base import ValueHeadModel


class Critic(ValueHeadModel):
    """Estimates the return from every position on."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, right_padded: bool = False) -> Tensor:
        """Values, float32 `[batch, seq]`: entry `t` has seen tokens up to and including `t`.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding (either side); values there mean nothing.
            right_padded: padding stands on the right only, see `run`.
        """
        return self.token_values(input_ids, attention_mask, right_padded)
