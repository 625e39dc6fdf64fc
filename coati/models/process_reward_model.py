"""The process reward model."""

from pathlib import Path

from torch import Tensor

from coati.errors import UserError
from coati.models.base import ValueHeadModel


class ProcessRewardModel(ValueHeadModel):
    """Says of every token whether the step that ends with it is right: the head's output is a logit.

    What separates steps lies in config.json as `step_separator`, so that responses are split as the training data was.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, right_padded: bool = False) -> Tensor:
        """Logits, float32 `[batch, seq]`: entry `t` has seen tokens up to and including `t`.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding (either side); logits there mean nothing.
            right_padded: padding stands on the right only, see `run`.
        """
        return self.token_values(input_ids, attention_mask, right_padded)


def stored_separator(source: str | Path) -> str:
    """What separates steps, by the config.json of a process reward model.

    Raises:
        UserError: it is no process reward model.
    """
    from transformers import AutoConfig

    try:
        separator = getattr(AutoConfig.from_pretrained(str(source)), "step_separator", None)
    except (OSError, ValueError) as error:
        raise UserError(f"can't load a model from {source}: {str(error).splitlines()[0]}") from error
    if not separator:
        raise UserError(
            f"{source} is no process reward model, as its config.json has no step_separator: train one with coati prm, "
            "or give it as a reward of type model"
        )
    return separator
