"""Best-fit decreasing packing against a plain search, and the cutting of long documents."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.data.bin_packing import best_fit, split_into_pieces

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """O(n^2): each item, the longest first, into the fullest pack that has room, the oldest of equally full ones."""
    packs: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        used = [sum(lengths[i] for i in pack) for pack in packs]
        fitting = [p for p in range(len(packs)) if used[p] + lengths[item] <= capacity]
        if fitting:
            packs[max(fitting, key=lambda p: (used[p], -p))].append(item)
        else:
            packs.append([item])
    return packs


@given(lengths_and_capacity)
def test_the_packs_are_those_of_a_plain_search(case):
    assert best_fit(*case) == plain_best_fit(*case)


@given(lengths_and_capacity)
def test_every_item_is_in_one_pack_and_no_pack_is_too_full(case):
    lengths, capacity = case
    packs = best_fit(lengths, capacity)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in pack) <= capacity for pack in packs)
    assert sum(lengths) <= len(packs) * capacity


@pytest.mark.parametrize("lengths", [[0], [3, 9], [-1]])
def test_a_length_that_fits_no_pack_is_an_error(lengths):
    with pytest.raises(ValueError, match="do not fit packs of 8"):
        best_fit(lengths, 8)


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 12))
def test_pieces_are_the_documents_in_order(lengths, max_length):
    document, start, stop = split_into_pieces(lengths, max_length)
    tokens = [(d, t) for d, a, b in zip(document, start, stop, strict=True) for t in range(a, b)]
    assert tokens == [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert all(1 <= size <= max_length for size in stop - start)
    assert len(document) == sum(-(-length // max_length) for length in lengths)


def test_time_grows_no_faster_than_n_log_n():
    """A scan over the open packs takes 60 times as long for 8 times the items; this takes about 8.5 times."""

    def seconds(count: int) -> float:
        lengths = np.random.default_rng(0).integers(1, 4097, count)
        start = time.process_time()
        best_fit(lengths, 4096)
        return time.process_time() - start

    assert min(seconds(160_000) for _ in range(2)) < 30 * min(seconds(20_000) for _ in range(3))
