"""Two rows that begin alike as one row: what they share goes through the model once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedPairs:
    """Row i and row i + pairs of a batch, one after the other, the second without what it begins with like the first.

    Attributes:
        input_ids, position_ids: long `[pairs, packed]`; a token keeps the position it has in its own row.
        visible: bool `[pairs, 1, packed, packed]`, which token (last but one dimension) sees which (last): those of its
            own row up to itself.
        places: long `[2 * pairs, seq]`, where in its packed row each token of the batch is; anywhere for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    places: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor) -> "PackedPairs":
        """From `[2 * pairs, seq]`, padded on the right."""
        first, second = input_ids.chunk(2)
        real, seq = attention_mask.bool(), input_ids.shape[1]
        alike = (first == second) & real.chunk(2)[0] & real.chunk(2)[1]
        shared = alike.long().cumprod(1).sum(1, keepdim=True)
        length, total = real.sum(1, keepdim=True).chunk(2)[0], real.sum(1, keepdim=True).chunk(2)
        total = total[0] + total[1] - shared
        index = torch.arange(int(total.max()), device=input_ids.device).expand(len(first), -1)
        in_first = index < length
        position = torch.where(in_first, index, index - length + shared).clamp(max=seq - 1)
        ids = torch.where(in_first, first.gather(1, position), second.gather(1, position))
        query, key = index[:, :, None], index[:, None, :]
        other = ~in_first[:, :, None] & in_first[:, None, :] & (key >= shared[:, :, None])
        visible = (key <= query) & ~other  # padding comes last: no real token sees it
        column = torch.arange(seq, device=input_ids.device).expand_as(first)
        moved = torch.where(column < shared, column, column - shared + length)
        return cls(ids, position, visible[:, None], torch.cat([column, moved]).clamp(max=index.shape[1] - 1))

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, what is added to attention's scores, and positions: what `BaseModel.run` takes."""
        mask = torch.zeros_like(self.visible, dtype=dtype).masked_fill(~self.visible, torch.finfo(dtype).min)
        return self.input_ids, mask, self.position_ids

    def unpack(self, packed: Tensor) -> Tensor:
        """`[pairs, packed, ...]` as `[2 * pairs, seq, ...]`; padding holds anything."""
        rows = torch.arange(len(packed), device=packed.device).repeat(2)
        return packed[rows[:, None], self.places]
