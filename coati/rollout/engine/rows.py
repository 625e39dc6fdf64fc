"""Rows in progress: what the host knows of each, and what the device does."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.rollout.generator import Completion, Request


@dataclass
class Row:
    """A request in progress.

    Attributes:
        limit: tokens of its completion, at most; key: of its noise.
        drawn: tokens that have been sampled on the device; the completion may still lack the last one.
        kept: whether its completion has states.
        routing: of the tokens that the model has read, parts of the completion's.
    """

    index: int
    request: Request
    limit: int
    key: int
    completion: Completion = field(default_factory=Completion)
    drawn: int = 0
    kept: bool = False
    routing: list[np.ndarray] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.drawn

    @property
    def response(self) -> list[int]:
        """The tokens of the response so far, those included that were there before."""
        if not self.request.begun:
            return self.completion.ids
        return [*self.request.prompt[-self.request.begun :], *self.completion.ids]

    @property
    def ended(self) -> bool:
        return self.completion.finish_reason != ""


@dataclass
class ReadRow:
    """A row whose prompt the model has read, as one row of a batch.

    Attributes:
        cache: the batch's keys and values, a DynamicCache or SlotCache; logits: of its next tokens.
        routing: the experts that its tokens went to, int16 `[rows, seq, layers, k]`, if they are noted.
        continued: whether it went on from states.
    """

    row: Row
    cache: Any
    batch_row: int
    logits: Tensor
    routing: Tensor | None = None
    continued: bool = False


def states_in(cache) -> list[Tensor]:
    """The keys and values of all layers, `[rows, key-value heads, columns, head_dim]` each."""
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


class Slots:
    """The device's state of the rows in progress, by slot.

    Attributes:
        tokens: the last token of each row, int64 `[slots]`; log_probs: its log-prob, float32.
        drawn: tokens of each response so far; keys: of its noise; int64.
        heads: ids and log-probs of the tokens that were most likely where the last one was drawn, `[slots, heads]`
            each; none where they are not asked for.
        seen: for the repetition penalty, the tokens of each row, bool `[slots, vocabulary]`; else None.
        own_sampling: of rows that are live, their temperatures and nucleus masses, float32 `[slots]` each; else none.
    """

    def __init__(self, slots: int, columns: int, device: torch.device, heads: int = 0, live: bool = False):
        from coati.rollout.engine.cache import SlotCache  # imports transformers

        self.cache = SlotCache(slots, columns, device)
        self.tokens, self.drawn, self.keys = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3))
        self.log_probs = torch.zeros(slots, device=device)
        dtypes = (torch.long, torch.float32) if heads else ()
        self.heads = [torch.zeros(slots, heads, dtype=dtype, device=device) for dtype in dtypes]
        self.seen: Tensor | None = None
        self.own_sampling = [torch.ones(slots, device=device) for _ in range(2)] if live else []

    def move(self, source: Tensor, target: Tensor, width: int):
        """Rows of slots `source`, of at most `width` tokens, go to slots `target`."""
        self.cache.move(source, target, width)
        seen = [] if self.seen is None else [self.seen]
        for tensor in [self.tokens, self.drawn, self.keys, self.log_probs, *seen, *self.own_sampling]:
            tensor[target] = tensor[source]

    def close(self):
        """Frees the keys and values: a cache refers to itself, its memory would wait for the garbage collector."""
        self.cache.layers.clear()
