"""Which rows make up which batch, shuffled and weighted, the same for any world size; and which micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from coati.errors import UserError


class BatchSampler:
    """An endless stream of global batches; batch `k` is a pure function of the arguments and `k`.

    Every epoch is a fresh permutation of the rows. Epochs are laid end to end and the stream is split into
    batches, so no row is lost and no batch is short: the batch on an epoch's end takes its last rows from the
    next epoch. Rows are not sorted by length across batches: a batch of short responses would count each of
    their tokens for more than one of long responses does, and a policy would learn to respond briefly.

    Args:
        rows: how many there are.
        batch_size: rows of a global batch, over all ranks and micro-batches.
        weights_per_row: how often a row is seen in an epoch, `[rows]`. 2.0: twice. 0.5: rows of that weight
            take turns, a random half each epoch and the other half in the next.
        shuffle: False gives the rows in order.
        start: a batch, and the row of the endless stream that it begins with: a run that resumes with batches of
            another size resumes at the row where it stopped.

    Raises `UserError` when there are no rows, or nothing with a weight above 0.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        *,
        weights_per_row: Sequence[float] | None = None,
        shuffle: bool = True,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be 1 or more.")
        self.batch_size, self.seed, self.shuffle, self.start = batch_size, seed, shuffle, start
        weights = np.ones(rows) if weights_per_row is None else np.asarray(weights_per_row, float)
        if weights.shape != (rows,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise UserError("The sampling weights must be finite, 0 or more, and one per row.")
        self._whole = np.repeat(np.arange(len(weights)), np.floor(weights).astype(int))
        fractions = weights - np.floor(weights)
        # Rows of one fractional weight form a group, of which an equal share is seen in every epoch.
        self._groups = [np.flatnonzero(fractions == f) for f in np.unique(fractions) if f > 0]
        self._shares = [max(1, round(fractions[group[0]] * len(group))) for group in self._groups]
        self.epoch_size = len(self._whole) + sum(self._shares)
        if self.epoch_size == 0:
            raise UserError("There are no rows to sample from; check the data and its weights.")
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that it takes to see every row of an epoch."""
        return math.ceil(self.epoch_size / self.batch_size)

    def epoch(self, k: int) -> float:
        """Epochs completed before batch `k`."""
        return self.position(k) / self.epoch_size

    def position(self, k: int) -> int:
        """Rows of the stream before batch `k`."""
        batch, row = self.start
        return row + (k - batch) * self.batch_size

    def batch(self, k: int) -> list[int]:
        """Rows of global batch `k`, always `batch_size` of them."""
        return self._stream(self.position(k), self.position(k + 1)).tolist()

    def row(self, position: int) -> int:
        """The row at this position of the stream."""
        batch, start = self.start
        k, place = divmod(position - start, self.batch_size)
        return self.batch(batch + k)[place]

    def _stream(self, start: int, end: int) -> np.ndarray:
        """Positions `start` to `end` of the epochs laid end to end."""
        pieces = []
        while start < end:
            epoch, offset = divmod(start, self.epoch_size)
            pieces.append(self._epoch_order(epoch)[offset : offset + end - start])
            start += len(pieces[-1])
        return np.concatenate(pieces)

    def _make_epoch_order(self, epoch: int) -> np.ndarray:
        extras = [self._share(i, epoch) for i in range(len(self._groups))]
        rows = np.concatenate([self._whole, *extras])
        if not self.shuffle:
            return np.sort(rows)
        return np.random.default_rng([self.seed, 0, epoch]).permutation(rows)

    def _share(self, index: int, epoch: int) -> np.ndarray:
        """The rows of a fractional group that `epoch` sees: the next slice of its endless permutations."""
        group, share = self._groups[index], self._shares[index]
        positions = np.arange(epoch * share, (epoch + 1) * share)
        cycles = np.unique(positions // len(group))
        orders = {c: np.random.default_rng([self.seed, 2, index, int(c)]).permutation(group) for c in cycles}
        return np.array([orders[p // len(group)][p % len(group)] for p in positions], dtype=np.int64)


def shard_batch(
    batch: Sequence[int],
    lengths: Sequence[int],
    rank: int,
    world_size: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    padding_free: bool = False,
) -> list[list[int]]:
    """This rank's micro-batches of a global batch.

    Rows are sorted by length and distributed to the ranks in turn, so that ranks get like work and every rank has
    the same number of micro-batches, see `split_micro_batches`. Without padding ranks get as many tokens each as can
    be, and as many rows.

    Raises `UserError` when the ranks cannot get equally many rows.
    """
    if len(batch) % world_size:
        raise UserError(f"The batch size {len(batch)} is not a multiple of the {world_size} processes; change either.")
    if micro_batch_size < 1:
        raise UserError(f"The micro-batch size is {micro_batch_size}; give 1 or more.")
    rows = sorted(batch, key=lambda row: lengths[row])
    if padding_free:
        shards = share_evenly(rows, lengths, world_size)
    else:
        shards = [rows[other::world_size] for other in range(world_size)]
    widths = [max(lengths[row] for row in of_ranks) for of_ranks in zip(*shards, strict=True)]
    parts = split_micro_batches(widths, micro_batch_size, max_tokens, padding_free)
    return [shards[rank][part] for part in parts]


def share_evenly(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows for each rank, sorted by length: as many rows for everyone, and nearly as many tokens. The longest rows are
    given first, each to the rank that has fewest tokens so far and still takes rows."""
    shards: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda row: -lengths[row]):
        rank = min((r for r in range(ranks) if len(shards[r]) < len(rows) // ranks), key=lambda r: (tokens[r], r))
        shards[rank].append(row)
        tokens[rank] += lengths[row]
    return [shard[::-1] for shard in shards]


def split_micro_batches(
    lengths: Sequence[int], micro_batch_size: int, max_tokens: int | None = None, padding_free: bool = False
) -> list[slice]:
    """Micro-batches of rows that are sorted by length: of `micro_batch_size` rows each, or, given `max_tokens`, of as
    many rows as fit into `max_tokens` (one row at least), padding included if there is any."""
    if max_tokens is None:
        return [slice(i, i + micro_batch_size) for i in range(0, len(lengths), micro_batch_size)]

    def tokens(rows: Sequence[int]) -> int:
        return sum(rows) if padding_free else len(rows) * max(rows[0], rows[-1])

    parts, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or tokens(lengths[start : end + 1]) > max_tokens:
            parts.append(slice(start, end))
            start = end
    return parts
