"""Several reward models as one, which trusts a score less the more they differ."""

from collections.abc import Mapping, Sequence

import numpy as np

from coati.errors import UserError
from coati.rewards.base import Outcome, Reward
from coati.samples import Sample


class EnsembleReward(Reward):
    """The mean of several rewards' scores, less `pessimism` times their standard deviation.

    A policy that optimizes one reward model finds responses which that model alone overrates (Gao et al., 2210.10760);
    where the members of an ensemble differ, such a response earns less. Coste et al. (2310.02743, section 3.2) take off
    the variance instead, whose unit is another one than the scores'.

    Args:
        members: by name, each of which is logged as `reward/NAME/MEMBER`, beside `reward/NAME/std`.

    Raises:
        UserError: fewer than two members.
    """

    name = "ensemble"
    has_details = True

    def __init__(self, members: Mapping[str, Reward], pessimism: float = 1.0):
        if len(members) < 2:
            raise UserError("an ensemble has two reward models at least: give more paths, or a reward of type model")
        self.members, self.pessimism = dict(members), pessimism

    def check(self, rows):
        for member in self.members.values():
            member.check(rows)

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [outcome.score for outcome in self.outcomes(samples)]

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Raises a UserError for a score that is not finite; it names the member and the response."""
        scores = np.array([[float(score) for score in member.score(samples)] for member in self.members.values()])
        for name, of_member in zip(self.members, scores, strict=True):
            for sample, score in zip(samples, of_member, strict=True):
                if not np.isfinite(score):
                    raise UserError(f"{name}, of the reward {self.name}, gave {score} for {sample.response[:80]!r}")
        means, deviations = scores.mean(0), scores.std(0)
        pessimistic = means - self.pessimism * deviations
        return [
            Outcome(float(score), details=dict(zip(self.members, map(float, row), strict=True)) | {"std": float(std)})
            for score, row, std in zip(pessimistic, scores.T, deviations, strict=True)
        ]
