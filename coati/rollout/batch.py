"""Samples as tensors, and the experience that PPO and its relatives are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from coati.data import TokenSequence
from coati.samples import Sample
from coati.transfer import to_device, upload

Heads = list[tuple[np.ndarray, np.ndarray]]
Batch = TypeVar("Batch", "RolloutBatch", "Experience")


@dataclass(frozen=True)
class RolloutBatch:
    """Finished, scored samples, a row each, padded on the right.

    Per-token tensors are `[batch, seq]` and aligned with the tokens.

    Attributes:
        samples: what the rows were made of.
        input_ids: int64.
        attention_mask: bool, False on padding.
        response_mask: bool, True on the tokens that the policy sampled; they may be in several parts.
        sampling_log_probs: float32, of those tokens at sampling; 0 elsewhere.
        token_rewards: float32, 0 outside the response.
        lengths: tokens of each row, on the host.
        finished: bool `[batch]`, the response ended by itself.
        scores: float32 `[batch]`, the rewards of whole responses.
        temperature: of the distribution that was sampled from; all log-probs are of it.
        critic_rows: the responses after the critic's own prompts; None where it reads what the policy does.
        heads, routing: of each sample, see there; None where they were not asked for.
    """

    samples: list[Sample]
    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    sampling_log_probs: Tensor
    token_rewards: Tensor
    lengths: list[int]
    finished: Tensor
    scores: Tensor
    temperature: float
    critic_rows: list[TokenSequence] | None = None
    heads: list[Heads] | None = None
    routing: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Sequence[int]) -> "RolloutBatch":
        """Some rows, without the columns that only other rows need."""
        return select_rows(self, index)

    @property
    def observed(self) -> Tensor:
        """bool `[batch, seq]`, True on what the policy read after its first response: what its environment said, with
        what the chat template writes around that."""
        has_begun = self.response_mask.cumsum(1) > 0
        return self.attention_mask & has_begun & ~self.response_mask

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], pad_id: int, temperature: float, device: torch.device
    ) -> "RolloutBatch":
        """A row per sample; each must have log-probs."""
        lengths = [len(sample.tokens) for sample in samples]
        shape = (len(samples), max(lengths))
        input_ids = torch.full(shape, pad_id)
        attention_mask, response_mask = torch.zeros(2, *shape, dtype=torch.bool)
        log_probs, token_rewards = torch.zeros(2, *shape)
        for i, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            input_ids[i, :length] = torch.tensor(sample.tokens)
            attention_mask[i, :length] = True
            response_mask[i, :length] = torch.tensor(sample.response_mask)
            log_probs[i, :length] = torch.tensor(sample.log_probs)
            if sample.token_rewards is not None:
                token_rewards[i, :length] = torch.tensor(sample.token_rewards)
        return cls(
            samples=list(samples),
            input_ids=to_device(input_ids, device),
            attention_mask=to_device(attention_mask, device),
            response_mask=to_device(response_mask, device),
            sampling_log_probs=to_device(log_probs, device),
            token_rewards=to_device(token_rewards, device),
            lengths=lengths,
            finished=upload([not sample.truncated for sample in samples], device, torch.bool),
            scores=upload([sample.score for sample in samples], device, torch.float32),
            temperature=temperature,
            heads=[sample.heads for sample in samples] if any(sample.heads for sample in samples) else None,
            routing=None if samples[0].routing is None else [sample.routing for sample in samples],
        )


@dataclass(frozen=True)
class Experience:
    """Responses with everything that a policy is trained on, a row each, padded on the right.

    Per-token tensors are float32 `[batch, seq]`, aligned with the tokens and meaningless outside `response_mask`.

    Attributes:
        input_ids, attention_mask, lengths, temperature: as `RolloutBatch` has them.
        response_mask: bool `[batch, seq]`, the tokens that are trained on.
        log_probs: of the policy that sampled, as training computes them.
        sampling_log_probs: as sampling computed them.
        reference_log_probs: of the reference model.
        advantages: of the policy's loss.
        values, returns: the critic's estimate before each token, and its targets; None without a critic.
        observed: bool `[batch, seq]`, tokens of the environment that are learned too; None for none.
        critic_rows, heads, routing: as `RolloutBatch` has them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    lengths: list[int]
    temperature: float
    log_probs: Tensor
    sampling_log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    observed: Tensor | None = None
    critic_rows: list[TokenSequence] | None = None
    heads: list[Heads] | None = None
    routing: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Sequence[int]) -> "Experience":
        """Some rows, without the columns that only other rows need."""
        return select_rows(self, index)

    @classmethod
    def from_batch(
        cls,
        batch: RolloutBatch,
        learned: Tensor,
        log_probs: Tensor,
        reference_log_probs: Tensor,
        advantages: Tensor,
        values: Tensor | None = None,
        returns: Tensor | None = None,
    ) -> "Experience":
        """A batch with log-probs, advantages and values, all `[batch, seq]`.

        Args:
            learned: the response tokens to train on.
        """
        return cls(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            response_mask=learned,
            lengths=batch.lengths,
            temperature=batch.temperature,
            log_probs=log_probs,
            sampling_log_probs=batch.sampling_log_probs,
            reference_log_probs=reference_log_probs,
            advantages=advantages,
            values=values,
            returns=returns,
            critic_rows=batch.critic_rows,
            heads=batch.heads,
            routing=batch.routing,
        )


def head_ids(heads: Sequence[Heads], sampled: Tensor) -> Tensor:
    """Ids of the tokens that were most likely where each token was sampled, int64 `[batch, seq, heads]`, on the device
    of `sampled`; 0 elsewhere.

    Args:
        heads: of each row's sampled tokens, see `Sample`.
        sampled: bool `[batch, seq]`, where these are.
    """
    return _placed([ids for row in heads for ids, _ in row], sampled, torch.long)


def head_log_probs(heads: Sequence[Heads], sampled: Tensor) -> Tensor:
    """The log-probs of `head_ids`, float32 of the same shape; 0 elsewhere."""
    return _placed([log_probs for row in heads for _, log_probs in row], sampled, torch.float32)


def padded_routing(rows: Sequence[np.ndarray], shape: torch.Size, device: torch.device) -> Tensor:
    """The experts of a batch's tokens, int64 `[batch, seq, layers, k]`; -1 where they are not known.

    Args:
        rows: of each sample, see there.
        shape: `[batch, seq]`.
    """
    padded = np.full((*shape, *rows[0].shape[1:]), -1, np.int16)
    for row, known in zip(padded, rows, strict=True):
        row[: len(known)] = known
    return to_device(torch.from_numpy(padded), device).long()


def _placed(tokens: list[np.ndarray], sampled: Tensor, dtype: torch.dtype) -> Tensor:
    """What each sampled token has, `[heads]`, at its place, `[batch, seq, heads]`."""
    values = torch.from_numpy(np.stack(tokens)).to(dtype)
    placed = torch.zeros(*sampled.shape, values.shape[1], dtype=dtype, device=sampled.device)
    placed[sampled] = to_device(values, sampled.device)
    return placed


def select_rows(batch: Batch, index: Sequence[int]) -> Batch:
    """Some rows of a batch, truncated to the longest of them."""
    index = list(index)
    rows = upload(index, batch.input_ids.device)
    longest = max(batch.lengths[i] for i in index)
    selected = {}
    for name in (field.name for field in fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, list):
            selected[name] = [value[i] for i in index]
        elif isinstance(value, Tensor):
            some = value[rows]
            selected[name] = some[:, :longest] if some.ndim == 2 else some
    return replace(batch, **selected)
