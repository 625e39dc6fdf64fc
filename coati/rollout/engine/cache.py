"""The KV cache of rows that are generated together, in memory that is allocated once.

Every row has a slot, and its token at position p is in column p. So rows of any age share a step: each writes its own
column, and a mask hides later columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from coati.transfer import upload


@dataclass
class RowStates:
    """Keys and values of a row, `[key-value heads, tokens, head_dim]` by layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


def share_prefix(cache: Cache, rows: int) -> DynamicCache:
    """A cache of so many rows that all continue the one row of `cache`; nothing is copied until they do."""
    shape = (rows, -1, -1, -1)
    return DynamicCache([(layer.keys.expand(shape), layer.values.expand(shape)) for layer in cache.layers])


class SlotCache(Cache):
    """Room for `slots` rows of `columns` tokens, allocated when the first rows come.

    Attributes:
        rows: slots that take part in a step, the first ones.
        width: columns that a step reads, the first ones.
        lengths: tokens that each slot holds, int64 `[slots]`: where its next token goes.
    """

    def __init__(self, slots: int, columns: int, device: torch.device):
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self))
        self.slots, self.columns = slots, columns
        self.rows, self.width = 0, 0
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.order = torch.arange(slots, device=device)
        self.positions = torch.arange(columns, device=device)

    def write(self, prefilled: DynamicCache, source: list[int], target: list[int], lengths: list[int]):
        """Copies rows of a batch of prompts, padded on the right, to slots."""
        device, longest = self.lengths.device, max(lengths)
        source_index, target_index = upload(source, device), upload(target, device)
        self.lengths[target_index] = upload(lengths, device)
        for i, layer in enumerate(prefilled.layers):
            if i == len(self.layers):
                self.layers.append(self.layer_class_to_replicate())
                self.layers[i].lazy_initialization(layer.keys, layer.values)
            slots, dtype = self.layers[i], stored_as(layer.keys)
            slots.keys[target_index, :, :longest] = layer.keys[source_index, :, :longest].to(dtype)
            slots.values[target_index, :, :longest] = layer.values[source_index, :, :longest].to(dtype)

    def restore(self, states: Sequence[RowStates]):
        """Puts rows into the first slots."""
        self.lengths[: len(states)] = upload([row.length for row in states], self.lengths.device)
        for i in range(len(states[0].keys)):
            self.layers.append(self.layer_class_to_replicate())
            self.layers[i].lazy_initialization(states[0].keys[i][None], states[0].values[i][None])
            for slot, row in enumerate(states):
                self.layers[i].keys[slot, :, : row.length] = row.keys[i]
                self.layers[i].values[slot, :, : row.length] = row.values[i]

    def states(self, slot: int, length: int) -> RowStates:
        """A copy of the first tokens of a row."""
        return RowStates(
            [layer.keys[slot, :, :length].clone() for layer in self.layers],
            [layer.values[slot, :, :length].clone() for layer in self.layers],
        )

    def move(self, source: Tensor, target: Tensor, width: int):
        """The first `width` columns of slots `source` go to slots `target`."""
        self.lengths[target] = self.lengths[source]
        for layer in self.layers:
            layer.keys[target, :, :width] = layer.keys[source, :, :width]
            layer.values[target, :, :width] = layer.values[source, :, :width]

    def visible(self, kind: str, config, tokens: int = 1) -> Tensor:
        """The columns that each row's next tokens see, bool `[rows, tokens, width]`.

        Args:
            kind: of attention: full, sliding or chunked, as transformers names a layer's type.
        """
        columns, position = self.positions[: self.width], self.next_positions(tokens)[..., None]
        visible_columns = columns <= position
        if kind == "sliding_attention":
            visible_columns &= columns > position - config.sliding_window
        elif kind == "chunked_attention":
            visible_columns &= columns // config.attention_chunk_size == position // config.attention_chunk_size
        return visible_columns

    def next_positions(self, tokens: int) -> Tensor:
        """Of each row's next tokens, `[rows, tokens]`."""
        return self.lengths[: self.rows, None] + self.positions[:tokens]


def stored_as(states: Tensor) -> torch.dtype:
    """The dtype of the KV cache. Attention computes in autocast's dtype: a wider cache would be cast again at every
    token."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        # zeros: what is masked is still multiplied by a probability of 0, which doesn't hide a NaN
        self.keys, self.values = (
            x.new_zeros((self.cache.slots, x.shape[1], self.cache.columns, x.shape[3]), dtype=stored_as(x))
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The next tokens of every row."""
        rows, width = self.cache.rows, self.cache.width
        slots, columns = self.cache.order[:rows, None], self.cache.next_positions(key_states.shape[2])
        self.keys[slots, :, columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[slots, :, columns] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_seq_length(self) -> int:
        return self.cache.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_max_length(self) -> int:
        return -1
