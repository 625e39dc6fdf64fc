"""What the environment of an episode gave for it."""

from collections.abc import Sequence

from coati.rewards.base import Reward
from coati.samples import Sample


class EnvironmentReward(Reward):
    """The sum over an episode's turns.

    Args:
        turn_rewards: each turn's falls on its own last token instead.
    """

    name = "environment"

    def __init__(self, turn_rewards: bool = False):
        self.on_tokens = turn_rewards

    def score(self, samples: Sequence[Sample]) -> list[float] | list[list[float]]:
        if self.on_tokens:
            return [on_last_tokens(sample) for sample in samples]
        return [float(sum(turn.reward for turn in sample.turns)) for sample in samples]


def on_last_tokens(sample: Sample) -> list[float]:
    """Per token, 0 but for the last one of each turn."""
    rewards = [0.0] * len(sample.tokens)
    for turn in sample.turns:
        rewards[turn.end - 1] = turn.reward
    return rewards
