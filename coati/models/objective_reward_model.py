"""The reward model of several objectives."""

from collections.abc import Sequence

from torch import Tensor

from coati.errors import UserError
from coati.models.classifier import at_last_token
from coati.models.objectives import stored_objectives
from coati.models.reward_model import RewardModel


class ObjectiveRewardModel(RewardModel):
    """Scores a whole sequence by several objectives, with an output of the head for each, read at its last real token.

    Their names lie in config.json as `objectives`, in the order of the outputs. The head has no bias, as a sequence
    classifier of transformers has none: the last token, EOS, has states that the level of scores is learned from.

    Args:
        objectives: of a new head. A head of one score that the folder may have is left then; without them it has
            objectives.
        **kwargs: as `BaseModel`.

    Raises:
        UserError: the folder has other objectives, or none are named and it has none.
    """

    def __init__(self, pretrained=None, config=None, *, objectives: Sequence[str] = (), **kwargs):
        self.objectives = list(objectives)
        super().__init__(pretrained, config, **kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, right_padded: bool = False) -> Tensor:
        """Scores, float32 `[batch, objectives]`; arguments as `RewardModel`."""
        if attention_mask is None:
            attention_mask = self._mask_from_padding(input_ids)
        return at_last_token(self.token_outputs(input_ids, attention_mask, right_padded), attention_mask)

    def _make_head(self, stored: dict[str, Tensor], source):
        names = stored_objectives(source) if stored else []
        if names and self.objectives not in ([], names):
            raise UserError(
                f"the reward model in {source} has the objectives {', '.join(names)}, not "
                f"{', '.join(self.objectives)}: name these, or start from a model without"
            )
        self.objectives = self.objectives or names
        if not self.objectives:
            raise UserError(
                f"{source} is no reward model of several objectives, as its config.json names none: train one with "
                "coati reward --objectives"
            )
        self._add_head(len(self.objectives), stored if names else {}, source)
        self.config.objectives = self.objectives
