"""An ensemble of rewards: the mean of its members, less where they differ."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from coati.rewards import Reward, Scorer, ScoringConfig, load_rewards
from coati.rewards.ensemble import EnsembleReward
from tests.rewards.samples import Constant, of_reward, rewards_of, scored

SCORES = st.floats(-100, 100)


class Given(Reward):
    """Gives these scores, one after the other."""

    def __init__(self, scores: list[float]):
        self.scores = scores

    def score(self, samples):
        return self.scores


def pessimistic(scores: list[float], pessimism: float) -> float:
    """Of one sample: a loop."""
    mean = sum(scores) / len(scores)
    variance = 0.0
    for score in scores:
        variance += (score - mean) ** 2 / len(scores)
    return mean - pessimism * math.sqrt(variance)


@given(
    st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1)), st.floats(0, 3)
)
def test_the_score_is_the_mean_less_standard_deviations(by_sample, pessimism):
    members = {f"model_{i}": Given([row[i] for row in by_sample]) for i in range(len(by_sample[0]))}
    found = scored(Scorer([(EnsembleReward(members, pessimism), 1.0)]), [""] * len(by_sample), ["x"] * len(by_sample))
    for sample, row in zip(found, by_sample, strict=True):
        assert sample.score == pytest.approx(pessimistic(row, pessimism), rel=1e-9, abs=1e-9)
        deviation = pessimistic(row, 0.0) - pessimistic(row, 1.0)
        assert [sample.details[f"ensemble/model_{i}"] for i in range(len(row))] == row
        assert sample.details["ensemble/std"] == pytest.approx(deviation, abs=1e-9)


def test_members_are_the_models_of_the_settings():
    loaded = []

    def load(path):
        loaded.append(path)
        return Constant(float(len(path)))

    [entry] = rewards_of({"type": "ensemble", "paths": ["a", "bcd"], "pessimism": 0.5})
    scorer = load_rewards([entry], ScoringConfig(reward_workers=0), load)
    assert entry.model_paths == loaded == ["a", "bcd"] and scorer.has_details
    assert of_reward("ensemble", scored(scorer, ["", ""], ["x", "y"])) == [2.0 - 0.5 * 1.0] * 2


@pytest.mark.parametrize(
    ("paths", "says"),
    [(["a"], "two reward models at least"), (["a", "b", "a"], "has a twice: name each reward model once")],
)
def test_what_is_no_ensemble_ends_before_anything_is_generated(paths, says):
    with pytest.raises(UserError, match=says):
        load_rewards(rewards_of({"type": "ensemble", "paths": paths}), ScoringConfig(), lambda path: Constant(1.0))


def test_a_score_that_is_not_finite_names_its_model_and_the_response():
    ensemble = EnsembleReward({"model_1": Constant(1.0), "model_2": Constant(math.nan)})
    with pytest.raises(UserError, match=re.escape("model_2, of the reward ensemble, gave nan for 'so it is'")):
        scored(Scorer([(ensemble, 1.0)]), [""], ["so it is"])
