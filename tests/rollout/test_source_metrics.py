"""What is logged about samples: correlations and means over the samples of all ranks."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coati.rollout.source import means_where_told, sample_metrics
from coati.samples import Sample
from tests.oracles.correlation import correlation


class Ranks:
    """Stands for all ranks on one of them: `others` is what the others hold."""

    def __init__(self, *others):
        self.others = others

    def sum_metrics(self, partial):
        total: Counter[str] = Counter()
        for rank in (*partial, *self.others):
            total.update(rank)
        return dict(total)

    def gather(self, found):
        return [found, *self.others]


class Recorder:
    """Keeps the sums that a rank contributes."""

    def sum_metrics(self, partial):
        [self.sums] = partial
        return dict(self.sums)


def sample(score: float, length: int) -> Sample:
    mask = [False] + [True] * length
    return Sample(0, {}, "", "", [7] * len(mask), mask, None, "eos", rewards={"r": score}, score=score)


def metrics_of(pairs, others=()):
    recorders = [Recorder() for _ in others]
    for recorder, rank in zip(recorders, others, strict=True):
        sample_metrics([sample(*pair) for pair in rank], recorder)
    return sample_metrics([sample(*pair) for pair in pairs], Ranks(*(r.sums for r in recorders)))


scores = st.integers(-40, 40).map(lambda n: n / 8)
of_rank = st.lists(st.tuples(scores, st.integers(1, 300)), min_size=1, max_size=8)


@given(of_rank, of_rank)
def test_the_correlation_with_length_is_that_of_a_slow_loop_over_all_ranks(first, second):
    xs, ys = zip(*first, *second, strict=True)
    assume(len(set(xs)) > 1 and len(set(ys)) > 1)
    found = metrics_of(first, [second])["reward/length_correlation"]
    assert found == pytest.approx(correlation(xs, ys), abs=1e-9)


@given(scores, st.integers(1, 300), st.integers(2, 9))
def test_there_is_none_where_one_of_both_does_not_vary(score, length, count):
    assert "reward/length_correlation" not in metrics_of([(score + i, length) for i in range(count)])
    assert "reward/length_correlation" not in metrics_of([(score / 3, length + i) for i in range(count)])


def test_there_is_none_without_rewards():
    bare = [sample(1.0, 3), sample(2.0, 4)]
    for each in bare:
        each.rewards = {}
    assert "reward/length_correlation" not in sample_metrics(bare, Ranks())


def test_longer_is_better_or_worse():
    assert metrics_of([(1.0, 10), (2.0, 20), (3.0, 30)])["reward/length_correlation"] == pytest.approx(1.0)
    assert metrics_of([(3.0, 10), (2.0, 20), (1.0, 30)])["reward/length_correlation"] == pytest.approx(-1.0)
    assert metrics_of([(1.0, 10), (0.0, 20), (1.0, 30)])["reward/length_correlation"] == pytest.approx(0.0)


def test_numbers_beside_rewards_are_averaged_over_the_samples_that_have_them():
    """A rank may have none of a name: all samples of it have failed."""
    elsewhere = ({"rubric/red": 1.0}, {"rubric/red": 2})
    found = means_where_told([{"rubric/red": 1.0, "rubric/blue": 0.5}, {}], Ranks(elsewhere, ({}, {})))
    assert found == {"rubric/red": pytest.approx(2 / 3), "rubric/blue": 0.5}
