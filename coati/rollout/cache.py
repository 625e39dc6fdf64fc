"""Keys and values of rows that are generated together, in memory that is taken once.

All rows end in the same column: a step writes one column of every row and reads those from the longest row's start on.
To a transformers model that is an ordinary batch with padding on the left, whatever its attention does.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin


class SlotCache(Cache):
    """Slots for `slots` rows, and `length` columns.

    Attributes:
        rows: how many slots are in use, the first ones.
        start, end: the columns in use; the next token is written to column `end`.
    """

    def __init__(self, slots: int, length: int):
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self))
        self.slots, self.length = slots, length
        self.rows, self.start, self.end = 0, 0, 0

    def place(self, prefilled: DynamicCache, chosen: list[int]):
        """Copies rows of a prefilled batch (padded on the left) to free slots; their prompts end in column `end`."""
        slots = slice(self.rows, self.rows + len(chosen))
        for i, layer in enumerate(prefilled.layers):
            if i == len(self.layers):
                self.layers.append(self.layer_class_to_replicate())
                self.layers[i].lazy_initialization(layer.keys, layer.values)
            columns = slice(self.end - layer.keys.shape[2], self.end)
            self.layers[i].keys[slots, :, columns] = layer.keys[chosen]
            self.layers[i].values[slots, :, columns] = layer.values[chosen]
        self.rows = slots.stop

    def move_rows(self, source: list[int], target: list[int], rows: int):
        """Rows `source` go to `target`, and the first `rows` remain."""
        if source:
            for layer in self.layers:
                layer.keys[target, :, self.start : self.end] = layer.keys[source, :, self.start : self.end]
                layer.values[target, :, self.start : self.end] = layer.values[source, :, self.start : self.end]
        self.rows = rows

    def move_columns(self, end: int) -> int:
        """Moves what is in use to the left, so that the next column is `end`; returns by how many columns."""
        distance, span = self.end - end, self.end - self.start
        for layer in self.layers if span else ():
            for tensor in (layer.keys, layer.values):
                tensor[: self.rows, :, end - span : end] = tensor[: self.rows, :, self.start : self.end].clone()
        self.start, self.end = end - span, end
        return distance


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor):
        # zeros: what is masked is still multiplied by a probability of 0, which doesn't hide a NaN
        self.keys, self.values = (
            torch.zeros(self.cache.slots, x.shape[1], self.cache.length, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows, start, end = self.cache.rows, self.cache.start, self.cache.end
        self.keys[:rows, :, end : end + 1] = key_states
        self.values[:rows, :, end : end + 1] = value_states
        return self.keys[:rows, :, start : end + 1], self.values[:rows, :, start : end + 1]

    def get_seq_length(self) -> int:
        return self.cache.end - self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1
