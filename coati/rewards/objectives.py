"""A reward model of several objectives, weighted."""

import math
from collections.abc import Mapping, Sequence

from coati.errors import UserError
from coati.rewards.base import Outcome, Reward
from coati.rewards.model import ModelReward
from coati.samples import Sample


class ObjectivesReward(Reward):
    """The weighted sum of an `ObjectiveRewardModel`'s scores. The mean of each objective, weighted or not, is logged as
    `reward/NAME/OBJECTIVE`.

    Args:
        model: gives the scores `[batch, objectives]`.
        weights: by objective, in the order of the outputs.
    """

    has_details = True

    def __init__(self, model: ModelReward, weights: Mapping[str, float]):
        self.model, self.weights, self.name = model, dict(weights), model.name

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [outcome.score for outcome in self.outcomes(samples)]

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Raises a UserError for a score that is not finite; it names the objective and the response."""
        outcomes = []
        for sample, scores in zip(samples, self.model.score(samples).tolist(), strict=True):
            by_objective = dict(zip(self.weights, scores, strict=True))
            for name, score in by_objective.items():
                if not math.isfinite(score):
                    raise UserError(
                        f"the objective {name}, of the reward {self.name}, is {score} for {sample.response[:80]!r}"
                    )
            total = sum(self.weights[name] * score for name, score in by_objective.items())
            outcomes.append(Outcome(total, details=by_objective))
        return outcomes
