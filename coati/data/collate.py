"""Batches of tensors, padded to the longest row of the batch.

Attention masks come from lengths and never from comparing ids with the pad id, which may be the EOS id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from coati.data.tokenize import PreferenceSample, ScoredSample, StepwiseSample, TokenSequence, UnpairedSample
from coati.transfer import to_device


@dataclass(frozen=True)
class _Batch:
    def to(self, device: torch.device | str):
        """The same batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: x if x is None else to_device(x, device) for name, x in values.items()})


@dataclass(frozen=True)
class SFTBatch(_Batch):
    """Right-padded. `input_ids` long, `attention_mask` bool, `loss_mask` bool, all `[batch, seq]`."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class PreferenceBatch(_Batch):
    """Right-padded. As `SFTBatch` with `[2 * batch, seq]`, chosen rows first; `margin` float32 `[batch]`,
    `tie` bool `[batch]`.

    `reference` `[2 * batch]`: sums of the responses' log-probs under a reference policy, if a trainer has put them in.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    margin: Tensor
    tie: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class UnpairedBatch(_Batch):
    """Right-padded, as `SFTBatch`; `desirable` bool `[batch]`. A trainer puts in `reference` `[batch]`, as in
    `PreferenceBatch`, and `kl`, a number: how far the policy is from the reference on the global batch."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    desirable: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None


@dataclass(frozen=True)
class StepwiseBatch(_Batch):
    """Right-padded, as `SFTBatch`; `labels` float32 `[batch, seq]` of steps at their last tokens, NaN at others;
    `step_mask` bool `[batch, seq]`, True on the last token of each labeled step."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    labels: Tensor
    step_mask: Tensor


@dataclass(frozen=True)
class ScoredBatch(_Batch):
    """Right-padded, as `SFTBatch`; `scores` float32 `[batch, objectives]`, NaN where there is none; `given` bool
    `[batch, objectives]`, where there is one."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    scores: Tensor
    given: Tensor


def collate_sft(samples: Sequence[TokenSequence], pad_id: int, multiple_of: int = 1) -> SFTBatch:
    """`[batch, seq]`, where seq is the longest row's length rounded up to a multiple of `multiple_of`."""
    input_ids, attention_mask = _pad([s.input_ids for s in samples], pad_id, multiple_of)
    loss_mask, _ = _pad([s.loss_mask for s in samples], False, multiple_of)
    return SFTBatch(input_ids, attention_mask, loss_mask.bool())


def collate_preference(samples: Sequence[PreferenceSample], pad_id: int, multiple_of: int = 1) -> PreferenceBatch:
    """`[2 * batch, seq]`: all chosen rows, then all rejected rows in the same order."""
    sides = [s.chosen for s in samples] + [s.rejected for s in samples]
    both = collate_sft(sides, pad_id, multiple_of)
    margin = torch.tensor([s.margin for s in samples], dtype=torch.float32)
    tie = torch.tensor([s.tie for s in samples])
    return PreferenceBatch(both.input_ids, both.attention_mask, both.loss_mask, margin, tie)


def collate_unpaired(samples: Sequence[UnpairedSample], pad_id: int, multiple_of: int = 1) -> UnpairedBatch:
    """`[batch, seq]`, as `collate_sft`."""
    rows = collate_sft([s.sequence for s in samples], pad_id, multiple_of)
    desirable = torch.tensor([s.desirable for s in samples])
    return UnpairedBatch(rows.input_ids, rows.attention_mask, rows.loss_mask, desirable)


def collate_stepwise(samples: Sequence[StepwiseSample], pad_id: int, multiple_of: int = 1) -> StepwiseBatch:
    """`[batch, seq]`, as `collate_sft`."""
    rows = collate_sft([s.sequence for s in samples], pad_id, multiple_of)
    labels = torch.full(rows.input_ids.shape, torch.nan)
    for i, sample in enumerate(samples):
        labels[i, : len(sample)] = torch.tensor(sample.labels)
    return StepwiseBatch(rows.input_ids, rows.attention_mask, rows.loss_mask, labels, ~labels.isnan())


def collate_scored(samples: Sequence[ScoredSample], pad_id: int, multiple_of: int = 1) -> ScoredBatch:
    """`[batch, seq]`, as `collate_sft`."""
    rows = collate_sft([s.sequence for s in samples], pad_id, multiple_of)
    scores = torch.tensor([s.scores for s in samples], dtype=torch.float32)
    return ScoredBatch(rows.input_ids, rows.attention_mask, rows.loss_mask, scores, ~scores.isnan())


def _pad(rows: list[list], fill: int, multiple_of: int) -> tuple[Tensor, Tensor]:
    """Values long `[batch, seq]` and where they are real, bool `[batch, seq]`."""
    width = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    values = torch.full((len(rows), width), fill, dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        real[i, : len(row)] = True
    return values, real
