"""Packed rows as batches, and the order in which a stage reads them."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.errors import UserError
from colossal_llama.data.packed_rows import MixedOrder, PackedDataset, collate
from tests.applications.colossal_llama.world import row, write_packed


class Rows:
    """What `MixedOrder` reads of a data set."""

    def __init__(self, lengths, categories, buckets):
        self.lengths = np.array(lengths)
        self.categories, self.category_of_row = np.unique(categories, return_inverse=True)
        self.bucket_of_row = np.array(buckets)


@st.composite
def data(draw):
    """Rows of which every bucket has some of every category."""
    places = [(category, bucket) for category in "abc"[: draw(st.integers(1, 3))] for bucket in range(3)]
    rows = [(*place, draw(st.integers(1, 30))) for place in places for _ in range(draw(st.integers(1, 4)))]
    categories, buckets, lengths = zip(*draw(st.permutations(rows)), strict=True)
    return Rows(lengths, categories, buckets)


quick = settings(max_examples=60, deadline=None)


@quick
@given(data(), st.integers(1, 5), st.integers(1, 400), st.integers(0, 5))
def test_a_stage_ends_with_the_batch_that_reaches_its_tokens(rows, batch_size, tokens, seed):
    order = MixedOrder(rows, batch_size, seed, tokens=tokens)
    read = [rows.lengths[order.batch(k)].sum() for k in range(len(order))]
    assert sum(read) == order.tokens >= tokens > sum(read[:-1])
    assert all(len(order.batch(k)) == batch_size for k in range(len(order)))


@quick
@given(data(), st.integers(0, 5), st.data())
def test_tokens_are_in_the_mixtures_proportions_at_any_moment(rows, seed, draw):
    """To within one row of each category."""
    shares = draw.draw(st.fixed_dictionaries({name: st.sampled_from([0.1, 1.0, 3.0]) for name in rows.categories}))
    order = MixedOrder(rows, 1, seed, tokens=2000, mix=shares)
    seen, total = Counter(), sum(shares.values())
    for index in order.rows:
        seen[rows.categories[rows.category_of_row[index]]] += rows.lengths[index]
        for name, share in shares.items():
            others = len(shares) * rows.lengths.max()
            assert abs(seen[name] - share / total * sum(seen.values())) <= others


@quick
@given(data(), st.permutations(range(3)), st.integers(0, 5))
def test_each_category_is_read_bucket_by_bucket_and_each_row_once(rows, buckets, seed):
    order = MixedOrder(rows, 1, seed, buckets=buckets)
    assert order.epoch(len(order)) == 1.0
    assert sorted(order.rows) == list(range(len(rows.lengths)))  # their own shares: all end together
    for category in range(len(rows.categories)):
        places = [buckets.index(rows.bucket_of_row[r]) for r in order.rows if rows.category_of_row[r] == category]
        assert all(a <= b for a, b in pairwise(places))


@quick
@given(data(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.integers(1, 400))
def test_batches_of_another_size_go_on_where_the_stage_stopped(rows, before, now, step, tokens):
    """REPORT 20: from step `step` on, with the same rows in the same order, to the same number of tokens."""
    first = MixedOrder(rows, before, 0, tokens=max(tokens, rows.lengths.sum() * 2))
    step = min(step, len(first))
    order = MixedOrder(rows, now, 0, tokens=tokens, start=(step, step * before))
    seen = first.rows[: step * before].tolist()
    for k in range(step, len(order)):
        assert len(order.batch(k)) == now and order.epoch(k) == len(seen) / len(rows.lengths)
        seen += order.batch(k)
    whole = MixedOrder(rows, 1, 0, steps=len(seen)).rows.tolist() if seen else []
    assert seen == whole
    if len(order) > step:
        read, last = rows.lengths[seen].sum(), rows.lengths[order.batch(len(order) - 1)].sum()
        assert read >= tokens > read - last


@pytest.mark.parametrize(("options", "tokens"), [(dict(epochs=2.0), 100), (dict(steps=3), 15), (dict(tokens=12), 15)])
def test_a_stage_is_as_long_as_it_is_told(options, tokens):
    """Epochs are those of the buckets and categories that take part."""
    rows = Rows([5] * 30, ["a"] * 20 + ["b"] * 10, [0, 1] * 15)
    assert MixedOrder(rows, 1, 0, buckets=[1], mix={"a": 1.0}, **options).tokens == tokens


def test_a_category_that_ends_begins_again_in_another_order():
    rows = Rows([5] * 12, ["a"] * 10 + ["b"] * 2, [0] * 12)
    order = MixedOrder(rows, 1, 0, tokens=200, mix={"a": 1.0, "b": 1.0})
    assert Counter(order.rows.tolist()) == dict.fromkeys(range(10), 2) | {10: 10, 11: 10}
    first, second = [[r for r in part if r < 10] for part in (order.rows[:20], order.rows[20:])]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(buckets=[0, 7]), "no bucket 7: the data has 0 to 1"),
        (dict(mix={"c": 1.0}), "category 'c': the data has a, b"),
        (dict(mix={"a": 0.0}), "the share 0.0"),
        (dict(mix={"a": 1.0, "b": 1.0}, buckets=[1]), "the buckets [1] have no row"),
    ],
)
def test_an_order_that_cannot_be_is_refused(options, words):
    rows = Rows([5, 5, 5], ["a", "b", "a"], [0, 0, 1])
    with pytest.raises(UserError) as error:
        MixedOrder(rows, 1, 0, tokens=10, **options)
    assert words in str(error.value)


def test_rows_become_a_batch():
    """PITFALL 40."""
    batch = collate([row([[5, 6, 7], [8, 9]], "a", untrained=2), row([[1]], "a")], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] + [False] * 4]
    assert batch.loss_mask.tolist() == [[False, False, True, False, False], [False] * 5]
    assert batch.input_ids.dtype == torch.long


def test_folders_are_read_as_one(tmp_path):
    first = write_packed(tmp_path / "a", [[row([[1, 2]], "zh")], [row([[3]], "en"), row([[4, 5, 6]], "zh")]])
    second = write_packed(tmp_path / "b", [[row([[7]], "en")]])
    data = PackedDataset([first, second])
    assert [data[i]["input_ids"] for i in range(len(data))] == [[1, 2], [3], [4, 5, 6], [7]]
    assert data.lengths.tolist() == [2, 1, 3, 1]
    assert data.categories[data.category_of_row].tolist() == ["zh", "en", "zh", "en"]
    assert data.bucket_of_row.tolist() == [0, 1, 1, 0]


def test_a_folder_that_is_not_finished_is_refused(tmp_path):
    folder = write_packed(tmp_path / "a", [[row([[1, 2]], "zh")]])
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json can't be read\): run prepare_pretrain"):
        PackedDataset([folder])
