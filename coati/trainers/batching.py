"""How rows become micro-batches, and micro-batches a model's inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.data import shard_batch, split_micro_batches
from coati.transfer import upload


class Batching:
    """Splits rows into this rank's micro-batches, rows of like length together.

    Args:
        ranks: those that see different data.
        micro_batch_size: rows of a micro-batch.
        max_tokens: of a micro-batch, padding included, instead; None to count rows.
        padding_free: there is no padding.
    """

    def __init__(self, ranks, micro_batch_size: int, max_tokens: int | None = None, padding_free: bool = False):
        self.ranks, self.micro_batch_size, self.max_tokens = ranks, micro_batch_size, max_tokens
        self.padding_free = padding_free

    def shard(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of a global batch."""
        sizes = self.micro_batch_size, self.max_tokens, self.padding_free
        return shard_batch(rows, lengths, self.ranks.rank, self.ranks.world_size, *sizes)

    def shard_all(self, lengths: Sequence[int]) -> list[list[tuple[int, bool]]]:
        """This rank's micro-batches of all rows of a data set: their numbers, and whether they are real.

        Every rank gets the same number of micro-batches, for plugins that communicate in the forward pass; missing rows
        are filled with copies that are not real.
        """
        lengths = list(lengths)
        filler = -len(lengths) % self.ranks.world_size
        longest = max(lengths)
        copied = lengths.index(longest)
        chunks = self.shard(range(len(lengths) + filler), lengths + [longest] * filler)
        return [[(i, True) if i < len(lengths) else (copied, False) for i in chunk] for chunk in chunks]

    def split(self, lengths: Sequence[int], group: int = 1) -> list[list[int]]:
        """Micro-batches of rows that this rank has, the longest first; the same number on every rank.

        Args:
            lengths: of the rows.
            group: so many rows, one after the other, stay together: a micro-batch has the first ones of its groups, the
                second ones and so on.
        """
        of_groups = [sum(lengths[i : i + group]) for i in range(0, len(lengths), group)]
        order = sorted(range(len(of_groups)), key=lambda i: -of_groups[i])
        widths = [of_groups[i] for i in order]
        if self.max_tokens is not None:
            widths = [max(of_ranks) for of_ranks in zip(*self.ranks.gather(widths), strict=True)]
        slices = split_micro_batches(widths, self.micro_batch_size // group, self.max_tokens, self.padding_free)
        parts = [order[part] for part in slices]
        return [[i * group + k for k in range(group) for i in part] for part in parts]

    def split_by_teacher(self, lengths: Sequence[int], teachers: Sequence[str | None]) -> "list[Part]":
        """Micro-batches of rows that this rank has, each of one teacher's. Every rank gets equally many of each
        teacher: where it has fewer, copies of its shortest row fill up.

        Args:
            lengths, teachers: of the rows, and the teachers' names.
        """
        known = self.ranks.gather(sorted(set(teachers), key=str))
        names = list(dict.fromkeys(name for of_rank in known for name in of_rank))
        shortest, found = min(range(len(lengths)), key=lambda i: lengths[i]), []
        for name in sorted(names, key=str):
            rows = sorted((i for i, own in enumerate(teachers) if own == name), key=lambda i: -lengths[i])
            widths = [lengths[i] for i in rows]
            slices = split_micro_batches(widths, self.micro_batch_size, self.max_tokens, self.padding_free)
            found += [Part(rows[part], name) for part in slices]
            missing = max(self.ranks.gather(len(slices))) - len(slices)
            found += [Part([shortest], name, is_real=False)] * missing
        return found


@dataclass(frozen=True)
class Part:
    """A micro-batch of rows that have the same teacher.

    Attributes:
        rows: their numbers.
        teacher: its name; None where there is only one.
        is_real: False for a row that fills up, of which nothing is learned.
    """

    rows: list[int]
    teacher: str | None = None
    is_real: bool = True


def model_inputs(batch, targets: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """What a model is called with, for a batch padded on the right.

    Args:
        targets: the tokens whose log-probs are wanted, bool `[batch, seq]`; None for all, or a model that gives
            something else.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "right_padded": True}
    return inputs | options if targets is None else inputs | {"targets": targets} | options


def in_batch_order(parts: Sequence[Sequence[int]], outputs: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Outputs `[rows, seq]` of micro-batches, put where their rows are in a batch: float32 of `shape`, 0 elsewhere."""
    whole = torch.zeros(shape, device=outputs[0].device)
    for rows, output in zip(parts, outputs, strict=True):
        whole[upload(rows, whole.device), : output.shape[1]] = output.float()
    return whole
