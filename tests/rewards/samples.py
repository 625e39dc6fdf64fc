"""Samples for rewards to score."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from coati.rewards import Reward, Scorer
from coati.rewards.config import AnyReward
from coati.samples import Sample


def samples(prompts: Sequence[str], responses: Sequence[str], finish_reason: str = "eos", **columns) -> list[Sample]:
    """One for each response; a column is a list with a value for each."""
    return [
        Sample(
            row=i,
            columns={name: values[i] for name, values in columns.items()},
            prompt=prompt,
            response=response,
            tokens=[3, 4],
            response_mask=[False, True],
            log_probs=[0.0, -1.0],
            finish_reason=finish_reason,
        )
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def scored(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str], **columns) -> list[Sample]:
    """Samples after a scorer went over them."""
    made = samples(prompts, responses, **columns)
    scorer.score(made)
    return made


def totals(scorer: Scorer, responses: Sequence[str], **columns) -> list[float]:
    """What responses to empty prompts earn."""
    return [sample.total_reward for sample in scored(scorer, [""] * len(responses), responses, **columns)]


def of_reward(name: str, found: Sequence[Sample]) -> list[float | None]:
    """What one reward gave."""
    return [sample.rewards[name] for sample in found]


class Constant(Reward):
    """Gives every response the same."""

    def __init__(self, value: float, name: str = "constant"):
        self.value, self.name = value, name

    def score(self, samples):
        return [self.value] * len(samples)


def rewards_of(*entries):
    """Rewards of a run's settings."""
    return TypeAdapter(list[AnyReward]).validate_python([{"type": e} if isinstance(e, str) else e for e in entries])


def make_verifier(name: str, **settings):
    """The reward of a type."""
    [entry] = rewards_of({"type": name} | settings)
    return entry.make("cpu")
