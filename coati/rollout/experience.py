"""What PPO learns from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from coati.rollout.generate import Rollout


@dataclass(frozen=True)
class Experience:
    """Responses with everything known about them, one row a response, padding on the right.

    Per-token tensors are `[batch, seq]`, aligned with the tokens and meaningless outside `response_mask`.

    Attributes:
        input_ids: int64; attention_mask, response_mask: bool.
        log_probs: float32, of the policy that sampled, computed by the trainer's own forward pass.
        reference_log_probs: float32, of the reference model.
        values: float32, the critic's estimate before each token.
        rewards: float32, after KL penalty and shaping.
        advantages, returns: float32.
        scores: float32 `[batch]`, the reward of each response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: list[int] | Tensor) -> "Experience":
        """Some rows, cut to the longest of them."""
        index = torch.as_tensor(index, device=self.input_ids.device)
        seq = int(self.attention_mask[index].sum(1).max())
        cut = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        return replace(self, **{name: x[:, :seq] if x.ndim == 2 else x for name, x in cut.items()})


@dataclass(frozen=True)
class MicroBatches:
    """A rollout's rows for forward passes: those of like length together, without the padding that they don't need."""

    rollout: Rollout
    rows: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> "MicroBatches":
        """An eighth of one micro-batch; of all in turn, as `i` goes on."""
        turn, which = divmod(i, len(self.rows))
        rows = self.rows[which]
        return replace(self, rows=[rows[turn % min(8, len(rows)) :: 8]])

    def mask(self) -> Tensor:
        """Which rows of the rollout are there, bool `[batch]`."""
        mask = torch.zeros(len(self.rollout.input_ids), dtype=torch.bool, device=self.rollout.input_ids.device)
        mask[[row for rows in self.rows for row in rows]] = True
        return mask

    def __iter__(self) -> Iterator[Rollout]:
        for rows in self.rows:
            seq = int(self.rollout.attention_mask[rows].sum(1).max())
            cut = {f.name: getattr(self.rollout, f.name)[rows] for f in fields(self.rollout)}
            yield replace(self.rollout, **{name: x[:, :seq] if x.ndim == 2 else x for name, x in cut.items()})

    def restore(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs `[rows, seq]` of the micro-batches in the rollout's order, float32 `[batch, seq]`; 0 elsewhere."""
        whole = torch.zeros(self.rollout.input_ids.shape, device=self.rollout.input_ids.device)
        for rows, output in zip(self.rows, outputs, strict=True):
            whole[rows, : output.shape[1]] = output
        return whole
