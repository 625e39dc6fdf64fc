"""Which pairs are made, who gets which, and where the responses stand."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from coati.label.assignment import choose_pairs, is_swapped, next_pair

TEXTS = st.lists(st.sampled_from("abcde"), min_size=2, max_size=5)


@given(TEXTS, st.integers(1, 12), st.integers(0, 5))
def test_pairs_are_of_different_texts_and_each_once(texts, count, seed):
    pairs = choose_pairs(texts, count, seed, "key")
    distinct = len(set(texts))
    assert len(pairs) == min(count, distinct * (distinct - 1) // 2)
    assert all(i < j for i, j in pairs)
    assert len({frozenset((texts[i], texts[j])) for i, j in pairs}) == len(pairs)
    assert all(texts[i] != texts[j] for i, j in pairs)
    assert pairs == choose_pairs(texts, count, seed, "key")


def test_pairs_depend_on_seed_and_item():
    chosen = {(seed, key): choose_pairs("abcdef", 2, seed, key)[0] for seed in range(8) for key in "xy"}
    assert len({chosen[seed, "x"] for seed in range(8)}) > 2
    assert any(chosen[seed, "x"] != chosen[seed, "y"] for seed in range(8))


def test_with_scores_the_least_margins_are_chosen():
    assert choose_pairs("abcd", 2, 0, "key", [0.0, 5.0, 0.5, 9.0]) == [(0, 2), (1, 3)]


@given(
    st.permutations(range(6)),
    st.dictionaries(st.integers(0, 5), st.integers(0, 3)),
    st.sets(st.integers(0, 5)),
    st.integers(1, 3),
)
def test_a_pair_that_somebody_has_begun_comes_before_new_ones(order, holders, shown, overlap):
    pair = next_pair(order, holders, shown, overlap)
    free = [p for p in order if p not in shown and holders.get(p, 0) < overlap]
    begun = [p for p in free if holders.get(p, 0) > 0]
    assert pair == next(iter([*begun, *free]), None)


def test_places_are_even_and_follow_from_seed_pair_and_person():
    places = [is_swapped(seed, pair, name) for seed in (0, 1) for pair in range(500) for name in ("ana", "ben")]
    assert places == [is_swapped(seed, pair, name) for seed in (0, 1) for pair in range(500) for name in ("ana", "ben")]
    assert 850 < Counter(places)[True] < 1150
    assert len({tuple(places[i::4]) for i in range(4)}) == 4
