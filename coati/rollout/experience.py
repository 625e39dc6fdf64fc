"""What PPO and GRPO learn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from coati.rollout.generate import Rollout
from coati.transfer import to_device, upload

Batch = TypeVar("Batch", "Experience", Rollout)


@dataclass(frozen=True)
class Experience:
    """Responses with everything known about them, one row a response, padding on the right.

    Per-token tensors are `[batch, seq]`, aligned with the tokens and meaningless outside `response_mask`.

    Attributes:
        input_ids: int64; attention_mask, response_mask: bool.
        log_probs: float32, of the policy that sampled, computed by the trainer's own forward pass.
        reference_log_probs: float32, of the reference model.
        rewards: float32, after KL penalty and shaping.
        advantages: float32.
        scores: float32 `[batch]`, the reward of each response.
        values, returns: float32, the critic's estimate before each token and what it learns; None without a critic.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    scores: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: list[int] | Tensor) -> "Experience":
        """Some rows, cut to the longest of them."""
        return take_rows(self, index)


def take_rows(batch: Batch, index: list[int] | Tensor, seq: int | None = None) -> Batch:
    """Some rows of an experience or a rollout, cut to the longest of them.

    Args:
        seq: the longest one's length, where the host knows it; else it waits for the device to tell.
    """
    if not isinstance(index, Tensor):
        index = upload(index, batch.input_ids.device)
    if seq is None:
        seq = int(batch.attention_mask[index].sum(1).max())
    tensors = {f.name: x for f in fields(batch) if (x := getattr(batch, f.name)) is not None}
    cut = {name: x[index] for name, x in tensors.items()}
    return replace(batch, **{name: x[:, :seq] if x.ndim == 2 else x for name, x in cut.items()})


def join_rows(batches: Sequence[Batch], pad_id: int, device: torch.device) -> Batch:
    """Rows of several batches, one batch after the other, with padding to the longest."""
    seq = max(batch.input_ids.shape[1] for batch in batches)
    joined = {}
    for name in (f.name for f in fields(batches[0]) if getattr(batches[0], f.name) is not None):
        fill = pad_id if name == "input_ids" else 0
        parts = [getattr(batch, name) for batch in batches]
        parts = [pad(x, (0, seq - x.shape[1]), value=fill) if x.ndim == 2 else x for x in parts]
        joined[name] = to_device(torch.cat(parts), device)
    return replace(batches[0], **joined)


@dataclass(frozen=True)
class MicroBatches:
    """A rollout's rows for forward passes: those of like length together, without the padding that they don't need.

    With `members`, a micro-batch has the first rows of some groups, their second ones and so on.
    """

    rollout: Rollout
    rows: Sequence[list[int]]
    members: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each of the rollout's rows."""
        return self.rollout.attention_mask.sum(1).tolist()

    def sample(self, i: int) -> "MicroBatches":
        """An eighth of one micro-batch, of whole groups; of all in turn, as `i` goes on."""
        turn, which = divmod(i, len(self.rows))
        rows, groups = self.rows[which], len(self.rows[which]) // self.members
        chosen = range(turn % min(8, groups), groups, 8)
        return replace(self, rows=[[rows[k + i] for k in range(0, len(rows), groups) for i in chosen]])

    def mask(self) -> Tensor:
        """Which rows of the rollout are there, bool `[batch]`."""
        mask = torch.zeros(len(self.rollout.input_ids), dtype=torch.bool, device=self.rollout.input_ids.device)
        mask[upload([row for rows in self.rows for row in rows], mask.device)] = True
        return mask

    def __iter__(self) -> Iterator[Rollout]:
        for rows in self.rows:
            yield take_rows(self.rollout, rows, max(self.lengths[row] for row in rows))

    def restore(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs `[rows, seq]` of the micro-batches in the rollout's order, float32 `[batch, seq]`; 0 elsewhere."""
        whole = torch.zeros(self.rollout.input_ids.shape, device=self.rollout.input_ids.device)
        for rows, output in zip(self.rows, outputs, strict=True):
            whole[upload(rows, whole.device), : output.shape[1]] = output
        return whole
