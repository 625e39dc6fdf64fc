"""Log-probs of given continuations, with each distinct token computed once.

Rows of a task have a common prefix (few-shot examples): it is read once, and its KV cache is shared by the rows, which
are read in batches of like length, padded between prefix and rest. Which rows share a batch depends
on the rows alone, never on the number of ranks or on what was done before, so results are the same to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coati.errors import UserError
from coati.rollout.engine.reader import common_prefix_length
from coati.rollout.generate import has_kv_cache

CPU_TOKENS = 8192
LOGITS = 2**26  # at a time


@dataclass(frozen=True)
class TokenRow:
    """Token ids the model reads, `[length]` int, of which the last `count` positions are scored against `targets`.

    Attributes:
        targets: alternatives, each `[count]` token ids.
    """

    ids: np.ndarray
    count: int
    targets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """Rows, by number, that are read together after a common prefix of `prefix` tokens."""

    rows: list[int]
    prefix: int


@dataclass
class Usage:
    """Tokens that went through the model: `read`, and `padding` beside them."""

    read: int = 0
    padding: int = 0


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold.

    Attributes:
        tokens: read at a time, padding included; the KV cache holds 8 times as many.
        vocabulary: logits per position.
        shares_prefix: whether rows can share a prefix's KV cache.
        batches_rows: whether it can read several rows at a time.
    """

    tokens: int
    vocabulary: int
    shares_prefix: bool = True
    batches_rows: bool = True

    def holds(self, n: int, longest: int, prefix: int, count: int) -> bool:
        """Whether there is room for `n` rows, the longest of so many tokens, of which `count` are scored."""
        fits = n * (longest - prefix) <= self.tokens and n * longest <= 8 * self.tokens
        return n == 1 or (self.batches_rows and fits and n * count * self.vocabulary <= LOGITS)


def plan_batches(rows: list[TokenRow], groups: list[list[int]], limits: BatchLimits) -> list[Batch]:
    """Batches of the rows, group by group (a group is a task), longest first."""
    batches = []
    for group in groups:
        prefix = 0
        if limits.shares_prefix:
            # up to the first token that is scored in some row: it goes through the model with the row
            prefix = common_prefix_length([rows[i].ids[: len(rows[i].ids) - rows[i].count + 1].tolist() for i in group])
        current: list[int] = []
        longest = count = 0
        for i in sorted(group, key=lambda i: (-len(rows[i].ids), tuple(rows[i].ids))):
            longest = max(longest, len(rows[i].ids))
            count = max(count, rows[i].count)
            if not limits.holds(len(current) + 1, longest, prefix, count):
                batches.append(Batch(current, prefix))
                current, longest, count = [], len(rows[i].ids), rows[i].count
            current.append(i)
        batches.append(Batch(current, prefix))
    return batches


class LogProbScorer:
    """Scores rows with one model.

    Args:
        actor: a `coati.models.Actor` in evaluation mode.

    Attributes:
        batches_rows: whether rows can be padded: not so for recurrent states.
        shares_prefix: whether all its layers cache everything before.
        usage: tokens so far.
    """

    def __init__(self, actor):
        self.actor = actor
        self.device = next(actor.parameters()).device
        config = actor.transformer.config
        kinds = set(getattr(config, "layer_types", None) or {"full_attention"})
        # a sliding window counts columns, and there is padding between the prefix and the rest
        self.batches_rows = has_kv_cache(actor)
        self.shares_prefix = self.batches_rows and kinds == {"full_attention"} and not _slides(config)
        self.usage = Usage()
        self._prefix: tuple[bytes, Any] | None = None

    @torch.no_grad()
    def score(self, rows: list[TokenRow], prefix: int) -> list[list[tuple[float, bool]]]:
        """For each row and target: its log-prob in nats, and whether the greedy choice is the same all along.

        Raises:
            UserError: one row alone needs more memory than there is.
        """
        try:
            return self._score(rows, prefix)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise UserError(
                    f"a prompt of {len(rows[0].ids)} tokens does not fit into the memory of {self.device}: "
                    "lower --max_length, or use --dtype bfloat16"
                ) from error
        self._prefix = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return self.score(rows[:half], prefix) + self.score(rows[half:], prefix)

    def _score(self, rows: list[TokenRow], prefix: int) -> list[list[tuple[float, bool]]]:
        width = max(len(row.ids) for row in rows) - prefix
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), prefix + width, dtype=torch.bool)
        mask[:, :prefix] = True
        for i, row in enumerate(rows):
            rest = len(row.ids) - prefix
            ids[i, width - rest :] = torch.from_numpy(row.ids[prefix:].astype(np.int64))
            mask[i, prefix + width - rest :] = True
        self._count(mask[:, prefix:])
        last = max(row.count for row in rows)
        cache = self._prefix_cache(rows[0].ids[:prefix], len(rows)) if prefix else None
        logits = self._logits(ids, mask, last, cache)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return _read(log_probs, rows)

    def _count(self, mask: torch.Tensor) -> None:
        """Add the tokens of a batch, bool `[batch, width]`, to the usage."""
        read = int(mask.sum())
        self.usage.read += read
        self.usage.padding += mask.numel() - read

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, last: int, cache) -> torch.Tensor:
        """Logits of the last `last` positions, `[batch, last, vocabulary]`."""
        mask = mask.to(self.device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
        return self.actor.last_logits(ids.to(self.device), last, cache, mask, positions)

    def _prefix_cache(self, prefix: np.ndarray, count: int):
        """A cache that holds the prefix for `count` rows; the last prefix is kept."""
        from transformers import DynamicCache

        from coati.rollout.engine.cache import share_prefix

        if self._prefix is None or self._prefix[0] != prefix.tobytes():
            cache, ids = DynamicCache(), torch.from_numpy(prefix.astype(np.int64))[None]
            self._logits(ids, torch.ones_like(ids, dtype=torch.bool), 1, cache)
            self.usage.read += len(prefix)
            self._prefix = (prefix.tobytes(), cache)
        return share_prefix(self._prefix[1], count)


def _read(log_probs: torch.Tensor, rows: list[TokenRow]) -> list[list[tuple[float, bool]]]:
    """`[batch, last, vocabulary]` to each target's sum and whether it is the greedy choice; copied once."""
    last, greedy = log_probs.shape[1], log_probs.argmax(-1).tolist()
    positions = []
    for i, row in enumerate(rows):
        for target in row.targets:
            positions += [(i, last - row.count + t, token) for t, token in enumerate(target)]
    in_row, column, token = torch.tensor(positions, device=log_probs.device).T
    values = log_probs[in_row, column, token].double().tolist()
    by_row, start = [], 0
    for i, row in enumerate(rows):
        of_row = []
        for target in row.targets:
            end = start + len(target)
            of_row.append((sum(values[start:end]), greedy[i][last - row.count :] == list(target)))
            start = end
        by_row.append(of_row)
    return by_row


def _slides(config) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def token_budget(actor) -> int:
    """Tokens of a batch: what 60 % of a GPU's free memory holds, a power of two; `CPU_TOKENS` on a CPU.

    A token takes 8 times its KV cache (see `BatchLimits`), and some 32 activations of the hidden width.
    """
    parameter = next(actor.parameters())
    if parameter.device.type != "cuda":
        return CPU_TOKENS
    config = actor.transformer.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = parameter.element_size() * (8 * 2 * config.num_hidden_layers * heads * width + 32 * config.hidden_size)
    free = torch.cuda.mem_get_info(parameter.device)[0] * 0.6 - 3 * 4 * LOGITS
    return 2 ** int(np.log2(max(free / size, 1024)))
