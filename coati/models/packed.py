"""Rows packed into one row: those with a shared prefix, which goes through the model once, and any rows without their
padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.errors import UserError
from coati.models.experts import is_experts


@dataclass(frozen=True)
class PackedRows:
    """The real tokens of a batch's rows, one row after the other. Each is a document of its own, as positions begin
    again, so that attention doesn't reach from one to the next.

    Attributes:
        input_ids, position_ids: long `[1, tokens]`.
        places: rows and columns of the tokens in the batch, long `[tokens]` each.
        index: long `[batch, seq]`, which of the tokens is there; anything for padding.
        lengths: int32 `[batch]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: tuple[Tensor, Tensor]
    index: Tensor
    lengths: Tensor

    @classmethod
    def from_rows(cls, input_ids: Tensor, attention_mask: Tensor) -> "PackedRows":
        """From `[batch, seq]`, padded on either side."""
        real = attention_mask.bool()
        places = real.nonzero(as_tuple=True)
        positions = real.long().cumsum(1) - 1
        index = (real.flatten().long().cumsum(0) - 1).clamp(min=0).view(real.shape)
        lengths = real.sum(1, dtype=torch.int32)
        return cls(input_ids[places][None], positions[places][None], places, index, lengths)

    def inputs(self, attention: str) -> dict[str, Any]:
        """Keywords of `BaseModel.run`. Kernels for rows of different lengths are told where these end, or each layer
        would look for it.

        Args:
            attention: its implementation in transformers.
        """
        inputs: dict[str, Any] = dict(input_ids=self.input_ids, attention_mask=None, position_ids=self.position_ids)
        if attention == "flash_attention_2":
            ends = torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
            longest = int(self.lengths.max())
            inputs |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
        return inputs

    def pack(self, values: Tensor) -> Tensor:
        """`[batch, seq, ...]` as `[1, tokens, ...]`."""
        return values[self.places][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[1, tokens, ...]` as `[batch, seq, ...]`; padding holds anything."""
        return packed[0, self.index]


@dataclass(frozen=True)
class PackedGroups:
    """The shared prefix of a group of rows, and then the rest of each row, one after the other.

    Attributes:
        input_ids, position_ids: long `[groups, packed]`; a token keeps the position it has in its own row.
        owner: long `[groups, packed]`, which of its group's rows each token is of; -1 for what is shared, and padding.
        packed_index: long `[group_size * groups, seq]`, where in its packed row each token of the batch is; anywhere
            for padding.
        real: bool `[group_size * groups, seq]`, the tokens of the batch that are no padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    owner: Tensor
    packed_index: Tensor
    real: Tensor

    @classmethod
    def from_rows(cls, input_ids: Tensor, attention_mask: Tensor, group_size: int) -> "PackedGroups":
        """From `[group_size * groups, seq]`, right-padded: the groups' first rows, then their second rows, ..."""
        ids, real = (torch.stack(x.chunk(group_size), 1) for x in (input_ids, attention_mask.bool()))
        groups, _, seq = ids.shape
        alike = ((ids == ids[:, :1]) & real).all(1)
        shared = alike.long().cumprod(1).sum(1)[:, None, None]
        column = torch.arange(seq, device=ids.device).expand_as(ids)
        is_own = real & (column >= shared)
        lengths = is_own.sum(2, keepdim=True)
        starts = shared + lengths.cumsum(1) - lengths
        packed_index = torch.where(column < shared, column, starts + column - shared)
        width = int((shared + lengths.sum(1, keepdim=True)).max())

        def pack(values: Tensor, fill: int) -> Tensor:
            packed = values.new_full((groups, width + 1), fill)  # the last column is for padding
            return packed.scatter_(1, packed_index.where(real, width).flatten(1), values.flatten(1))[:, :width]

        member = torch.arange(group_size, device=ids.device)[:, None].where(is_own, -1)  # what is shared has none
        index_by_row = packed_index.clamp(max=width - 1).transpose(0, 1).flatten(0, 1)
        return cls(pack(ids, 0), pack(column, 0), pack(member, -1), index_by_row, attention_mask.bool())

    @property
    def sees(self) -> Callable[..., Tensor]:
        """Whether a token of a packed row sees another: a function of the numbers of the row, a head and the two."""
        owner = self.owner

        def sees(row, head, token, other):
            # padding comes last: no real token sees it
            return ((owner[row, other] == owner[row, token]) | (owner[row, other] < 0)) & (other <= token)

        return sees

    @property
    def visible(self) -> Tensor:
        """Bool `[groups, 1, packed, packed]`, which token (last but one dimension) sees which (last): those of its own
        row up to itself."""
        (groups, packed), device = self.owner.shape, self.owner.device
        row, token = torch.arange(groups, device=device), torch.arange(packed, device=device)
        return self.sees(row[:, None, None], None, token[:, None], token)[:, None]

    def inputs(self, dtype: torch.dtype, attention: str) -> dict[str, Any]:
        """Ids, mask, and positions: keywords of `BaseModel.run`.

        Args:
            dtype: of the model.
            attention: its implementation in transformers. `flex_attention` (2412.05496) gets a mask by blocks and skips
                those that nobody sees; others get what is added to the scores, `[groups, 1, packed, packed]`.
        """
        mask: Any
        if attention == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            groups, packed = self.owner.shape
            mask = create_block_mask(self.sees, groups, None, packed, packed, device=self.owner.device)
        else:
            visible = self.visible
            mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}

    @property
    def multiplicity(self) -> Tensor:
        """How many real tokens of the batch each packed one stands for: float `[groups, packed]`."""
        groups, times = len(self.input_ids), torch.zeros(self.input_ids.shape, device=self.real.device)
        for index, real in zip(self.packed_index.split(groups), self.real.float().split(groups), strict=True):
            times.scatter_add_(1, index, real)
        return times

    def pack(self, values: Tensor) -> Tensor:
        """`[group_size * groups, seq, ...]` as `[groups, packed, ...]`, -1 for padding; of what is shared, that of a
        group's last row."""
        groups = len(self.input_ids)
        packed = values.new_full((*self.input_ids.shape, *values.shape[2:]), -1)
        members = (values, self.packed_index, self.real)
        for own, index, real in zip(*(x.split(groups) for x in members), strict=True):
            rows, columns = real.nonzero(as_tuple=True)
            packed[rows, index[rows, columns]] = own[rows, columns]
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """`[groups, packed, ...]` as `[group_size * groups, seq, ...]`; padding holds anything."""
        rows = torch.arange(len(packed), device=packed.device).repeat(len(self.packed_index) // len(packed))
        return packed[rows[:, None], self.packed_index]


def check_isolation(
    model, forward_all: Callable[[list[dict]], list[Tensor]], device: torch.device, wants_targets: bool = False
):
    """Raises for a model in which rows that are packed without padding would see one another: what it gives for the
    second of two rows must not depend on the first, but for rounding where experts work on tokens of both.

    Args:
        forward_all: calls it with each of several inputs.
        wants_targets: the model must be told which tokens are wanted.
    """
    if model.takes_positions:
        rows = torch.tensor([[[1, 2, 3, 4], [1, 3, 2, 4]], [[2, 1, 4, 3], [1, 3, 2, 4]]], device=device)
        real = torch.tensor([[True] * 4, [True, True, True, False]], device=device)
        inputs = dict(attention_mask=real, right_padded=True) | ({"targets": real} if wants_targets else {})
        training = model.training
        model.eval()  # dropout would change everything
        outputs = forward_all([dict(input_ids=ids, **inputs) for ids in rows])
        model.train(training)
        change = (outputs[0].float() - outputs[1].float()).abs()
        of_first = 3 if wants_targets else 1  # with targets, what predicts three of them
        rounding = 0.02 * change[:of_first].max() if any(map(is_experts, model.modules())) else 0.0
        if change[of_first:].max() <= rounding < change[:of_first].max():
            return
    name, attention = type(model.transformer).__name__, model.config._attn_implementation
    raise UserError(f"{name} with {attention} attention can't read rows without padding: leave padding_free out")


MAX_KL = 0.02  # per token: bf16 gives some 0.001, an unsupported model ten times the bound
MAX_REWARD_ERROR = 0.15  # in standard deviations of the rewards: bf16 gives up to 0.08, an unsupported model 0.25


def check_packing(model, forward_all: Callable[[list[dict]], list[Tensor]], batches: list[dict], exact: bool):
    """Raises for an `Actor` whose log-probs, or a `RewardModel` whose rewards, change when a shared prefix is read
    once: with windows or biases by distance, and with kernels that take no mask.

    Args:
        forward_all: calls it with each of several inputs.
        batches: inputs of calls with `shared_prefix_group`, of an `Actor` with `targets`.
        exact: it computes in float32. In lower precision rounding alone moves outputs, an unlikely token's log-prob
            far, so what counts is the mean over tokens (k3 between the two), or over rewards.
    """
    attention = model.config._attn_implementation
    if attention in ("sdpa", "eager", "flex_attention") and model.takes_positions:
        training = model.training
        model.eval()  # dropout would change everything
        outputs = forward_all([*batches, *(inputs | {"shared_prefix_group": 1} for inputs in batches)])
        model.train(training)
        if "targets" in batches[0]:
            targets = [inputs["targets"] for inputs in batches]
            outputs = [output[wanted] for output, wanted in zip(outputs, targets * 2, strict=True)]
            agree = log_probs_agree
        else:
            agree = rewards_agree
        once, separately = torch.cat(outputs).chunk(2)
        if agree(once, separately, exact):
            return
    name = type(model.transformer).__name__
    raise UserError(f"{name} with {attention} attention can't read a prompt once for all: leave share_prompts out")


def log_probs_agree(once: Tensor, separately: Tensor, exact: bool) -> bool:
    """Whether log-probs `[tokens]` differ by rounding only."""
    difference = once - separately
    if exact:
        return bool(difference.abs().max() < 1e-3)
    return bool((difference.exp() - 1 - difference).mean() < MAX_KL)


def rewards_agree(once: Tensor, separately: Tensor, exact: bool) -> bool:
    """Whether rewards `[rows]` differ by rounding only, beside how they differ from row to row."""
    error = (once - separately).square().mean().sqrt()
    return bool(error <= (1e-3 if exact else MAX_REWARD_ERROR) * separately.std())
