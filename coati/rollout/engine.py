"""Generation with continuous batching: a finished row leaves at once, and a waiting prompt takes its place.

The engine knows token ids only: prompts in; sampled ids, their log-probs and finish reasons out.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.errors import UserError
from coati.rollout.config import GenerationConfig
from coati.rollout.few_rows import quick_products
from coati.rollout.prompts import never_ids, pad_left
from coati.rollout.sampling import Sampler


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: token ids.
        seed: of this answer's random numbers: the same seed gives the same answer in any batch.
        max_new_tokens: its longest response, if not that of the configuration.
    """

    prompt: Sequence[int]
    seed: int | Sequence[int] = 0
    max_new_tokens: int | None = None


@dataclass
class Completion:
    """An answer.

    Attributes:
        ids: the sampled tokens, EOS included.
        log_probs: of those tokens, nats, by the model at the sampling temperature (before top-k and the like); None
            after beam search.
        finish_reason: "eos", "stop" (a stop string or id) or "length".
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = field(default_factory=list)
    finish_reason: str = ""


OnDone = Callable[[int, Completion], None]


def report(completions: list[Completion], on_done: OnDone | None) -> list[Completion]:
    """The completions, each of which is reported."""
    for i, completion in enumerate(completions if on_done else ()):
        on_done(i, completion)
    return completions


@dataclass
class _Row:
    """A request under way. Its tokens stand in the columns from `start` on."""

    index: int
    request: Request
    limit: int
    uniform: np.ndarray
    completion: Completion
    start: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.completion.ids)


@dataclass
class Prefilled:
    """A row of a batch of prompts that the model has read."""

    cache: Any  # a DynamicCache
    index: int
    logits: Tensor
    row: _Row


class RolloutEngine:
    """Answers requests with the weights that `model` has now.

    Args:
        model: an `Actor` with all its weights at hand (`Engine.full()`).
        eos_ids: tokens that end a response.
        stop: says which rows end for another reason, from their responses so far; asked after every token.
        slots: rows that are generated together.
        prefill_tokens: prompt tokens, padding included, that the model reads at a time.
    """

    def __init__(
        self,
        model,
        config: GenerationConfig,
        *,
        eos_ids: list[int],
        stop: Callable[[list[list[int]]], list[bool]] | None = None,
        slots: int = 256,
        prefill_tokens: int = 8192,
    ):
        self.model, self.config, self.eos_ids, self.stop = model, config, set(eos_ids), stop
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.device = next(model.parameters()).device
        self.sampler = Sampler(config, eos_ids, self.device, never_ids(model))

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], on_done: OnDone | None = None) -> list[Completion]:
        """One completion a request, in their order.

        Args:
            on_done: called with a request's place and its completion as soon as that has ended.

        Raises:
            UserError: an empty prompt.
        """
        self.on_done = on_done
        rows = [self.row(i, request) for i, request in enumerate(requests)]
        if not rows:
            return []
        training = self.model.training
        self.model.eval()
        try:
            with quick_products(self.model):
                self.run(rows)
        finally:
            self.model.train(training)
        return [row.completion for row in rows]

    def row(self, i: int, request: Request) -> _Row:
        if not len(request.prompt):
            raise UserError(f"prompt {i} is empty: generation starts from at least one token")
        limit = self.config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        return _Row(i, request, limit, np.random.default_rng(request.seed).random(limit, np.float32), Completion())

    def run(self, rows: list[_Row]):
        from coati.rollout.cache import SlotCache  # imports transformers

        # equal prompts become neighbours and are read once; like lengths share a batch
        waiting = self.prefill(sorted(rows, key=lambda row: (len(row.request.prompt), *row.request.prompt)))
        self.longest_prompt = max(len(row.request.prompt) for row in rows)
        length = self.longest_prompt + max(row.limit for row in rows)
        if len(rows) > self.slots:  # with columns to spare, moving everything to the left is rare
            length += max(64, length // 4)
        self.cache = SlotCache(min(self.slots, len(rows)), length)
        self.cache.end = self.cache.start = self.longest_prompt
        self.rows: list[_Row] = []
        self.ready: deque[Prefilled] = deque()
        while True:
            self.admit(waiting)
            if not self.rows:
                break
            self.step()

    # --- prompts

    def prefill(self, rows: list[_Row]) -> Iterator[list[Prefilled]]:
        """The model reads prompts, a batch at a time and as late as possible."""
        from transformers import DynamicCache

        samples = [list(group) for _, group in groupby(rows, key=lambda row: tuple(row.request.prompt))]
        while samples:
            count, batch = 0, []
            while samples and len(batch) < self.slots:
                longest = len(samples[0][0].request.prompt)  # they come sorted
                if batch and (count + 1) * longest > self.prefill_tokens:
                    break
                count += 1
                batch.append(samples.pop(0))
            ids, mask = pad_left([list(group[0].request.prompt) for group in batch], 0, self.device)
            cache = DynamicCache()
            logits = self.model.next_logits(ids, mask, (mask.long().cumsum(1) - 1).clamp(min=0), cache)
            yield [Prefilled(cache, i, logits, row) for i, group in enumerate(batch) for row in group]

    def admit(self, waiting: Iterator[list[Prefilled]]):
        """Fills free slots; a response that ends with its first token never takes one."""
        while len(self.rows) < self.cache.slots:
            if not self.ready:
                self.ready.extend(next(waiting, []))
            if not self.ready:
                return
            free = self.cache.slots - len(self.rows)
            new = [self.ready.popleft() for _ in range(min(free, len(self.ready)))]
            logits = torch.cat([p.logits[p.index : p.index + 1] for p in new])
            ended = self.extend([p.row for p in new], logits)
            if not self.rows:
                self.cache.start = self.cache.end = self.longest_prompt
            # they were prefilled together or in a few batches
            stay = [p for p, end in zip(new, ended, strict=True) if not end]
            for _, group in groupby(stay, key=lambda p: id(p.cache)):
                part = list(group)
                self.cache.place(part[0].cache, [p.index for p in part])
            for p in stay:
                p.row.start = self.cache.end - len(p.row.request.prompt)
            self.rows += [p.row for p in stay]
            self.describe_rows()

    # --- tokens

    def step(self):
        """One more token for every row."""
        cache = self.cache
        if cache.end == cache.length:
            distance = cache.move_columns(max(cache.end - cache.start, self.longest_prompt))
            for row in self.rows:
                row.start -= distance
            self.describe_rows()
        columns = torch.arange(cache.start, cache.end + 1, device=self.device)
        mask = columns >= self.starts[:, None]
        tokens = torch.tensor([[row.completion.ids[-1]] for row in self.rows], device=self.device)
        next_logits = self.model.compiled_next_logits if self.config.compile_generation else self.model.next_logits
        logits = next_logits(tokens, mask, cache.end - self.starts[:, None], cache)
        cache.end += 1
        self.retire(self.extend(self.rows, logits))

    def extend(self, rows: list[_Row], logits: Tensor) -> list[bool]:
        """Draws a token for each row; says which rows have ended."""
        counts = [len(row.completion.ids) for row in rows]
        uniform = torch.tensor([row.uniform[n] for row, n in zip(rows, counts, strict=True)], device=self.device)
        too_short = torch.tensor([n < self.config.min_new_tokens for n in counts], device=self.device)
        tokens, log_probs = self.sampler(logits, uniform, too_short, self.seen(rows, logits))
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            row.completion.ids.append(token)
            row.completion.log_probs.append(log_prob)
        stopped = self.stop([row.completion.ids for row in rows]) if self.stop else [False] * len(rows)
        for row, stop in zip(rows, stopped, strict=True):
            row.completion.finish_reason = self.finish_reason(row, stop)
            if row.completion.finish_reason and self.on_done:
                self.on_done(row.index, row.completion)
        return [bool(row.completion.finish_reason) for row in rows]

    def finish_reason(self, row: _Row, stop: bool) -> str:
        if row.completion.ids[-1] in self.eos_ids:
            return "eos"
        if stop:
            return "stop"
        return "length" if len(row.completion.ids) == row.limit else ""

    def seen(self, rows: list[_Row], logits: Tensor) -> Tensor | None:
        if self.config.repetition_penalty == 1:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
        for i, row in enumerate(rows):
            seen[i, torch.tensor([*row.request.prompt, *row.completion.ids], device=self.device)] = True
        return seen

    def retire(self, ended: list[bool]):
        """Ended rows leave; the last ones move to their slots."""
        if not any(ended):
            return
        remain = ended.count(False)
        holes = [i for i in range(remain) if ended[i]]
        movers = [i for i in range(remain, len(ended)) if not ended[i]]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[remain:]
        self.cache.move_rows(movers, holes, remain)
        self.describe_rows()

    def describe_rows(self):
        """After rows have come, gone or moved."""
        starts = [row.start for row in self.rows]
        self.starts = torch.tensor(starts, device=self.device)
        self.cache.start = min(starts, default=self.cache.end)
