"""Splitting documents into pieces and packing these into rows, by lengths alone.

Best-fit decreasing bin packing, as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling"
(https://arxiv.org/abs/2404.10830), algorithm 1: only a document that is longer than a row is ever split.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np


def split_into_pieces(lengths: Sequence[int], max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split documents into pieces of `max_length` tokens and one shorter last piece; nothing is dropped.

    Returns `(document, start, stop)`, int64 `[pieces]` each, in the order of the documents: piece `i` is the tokens
    `start[i]` to `stop[i]` (exclusive) of document `document[i]`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = (lengths + max_length - 1) // max_length
    document = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first_piece[document]) * max_length
    return document, start, np.minimum(start + max_length, lengths[document])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items, the longest first, each into the pack that it leaves the least space in.

    Ties: of items of one length the earlier goes first; of packs with the same space the one opened first is taken.
    A pack is a list of item numbers in the order in which they were put in. Each item costs O(log n), and a move
    within a sorted list of at most `capacity` numbers.

    Raises ValueError for a length below 1 or above `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of {capacity}")
    packs: list[list[int]] = []
    spaces: list[int] = []  # that packs have left, ascending, each once
    packs_with: dict[int, list[int]] = {}  # space: a heap of the packs that have it left
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        position = bisect_left(spaces, length)
        if position == len(spaces):
            pack, space = len(packs), capacity
            packs.append([])
        else:
            space = spaces[position]
            pack = heappop(packs_with[space])
            if not packs_with[space]:
                del packs_with[space], spaces[position]
        packs[pack].append(item)
        if left := space - length:
            if left not in packs_with:
                packs_with[left] = []
                insort(spaces, left)
            heappush(packs_with[left], pack)
    return packs
