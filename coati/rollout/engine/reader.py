"""Prompts are read: as many at a time as a device has room for, and what they have in common once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from coati.models.routing import RoutingNotes
from coati.rollout.engine.rows import ReadRow, Row
from coati.rollout.prompts import pad_right
from coati.transfer import upload

KEPT_SHARE = 4  # a token of a row whose states are copied counts as so many fewer tokens to read
SHORTEST_PREFIX = 16  # a shorter common prefix of all prompts is not worth a pass of its own


class PromptReader:
    """Gives rows the keys and values of their prompts, and the logits of their first tokens.

    Args:
        most_rows: that are read at a time; most_tokens: the same, padding included.

    Attributes:
        prompt_tokens, padding_tokens: what the model has read so far.
    """

    def __init__(self, model, most_rows: int, most_tokens: int):
        self.model, self.most_rows, self.most_tokens = model, most_rows, most_tokens
        self.device = next(model.parameters()).device
        self.prompt_tokens = self.padding_tokens = 0

    def read(self, rows: list[Row], notes: RoutingNotes | None) -> Iterator[list[ReadRow]]:
        """Reads prompts, a batch at a time and as late as possible; their common prefix is read once.

        Args:
            notes: takes down which experts tokens go to.
        """
        # equal prompts become neighbors and are read once; like lengths share a batch
        rows = sorted(rows, key=lambda row: (len(row.request.prompt), *row.request.prompt))
        continued = [row for row in rows if row.request.states is not None]
        rows = [row for row in rows if row.request.states is None]
        while continued:
            batch = self.next_batch(continued, continued_size)
            cache, logits = self.read_rest(batch)
            yield [ReadRow(row, cache, i, logits, continued=True) for i, row in enumerate(batch)]
        if not rows:
            return
        samples = [list(group) for _, group in groupby(rows, key=lambda row: tuple(row.request.prompt))]
        shared = common_prefix_length([group[0].request.prompt for group in samples])
        prefix, of_prefix = None, None
        if shared:
            prefix, _ = self.read_batch(samples[:1], None, shared)
            of_prefix = routing_of(notes, 1)
        while samples:
            groups = self.next_batch(samples, lambda group: len(group[0].request.prompt) - shared)
            cache, logits = self.read_batch(groups, prefix)
            routing = routing_of(notes, len(groups), of_prefix)
            yield [ReadRow(row, cache, i, logits, routing) for i, group in enumerate(groups) for row in group]

    def next_batch(self, waiting: list[Any], new_tokens: Callable[[Any], int]) -> list[Any]:
        """Takes the first ones, as many as are read at a time."""
        batch, longest = [], 0
        while waiting and len(batch) < self.most_rows:
            longest = max(longest, new_tokens(waiting[0]))
            if batch and (len(batch) + 1) * longest > self.most_tokens:
                break
            batch.append(waiting.pop(0))
        return batch

    def read_batch(self, batch: list[list[Row]], prefix, end: int | None = None):
        """The KV cache of some prompts (up to `end`), and the logits of their next tokens.

        Args:
            batch: rows of equal prompts together; prefix: keys and values of what all begin with.
        """
        from transformers import DynamicCache

        from coati.rollout.engine.cache import share_prefix

        start, cache = 0, DynamicCache()
        if prefix is not None:
            start, cache = prefix.get_seq_length(), share_prefix(prefix, len(batch))
        ids, last = self.padded([list(group[0].request.prompt)[start:end] for group in batch])
        mask = None
        if not self.model.takes_positions:  # ALiBi is computed from the mask; elsewhere causality hides the padding
            mask = torch.arange(start + ids.shape[1], device=self.device) <= start + last[:, None]
        return cache, self.model.next_logits(ids, cache, mask, last=last)

    def read_rest(self, rows: list[Row]):
        """As `read_batch`, of prompts of which the first part has been read before. Their states are given up."""
        from coati.rollout.engine.attention import step_mask
        from coati.rollout.engine.cache import SlotCache

        states = [row.request.states for row in rows]
        new = [list(row.request.prompt)[kept.length :] for row, kept in zip(rows, states, strict=True)]
        ids, last = self.padded(new)
        columns = max(kept.length for kept in states) + ids.shape[1]
        cache = SlotCache(len(rows), columns, self.device)
        cache.restore(states)
        for row in rows:
            row.request = replace(row.request, states=None)
        cache.rows, cache.width = len(rows), columns
        mask, positions = step_mask(self.model, cache, ids.shape[1]), cache.next_positions(ids.shape[1])
        return cache, self.model.next_logits(ids, cache, mask, positions, last=last)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids that the model reads next, `[batch, seq]`, which count as read, and the column of each row's last
        one, `[batch]`."""
        lengths = [len(row) for row in rows]
        ids = pad_right(rows, self.device)
        self.prompt_tokens += sum(lengths)
        self.padding_tokens += ids.numel() - sum(lengths)
        return ids, upload([length - 1 for length in lengths], self.device)


def routing_of(notes: RoutingNotes | None, rows: int, before: Tensor | None = None) -> Tensor | None:
    """The experts of the tokens that the model has read last, int16 `[rows, seq, layers, k]`, if they are noted.

    Args:
        before: `[1, seq, layers, k]`, of what all rows begin with.
    """
    if notes is None:
        return None
    found = notes.take().unflatten(0, (rows, -1))
    return found if before is None else torch.cat([before.expand(rows, -1, -1, -1), found], 1)


def continued_size(row: Row) -> int:
    """Tokens that a row counts for where rows go on from kept states, which take memory too: they are copied."""
    length = len(row.request.prompt)
    return max(length - row.request.states.length, -(-length // KEPT_SHARE))


def common_prefix_length(prompts: list[Sequence[int]]) -> int:
    """Length of the prompts' common prefix, at least one token less than each; 0 if it is too short to matter."""
    first, last = min(prompts), max(prompts)  # all others lie between them
    if first == last:
        return 0
    length, most = 0, min(len(prompt) for prompt in prompts) - 1
    while length < most and first[length] == last[length]:
        length += 1
    return length if length >= SHORTEST_PREFIX else 0
