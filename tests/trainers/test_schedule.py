"""Learning rates against the oracle, step by step."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.trainers.schedule import learning_rate_at
from tests.oracles import schedule as oracle

SCHEDULES = ("constant", "linear", "cosine")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.sampled_from(SCHEDULES),
    st.sampled_from(["0", "0.1", "0.25", "0.5", "1"]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_step_equals_the_oracle(total, schedule, warmup, final_rate):
    for step in range(total):
        rate = learning_rate_at(step, total, 3e-4, schedule, float(warmup), final_rate)
        expected = oracle.learning_rate_at(step, total, 3e-4, schedule, warmup, final_rate)
        assert rate == pytest.approx(expected, rel=1e-9)
        assert 0 <= rate <= 3e-4 * (1 + 1e-12)


def test_warm_up_lasts_the_share_of_steps_that_was_asked_for():
    for percent in range(1, 100):
        warmup = f"0.{percent:02d}"
        peak_reached = next(s for s in range(100) if learning_rate_at(s, 100, 1.0, "linear", float(warmup), 0.0) == 1.0)
        assert peak_reached == percent - 1, f"warmup {warmup} of 100 steps"


def test_warm_up_starts_above_zero_and_reaches_the_peak():
    rates = [learning_rate_at(step, 10, 1.0, "constant", 0.4, 0.1) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_fall_toward_the_final_rate_and_never_below(schedule):
    rates = [learning_rate_at(step, 1000, 1.0, schedule, 0.0, 0.1) for step in range(1001)]
    assert rates[0] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "step",
    [
        5,
        pytest.param(0),
    ],
)
def test_an_unknown_schedule_is_named_from_the_first_step_on(step):
    with pytest.raises(ValueError, match=r"'cosin'.*constant, linear or cosine"):
        learning_rate_at(step, 10, 1.0, "cosin", 0.5, 0.1)
