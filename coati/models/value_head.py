"""The value head that TRL's checkpoints hold: dropout, then one linear output."""

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.base import hidden_size


class ValueHead(nn.Module):
    """One value a token, from the last hidden states. Its weights are float32 whatever the model's dtype.

    Args:
        config: the model's config, which gives the width; its `summary_dropout_prob`, if any, beats the keyword.
        v_head_init_strategy: None for `nn.Linear`'s own draw, "normal" for N(0, v_head_initializer_range) and bias 0.

    Raises:
        UserError: another strategy, or a config that doesn't say how wide hidden states are.
    """

    def __init__(
        self,
        config,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        super().__init__()
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.summary = nn.Linear(hidden_size(config), 1, dtype=torch.float32)
        self.init_weights(v_head_init_strategy, v_head_initializer_range)

    def init_weights(self, strategy: str | None, initializer_range: float = 0.2):
        """Draws the weights anew by "normal"; None leaves them as they are."""
        if strategy not in (None, "normal"):
            raise UserError(f"v_head_init_strategy is {strategy!r}: give None or 'normal'")
        if strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, hidden]` of any float dtype, on any device, to `[batch, seq, 1]` in the head's own."""
        return self.summary(self.dropout(hidden).to(self.summary.weight))
