"""The stream of batches: complete, fresh each epoch, addressable, weighted, bucketed, shared out evenly."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.data import BatchSampler, shard_batch
from coati.errors import UserError


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, rows)


def epoch_rows(sampler: BatchSampler, epoch: int) -> list[int]:
    """The rows of an epoch, where the batch size divides it."""
    start = epoch * sampler.batches_per_epoch
    return [row for k in range(start, start + sampler.batches_per_epoch) for row in sampler.batch(k)]


def test_every_row_comes_once_an_epoch_in_a_new_order():
    """PITFALL 25: the same shuffle every epoch, and later epochs that are short."""
    sampler = BatchSampler(96, 8, seed=1)
    epochs = [epoch_rows(sampler, e) for e in range(5)]
    assert all(sorted(rows) == list(range(96)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 5


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 60), batch_size=st.integers(1, 70), shuffle=st.booleans())
def test_no_row_is_lost_and_no_batch_is_short(rows, batch_size, shuffle):
    """After any number of batches up to whole epochs, rows have come equally often."""
    sampler = BatchSampler(rows, batch_size, 3, shuffle=shuffle)
    batches = [sampler.batch(k) for k in range(rows)]  # rows * batch_size positions: batch_size whole epochs
    assert all(len(batch) == batch_size for batch in batches)
    assert Counter(row for batch in batches for row in batch) == {row: batch_size for row in range(rows)}


def test_random_access_equals_sequential_access():
    """PITFALL 25: resuming at batch k needs only k."""
    first = BatchSampler(53, 8, seed=1)
    sequential = [first.batch(k) for k in range(40)]
    for k in np.random.default_rng(0).permutation(40).tolist():
        assert BatchSampler(53, 8, seed=1).batch(k) == sequential[k]
        assert first.batch(k) == sequential[k]


def test_seed_changes_the_order():
    assert BatchSampler(50, 5, seed=1).batch(0) != BatchSampler(50, 5, seed=2).batch(0)


def test_epoch_counts_rows():
    sampler = BatchSampler(10, 4, seed=1)
    assert [sampler.epoch(k) for k in (0, 5, 6)] == [0.0, 2.0, 2.4]
    assert sampler.batches_per_epoch == 3


def test_without_shuffle_rows_come_in_order():
    sampler = BatchSampler(5, 2, seed=1, shuffle=False)
    assert [sampler.batch(k) for k in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_weights_are_respected():
    weights = [2.0] * 10 + [1.0] * 10 + [0.5] * 10 + [0.0] * 10
    sampler = BatchSampler(40, 5, seed=1, weights_per_row=weights)
    assert sampler.epoch_size == 35
    halves = []
    for epoch in range(4):
        counts = Counter(epoch_rows(sampler, epoch))
        assert all(counts[row] == 2 for row in range(10))
        assert all(counts[row] == 1 for row in range(10, 20))
        assert all(counts[row] == 0 for row in range(30, 40))
        halves.append({row for row in range(20, 30) if counts[row]})
    assert all(len(half) == 5 for half in halves)
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(20, 30))
    assert halves[0] not in (halves[2], halves[3])


def test_length_does_not_say_which_rows_meet_in_a_batch():
    """Else the few tokens of a batch of short responses count for more than the many of another (`BatchSampler`)."""
    lengths = lengths_of(4000)
    sampler = BatchSampler(len(lengths), 8, seed=1)
    means = [lengths[sampler.batch(k)].mean() for k in range(500)]
    assert np.std(means) == pytest.approx(lengths.std() / 8**0.5, rel=0.15)


def test_micro_batches_of_like_length_need_little_padding():
    """PITFALL 15."""
    lengths = lengths_of(400)

    def padded(rows) -> int:
        return sum(len(micro) * max(lengths[row] for row in micro) for micro in shard_batch(rows, lengths, 0, 1, 8))

    one_batch = sum(8 * lengths[first : first + 8].max() for first in range(0, 400, 8))
    assert padded(range(400)) < 1.1 * lengths.sum() < 1.5 * lengths.sum() < one_batch


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(world_size):
    lengths = lengths_of(64)
    batch = BatchSampler(len(lengths), 16, seed=1).batch(3)
    dealt = [shard_batch(batch, lengths, rank, world_size, 3) for rank in range(world_size)]
    assert sorted(row for rank in dealt for micro in rank for row in micro) == sorted(batch)
    assert len({len(rank) for rank in dealt}) == 1
    assert all(len(micro) <= 3 for rank in dealt for micro in rank)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@given(lengths=st.lists(st.integers(1, 50), min_size=8, max_size=40), max_tokens=st.integers(50, 200))
def test_micro_batches_keep_to_a_budget_of_tokens(world_size, lengths, max_tokens):
    rows = range(len(lengths) // world_size * world_size)
    dealt = [shard_batch(rows, lengths, rank, world_size, 1, max_tokens) for rank in range(world_size)]
    assert sorted(row for rank in dealt for micro in rank for row in micro) == list(rows)
    assert len({len(rank) for rank in dealt}) == 1
    for rank in dealt:
        tokens = [len(micro) * max(lengths[row] for row in micro) for micro in rank]
        assert max(tokens) <= max_tokens
    for micro, other in itertools.pairwise(dealt[-1]):  # the last rank has each block's longest row
        assert (len(micro) + 1) * lengths[other[0]] > max_tokens  # one more row would not have fitted


@pytest.mark.parametrize("world_size", [1, 2, 4])
@given(lengths=st.lists(st.integers(1, 50), min_size=8, max_size=40), max_tokens=st.integers(50, 200))
def test_without_padding_a_budget_is_of_the_rows_own_tokens(world_size, lengths, max_tokens):
    rows = range(len(lengths) // world_size * world_size)
    shards = [shard_batch(rows, lengths, rank, world_size, 1, max_tokens, True) for rank in range(world_size)]
    assert sorted(row for shard in shards for micro in shard for row in micro) == list(rows)
    assert len({len(shard) for shard in shards}) == 1
    assert {sum(len(micro) for micro in shard) for shard in shards} == {len(rows) // world_size}
    assert max(sum(lengths[row] for row in micro) for shard in shards for micro in shard) <= max_tokens
    if world_size == 1:
        for micro, other in itertools.pairwise(shards[0]):
            assert sum(lengths[row] for row in micro) + lengths[other[0]] > max_tokens


def test_without_padding_ranks_get_nearly_as_many_tokens():
    """In turn the last of 8 ranks gets a tenth more than the mean."""
    lengths = lengths_of(256)

    def busiest(*padding_free: bool) -> float:
        shards = [shard_batch(range(256), lengths, rank, 8, 4, None, *padding_free) for rank in range(8)]
        tokens = [sum(lengths[row] for micro in shard for row in micro) for shard in shards]
        return max(tokens) / (sum(tokens) / 8)

    assert busiest(True) < 1.01 < 1.02 < busiest()


def test_ranks_get_like_work():
    lengths = lengths_of(64)
    work = [sum(lengths[row] for m in shard_batch(range(64), lengths, rank, 2, 4) for row in m) for rank in (0, 1)]
    assert max(work) < 1.05 * min(work)


def test_a_batch_that_ranks_cannot_share_is_an_error():
    with pytest.raises(UserError, match="batch size 10 is not a multiple of the 4 processes"):
        shard_batch(range(10), range(10), 0, 4, 1)
    with pytest.raises(UserError, match="micro-batch size is 0"):
        shard_batch(range(10), range(10), 0, 2, 0)


def test_nothing_to_sample_from_is_an_error():
    with pytest.raises(UserError, match="no rows"):
        BatchSampler(0, 2, seed=1)
    with pytest.raises(UserError, match="no rows"):
        BatchSampler(2, 2, seed=1, weights_per_row=[0, 0])
    with pytest.raises(UserError, match="weights must be"):
        BatchSampler(2, 2, seed=1, weights_per_row=[-1, 1])
    with pytest.raises(UserError, match="batch_size 0"):
        BatchSampler(2, 0, seed=1)
