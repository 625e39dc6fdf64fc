"""Which pairs are made of an item's responses, who gets which pair, and which response stands on the left."""

import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence


def choose_pairs(
    texts: Sequence[str], count: int, seed: int, key: str, scores: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Pairs of an item's responses, as positions `(i, j)` with i < j. Responses with the same text are one.

    Args:
        texts: of the responses.
        count: how many pairs at most.
        seed, key: what a random choice follows from; `key` is the item's.
        scores: of the responses; where they are given, the pairs with the least margin are chosen.
    """
    distinct = [i for i, text in enumerate(texts) if text not in texts[:i]]
    pairs = [(i, j) for i in distinct for j in distinct if i < j]
    random.Random(f"{seed}/{key}").shuffle(pairs)
    if scores is not None:
        pairs.sort(key=lambda pair: margin(scores, *pair))
    return sorted(pairs[:count])


def margin(scores: Sequence[float], first: int, second: int) -> float:
    """How far apart two responses are: small where the model that scored them is uncertain."""
    return abs(scores[first] - scores[second])


def next_pair(order: Iterable[int], holders: Mapping[int, int], shown: Collection[int], overlap: int) -> int | None:
    """The pair that a person gets next; None if there is none left.

    A pair that somebody has begun comes before new ones, until `overlap` people have it.

    Args:
        order: all pairs, the most urgent first; read only as far as needed.
        holders: by pair, how many people have labeled it or hold it now.
        shown: pairs that this person has been shown.
    """
    begun = {pair for pair, held in holders.items() if 0 < held < overlap and pair not in shown}
    for pair in order:
        if pair in begun or not (begun or pair in shown or holders.get(pair, 0)):
            return pair
    return None


def is_swapped(seed: int, pair: int, person: str) -> bool:
    """Whether the pair's second response stands on the left, for this person."""
    return hashlib.sha256(f"{seed}/{pair}/{person}".encode()).digest()[0] % 2 == 1
