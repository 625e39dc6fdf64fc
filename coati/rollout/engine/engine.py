"""Generation with continuous batching: a finished row frees its slot at once for a waiting prompt.

So it is across the turns of a conversation: what follows a response, once it is known, comes back to a slot while
others are in the middle of theirs, with the keys and values that were kept. It comes after a number of steps and not
after a time: rows that are computed together change each other's last bits, so a batch that depended on how fast
environments answer would make every run a different one. What is not known by then is waited for.

The engine knows token ids only: prompts in; sampled ids, their log-probs and finish reasons out.

The state of the rows (last token, length, KV cache) is on the device, and a step needs nothing from the host. So on a
GPU the host is a step behind: it launches a step before it has read the tokens of the previous one, and a row that
ended there is still computed once more.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.models.experts import is_experts
from coati.models.routing import RoutingNotes
from coati.rollout.engine.graphs import StepGraphs, round_up
from coati.rollout.engine.live import HEADS, LiveRequest, LiveSampler, needs_of
from coati.rollout.engine.packed_weights import packed_weights
from coati.rollout.engine.sampling import Sampler, key_of, most_likely
from coati.rollout.generator import Completion, FollowUps, OnDone, Request
from coati.rollout.prompts import pad_right, suppressed_ids
from coati.transfer import Download, upload

KEPT_SHARE = 4  # a token of a row whose states are copied counts as so many fewer tokens to read
FEWEST_PACKED = 16  # steps: with fewer, packing the weights takes longer than it saves
SHORTEST_PREFIX = 16  # a shorter common prefix of all prompts is not worth a pass of its own


@dataclass
class _Row:
    """A request in progress.

    Attributes:
        drawn: tokens that have been sampled on the device; the completion may still lack the last one.
        kept: whether its completion has states.
        routing: of the tokens that the model has read, parts of the completion's.
    """

    index: int
    request: Request
    limit: int
    key: int
    completion: Completion = field(default_factory=Completion)
    drawn: int = 0
    kept: bool = False
    routing: list[np.ndarray] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.drawn

    @property
    def response(self) -> list[int]:
        """The tokens of the response so far, those included that were there before."""
        if not self.request.begun:
            return self.completion.ids
        return [*self.request.prompt[-self.request.begun :], *self.completion.ids]

    @property
    def ended(self) -> bool:
        return self.completion.finish_reason != ""


@dataclass
class _Prefilled:
    """A row whose prompt the model has read: as row `place` of a batch, with the logits of its first token, and the
    experts that its tokens went to."""

    row: _Row
    cache: Any  # a DynamicCache
    batch_row: int
    logits: Tensor
    routing: Tensor | None = None


class _Slots:
    """The device's state of the rows in progress, by slot.

    Attributes:
        tokens: the last token of each row, int64 `[slots]`; log_probs: its log-prob, float32.
        drawn: tokens of each response so far; keys: of its noise; int64.
        heads: ids and log-probs of the tokens that were most likely where the last one was drawn, `[slots, heads]`
            each; none where they are not asked for.
        seen: for the repetition penalty, the tokens of each row, bool `[slots, vocabulary]`; else None.
        own_sampling: of rows that are live, their temperatures and nucleus masses, float32 `[slots]` each; else none.
    """

    def __init__(self, slots: int, columns: int, device: torch.device, heads: int = 0, live: bool = False):
        from coati.rollout.engine.cache import SlotCache  # imports transformers

        self.cache = SlotCache(slots, columns, device)
        self.tokens, self.drawn, self.keys = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3))
        self.log_probs = torch.zeros(slots, device=device)
        dtypes = (torch.long, torch.float32) if heads else ()
        self.heads = [torch.zeros(slots, heads, dtype=dtype, device=device) for dtype in dtypes]
        self.seen: Tensor | None = None
        self.own_sampling = [torch.ones(slots, device=device) for _ in range(2)] if live else []

    def per_slot(self) -> list[Tensor]:
        seen = [] if self.seen is None else [self.seen]
        return [self.tokens, self.drawn, self.keys, self.log_probs, *seen, *self.own_sampling]


class RolloutEngine:
    """Completes requests with the weights that `model` has now.

    Args:
        model: an `Actor` with unsharded weights (`Engine.full()`).
        eos_ids: tokens that end a response.
        stop: says which rows end for another reason, from their responses so far; asked after every token.
        slots: rows that are generated together, or fewer where the GPU has no memory for their KV cache.
        prefill_tokens: prompt tokens, padding included, that the model reads at a time.
        cuda_graphs: whether steps on a GPU may be captured.

    Keys and values are kept of completions that end with an EOS or stop (`Request.keep_states`): of as many at a time
    as there are slots, while a GPU has memory, and not where a model needs the whole mask.

    Attributes:
        prompt_tokens, padding_tokens: prompt tokens that the model has read, and padding tokens.
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
        cuda_graphs: bool = True,
    ):
        self.model, self.config, self.eos_ids, self.stop = model, config, set(eos_ids), stop
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.device = next(model.parameters()).device
        self.sampler = Sampler(config, eos_ids, self.device, suppressed_ids(model))
        self.live_sampler = LiveSampler(self.device, suppressed_ids(model))
        self.cuda_graphs = cuda_graphs and self.device.type == "cuda" and can_be_captured(model)
        self.steps_behind = 0 if self.device.type == "cpu" else 1
        self.prompt_tokens = self.padding_tokens = 0

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None, follow_ups: FollowUps | None = None
    ) -> list[Completion]:
        """One completion per request, in the order of their numbers.

        Args:
            on_done: called with a request's number and its completion as soon as that has ended.
            follow_ups: requests after these. They come before those that still wait for a slot, so that a conversation
                which has begun ends soon, and its memory is free.

        Raises:
            UserError: an empty prompt, or a response whose KV cache exceeds the GPU's memory.
        """
        self.on_done, self.follow_ups, self.poll, self.kept = on_done, follow_ups, None, 0
        self.completions: list[Completion] = []
        rows = [self.make_row(request) for request in requests]
        if not rows:
            return []
        self.notes = RoutingNotes(self.model) if requests[0].with_routing else None
        longest = max(len(row.request.prompt) + row.limit for row in rows)
        self.run(rows, max(longest, follow_ups.longest if follow_ups else 0), len(rows))
        return self.completions

    @torch.no_grad()
    def serve(self, poll: Callable[[int], list[LiveRequest] | None], longest: int):
        """Completes requests as they come, each with its own way of drawing, until there are no more. Which rows are
        computed together depends on when they come, and so do the last bits of their log-probs.

        Args:
            poll: called before every step with the number of free slots; returns so many requests at most, or None
                for the end. While no row is in progress it may wait.
            longest: tokens of a prompt with its response, at most. All slots have room for that many.

        Raises:
            UserError: as `generate`.
        """
        self.on_done, self.follow_ups, self.poll, self.kept = None, None, poll, 0
        self.notes = None
        requests: list[LiveRequest] | None = []
        while not requests:
            requests = poll(self.slots)
            if requests is None:
                return
        self.run([self.make_row(request) for request in requests], longest, self.slots)

    def make_row(self, request: Request) -> _Row:
        i = 0 if self.poll else len(self.completions)
        if not len(request.prompt):
            raise UserError(f"prompt {i} is empty: generation starts from at least one token")
        limit = self.config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        row = _Row(i, request, limit, key_of(request.seed))
        if not self.poll:
            self.completions.append(row.completion)
        self.kept += request.states is not None
        return row

    def run(self, rows: list[_Row], longest: int, most: int):
        """Completes rows and those that come after them, of `longest` tokens and so many at a time at most."""
        training = self.model.training
        self.model.eval()
        try:
            packed = packed_weights(self.model) if self.gains_from_packing(rows) else nullcontext()
            with packed, self.notes.noted() if self.notes else nullcontext():
                self.run_steps(rows, round_up(1, longest)[1], most)
        finally:
            self.model.train(training)

    def gains_from_packing(self, rows: list[_Row]) -> bool:
        """Whether there are enough steps for what packing costs. A compiled step can't read packed weights."""
        steps = max(row.limit for row in rows)
        return not self.config.compile_generation and (self.poll is not None or steps >= FEWEST_PACKED)

    def run_steps(self, rows: list[_Row], columns: int, most: int):
        self.first, self.following = self.prefill(rows), deque[Iterator[list[_Prefilled]]]()
        self.steps, self.ended = 0, deque[tuple[int, _Row]]()  # each with the period of steps that it ended in
        self.ready: deque[_Prefilled] = deque(next(self.first))
        slots = self.count_slots(self.ready[0].cache, columns, most)
        heads = min(HEADS, self.ready[0].logits.shape[-1]) if self.poll else rows[0].request.heads
        self.state = _Slots(slots, columns, self.device, heads, self.poll is not None)
        self.graphs = StepGraphs(self.decode, self.cuda_graphs)
        self.rows: list[_Row] = []
        self.downloads: deque[tuple[list[_Row], bool, Download]] = deque()
        try:
            while True:
                self.fill_slots()
                if self.rows:
                    self.step()
                    if self.follow_ups and self.steps % self.follow_ups.steps == 0:
                        self.follow_up(self.period - 2)
                elif self.downloads:
                    self.finish_download()
                elif self.ended:
                    self.follow_up(self.ended[0][0])
                elif not self.ready and self.poll is None:
                    return
                if self.poll and (self.rows or not self.downloads):
                    self.join()
        finally:
            self.state.cache.layers.clear()  # a cache refers to itself: its memory would wait for the garbage collector
            del self.state, self.graphs

    def count_slots(self, prefilled, columns: int, rows: int) -> int:
        """How many slots there are: as many as asked for, or as fit into four fifths of the GPU's free memory."""
        wanted = min(self.slots, rows)
        if self.device.type != "cuda":
            return wanted
        from coati.rollout.engine.cache import stored_as

        tensors = [x for layer in prefilled.layers for x in (layer.keys, layer.values)]
        bytes_per_slot = sum(x.shape[1] * columns * x.shape[3] * stored_as(x).itemsize for x in tensors)
        fits = int(0.8 * free_memory(self.device) // bytes_per_slot)
        if fits == 0:
            raise UserError(
                f"the KV cache of one response of {columns} tokens takes {bytes_per_slot / 2**30:.1f} GiB, more than "
                "the GPU has free: lower max_new_tokens, or spread the model over more GPUs"
            )
        return min(wanted, fits)

    # --- prompts

    def join(self):
        """Takes requests that have come, as many as there are free slots."""
        requests = self.poll(self.state.cache.slots - len(self.rows))
        if requests is None:
            self.poll = None
        elif requests:
            self.following.append(self.prefill([self.make_row(request) for request in requests]))

    @property
    def period(self) -> int:
        """Follow-ups join at the end of each."""
        return self.steps // self.follow_ups.steps

    def follow_up(self, last: int):
        """Takes what follows the completions of periods up to `last`."""
        rows = []
        while self.ended and self.ended[0][0] <= last:
            _, row = self.ended.popleft()
            request = self.follow_ups.next(row.index)
            self.kept -= row.kept
            if request is not None:
                rows.append(self.make_row(request))
        if rows:
            self.following.append(self.prefill(rows))

    def next_prefilled(self) -> list[_Prefilled]:
        """The next batch that waits for slots; none at the end."""
        while self.following:
            batch = next(self.following[0], None)
            if batch is not None:
                return batch
            self.following.popleft()
        return next(self.first, [])

    def prefill(self, rows: list[_Row]) -> Iterator[list[_Prefilled]]:
        """Prefills prompts, a batch at a time and as late as possible; their common prefix is read once."""
        # equal prompts become neighbors and are read once; like lengths share a batch
        rows = sorted(rows, key=lambda row: (len(row.request.prompt), *row.request.prompt))
        continued = [row for row in rows if row.request.states is not None]
        rows = [row for row in rows if row.request.states is None]
        while continued:
            batch = self.next_batch(continued, continued_size)
            cache, logits = self.prefill_rest(batch)
            yield [_Prefilled(row, cache, i, logits) for i, row in enumerate(batch)]
        if not rows:
            return
        samples = [list(group) for _, group in groupby(rows, key=lambda row: tuple(row.request.prompt))]
        shared = common_prefix_length([group[0].request.prompt for group in samples])
        prefix, of_prefix = None, None
        if shared:
            prefix, _ = self.prefill_batch(samples[:1], None, shared)
            of_prefix = self.take_routing(1)
        while samples:
            groups = self.next_batch(samples, lambda group: len(group[0].request.prompt) - shared)
            cache, logits = self.prefill_batch(groups, prefix)
            routing = self.take_routing(len(groups), of_prefix)
            yield [_Prefilled(row, cache, i, logits, routing) for i, group in enumerate(groups) for row in group]

    def take_routing(self, rows: int, before: Tensor | None = None) -> Tensor | None:
        """The experts of the tokens that the model has read last, int16 `[rows, seq, layers, k]`, if they are noted.

        Args:
            before: `[1, seq, layers, k]`, of what all rows begin with.
        """
        if self.notes is None:
            return None
        found = self.notes.take().unflatten(0, (rows, -1))
        return found if before is None else torch.cat([before.expand(rows, -1, -1, -1), found], 1)

    def next_batch(self, waiting: list[Any], new_tokens: Callable[[Any], int]) -> list[Any]:
        """Takes the first ones, as many as are read at a time, padding included."""
        batch, longest = [], 0
        while waiting and len(batch) < self.slots:
            longest = max(longest, new_tokens(waiting[0]))
            if batch and (len(batch) + 1) * longest > self.prefill_tokens:
                break
            batch.append(waiting.pop(0))
        return batch

    def prefill_rest(self, rows: list[_Row]):
        """As `prefill_batch`, of prompts of which the first part has been read before."""
        from coati.rollout.engine.attention import step_mask
        from coati.rollout.engine.cache import SlotCache

        states = [row.request.states for row in rows]
        new = [list(row.request.prompt)[kept.length :] for row, kept in zip(rows, states, strict=True)]
        ids, last = self.padded(new)
        columns = max(kept.length for kept in states) + ids.shape[1]
        cache = SlotCache(len(rows), columns, self.device)
        cache.restore(states)
        for row in rows:
            row.request = replace(row.request, states=None)
        self.kept -= len(rows)
        cache.rows, cache.width = len(rows), columns
        mask, positions = step_mask(self.model, cache, ids.shape[1]), cache.next_positions(ids.shape[1])
        return cache, self.model.next_logits(ids, cache, mask, positions, last=last)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids that the model reads next, `[batch, seq]`, which count as read, and the column of each row's last
        one, `[batch]`."""
        lengths = [len(row) for row in rows]
        ids = pad_right(rows, self.device)
        self.prompt_tokens += sum(lengths)
        self.padding_tokens += ids.numel() - sum(lengths)
        return ids, upload([length - 1 for length in lengths], self.device)

    def prefill_batch(self, batch: list[list[_Row]], prefix, end: int | None = None):
        """The KV cache of some prompts (up to `end`), and the logits of their next tokens."""
        from transformers import DynamicCache

        from coati.rollout.engine.cache import share_prefix

        start, cache = 0, DynamicCache()
        if prefix is not None:
            start, cache = prefix.get_seq_length(), share_prefix(prefix, len(batch))
        ids, last = self.padded([list(group[0].request.prompt)[start:end] for group in batch])
        mask = None
        if not self.model.takes_positions:  # ALiBi is computed from the mask; elsewhere causality hides the padding
            mask = torch.arange(start + ids.shape[1], device=self.device) <= start + last[:, None]
        return cache, self.model.next_logits(ids, cache, mask, last=last)

    def fill_slots(self):
        """Fills free slots; each row gets its first token."""
        while (first := len(self.rows)) < self.state.cache.slots:
            if not self.ready:
                self.ready.extend(self.next_prefilled())
            if not self.ready:
                return
            free = self.state.cache.slots - first
            new = [self.ready.popleft() for _ in range(min(free, len(self.ready)))]
            targets = list(range(first, first + len(new)))
            numbered = zip(new, targets, strict=True)
            for _, group in groupby(numbered, key=lambda pair: id(pair[0].cache)):  # few batches
                part = list(group)
                lengths = [len(p.row.request.prompt) for p, _ in part]
                batch = part[0][0].cache
                self.state.cache.write(batch, [p.batch_row for p, _ in part], [t for _, t in part], lengths)
                if not self.ready or self.ready[0].cache is not batch:
                    batch.layers.clear()  # it may refer to itself
            self.rows += [p.row for p in new]
            self.start_rows(new, slice(first, first + len(new)))
            self.start_download(self.rows[first:], slice(first, first + len(new)))

    def start_rows(self, new: list[_Prefilled], slots: slice):
        """New rows get their state and their first token."""
        state = self.state
        batch_rows = upload([p.batch_row for p in new], self.device)
        if all(p.cache is new[0].cache for p in new):
            logits = new[0].logits[batch_rows]
        else:
            logits = torch.stack([p.logits[p.batch_row] for p in new])
        for p in new:
            if p.routing is not None:
                p.row.routing.append(p.routing[p.batch_row, : len(p.row.request.prompt)].cpu().numpy())
        state.keys[slots] = upload([p.row.key for p in new], self.device)
        state.drawn[slots] = upload([p.row.request.begun for p in new], self.device)
        if state.own_sampling:
            for stored, name in zip(state.own_sampling, ("temperature", "top_p"), strict=True):
                stored[slots] = upload([getattr(p.row.request, name) for p in new], self.device).float()
        if self.config.repetition_penalty != 1:
            if state.seen is None:
                state.seen = torch.zeros(state.cache.slots, logits.shape[1], dtype=torch.bool, device=self.device)
            state.seen[slots] = False
            ids = pad_right([list(p.row.request.prompt) for p in new], self.device, repeat=True)
            state.seen[slots] = state.seen[slots].scatter(1, ids, True)
        self.draw(logits, slots, *self.needs([p.row for p in new]))

    # --- tokens

    def step(self):
        """One more token for every row."""
        rows, width = len(self.rows), max(row.length for row in self.rows)
        shape = (rows, width)
        if self.cuda_graphs:
            shape = round_up(rows, width)
            shape = (min(shape[0], self.state.cache.slots), min(shape[1], self.state.cache.columns))
        self.graphs.run(*shape, *self.needs(self.rows))
        self.steps += 1
        self.start_download(self.rows, slice(0, rows), self.notes.take() if self.notes else None)

    def needs(self, rows: list[_Row]) -> tuple[bool, ...]:
        """What rows that are live need of a step, see `needs_of`; of others nothing is asked."""
        return needs_of([row.request for row in rows]) if self.state.own_sampling else ()

    def decode(self, rows: int, width: int, *needs: bool):
        """The device's part of a step: nothing here depends on values that the host would have to read."""
        from coati.rollout.engine.attention import step_attention, step_mask

        state, cache = self.state, self.state.cache
        cache.rows, cache.width = rows, width
        next_logits = self.model.compiled_next_logits if self.config.compile_generation else self.model.next_logits
        with step_attention(self.model):
            mask = step_mask(self.model, cache)
            logits = next_logits(state.tokens[:rows, None], cache, mask, cache.lengths[:rows, None])
        # slots beyond the rows, which fill up a graph's shape, must stay within the columns
        cache.lengths[:rows] = (cache.lengths[:rows] + 1).clamp(max=cache.columns - 1)
        self.draw(logits, slice(0, rows), *needs)

    def draw(self, logits: Tensor, slots: slice, *needs: bool):
        state = self.state
        seen = None if state.seen is None else state.seen[slots]
        noise = state.keys[slots], state.drawn[slots]
        if state.own_sampling:
            draws, has_nucleus, with_heads = needs
            temperatures, top_p = (stored[slots] for stored in state.own_sampling)
            nucleus = top_p if has_nucleus else None
            drawn = self.live_sampler(logits, *noise, temperatures if draws else None, nucleus)
        else:
            with_heads, drawn = True, self.sampler(logits, *noise, seen)
        tokens, state.log_probs[slots] = drawn
        state.tokens[slots] = tokens
        state.drawn[slots] += 1
        if state.heads and with_heads:
            found = most_likely(logits, state.heads[0].shape[1], self.config.temperature or 1.0)
            for stored, values in zip(state.heads, found, strict=True):
                stored[slots] = values
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)

    def start_download(self, rows: list[_Row], slots: slice, routing: Tensor | None = None):
        """Starts copying these rows' tokens to the host, and reads what has arrived.

        Args:
            routing: the experts of the tokens that the model has read for them, int16 `[rows, layers, k]`.
        """
        for row in rows:
            row.drawn += 1
        state = self.state
        columns = [state.tokens[slots], state.log_probs[slots], *(stored[slots] for stored in state.heads)]
        if routing is not None:
            columns.append(routing)
        self.downloads.append((list(rows), routing is not None, Download(*columns)))
        self.release_slots([row.drawn == row.limit for row in self.rows])
        while len(self.downloads) > self.steps_behind:
            self.finish_download()

    def finish_download(self):
        """Reads the tokens of the oldest pending step; rows that have ended free their slots."""
        rows, with_routing, download = self.downloads.popleft()
        tokens, log_probs, *heads = download.arrays()
        routing = heads.pop() if with_routing else None
        in_progress = []
        for i, (row, token, log_prob) in enumerate(zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)):
            if not row.ended:
                row.completion.ids.append(token)
                row.completion.log_probs.append(log_prob)
                if heads and row.request.heads:
                    row.completion.heads.append((heads[0][i].astype(np.int32), heads[1][i].copy()))
                if routing is not None:
                    row.routing.append(routing[i : i + 1])
                in_progress.append(row)
        stopped = self.stop([row.response for row in in_progress]) if self.stop else [False] * len(in_progress)
        for row, stop in zip(in_progress, stopped, strict=True):
            row.completion.finish_reason = self.finish_reason(row, stop)
            if isinstance(row.request, LiveRequest):
                row.completion.finish_reason = row.request.on_token(row.completion)
            if row.request.keep_states and row.completion.finish_reason in ("eos", "stop"):
                row.completion.states = self.states_of(row)
            if row.ended and row.routing:
                row.completion.routing = np.concatenate(row.routing)
            if row.ended and self.follow_ups:
                self.ended.append((self.period, row))
            if row.ended and self.on_done:
                self.on_done(row.index, row.completion)
        self.release_slots([row.ended for row in self.rows])

    def states_of(self, row: _Row):
        """Keys and values of what the model has read of a row: all but its last token. None where they are gone, since
        the row was at its limit, or where there is no room for them."""
        slot = next((i for i, of_slot in enumerate(self.rows) if of_slot is row), None)
        if slot is None or not self.model.takes_positions or not self.has_room():
            return None
        self.kept, row.kept = self.kept + 1, True
        return self.state.cache.states(slot, len(row.request.prompt) + len(row.completion.ids) - 1)

    def has_room(self) -> bool:
        """Whether fewer rows are kept than there are slots, so that they take no more memory than those, and a GPU has
        a quarter of its memory left."""
        if self.kept >= self.state.cache.slots:
            return False
        if self.device.type != "cuda":
            return True
        return free_memory(self.device) > torch.cuda.mem_get_info(self.device)[1] / 4

    def finish_reason(self, row: _Row, stop: bool) -> str:
        if row.completion.ids[-1] in self.eos_ids:
            return "eos"
        if stop:
            return "stop"
        return "length" if len(row.completion.ids) == row.limit else ""

    def release_slots(self, leaves: list[bool]):
        """Frees the slots of some rows, to which the last rows move."""
        if not any(leaves):
            return
        remain = leaves.count(False)
        holes = [i for i in range(remain) if leaves[i]]
        movers = [i for i in range(remain, len(leaves)) if not leaves[i]]
        if movers:
            width = max(self.rows[i].length for i in movers)
            source, target = upload(movers, self.device), upload(holes, self.device)
            self.state.cache.move(source, target, width)
            for tensor in self.state.per_slot():
                tensor[target] = tensor[source]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[remain:]


def continued_size(row: _Row) -> int:
    """Tokens that a row counts for where rows go on from kept states, which take memory too: they are copied."""
    length = len(row.request.prompt)
    return max(length - row.request.states.length, -(-length // KEPT_SHARE))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: free ones, and those that torch keeps for later."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def common_prefix_length(prompts: list[Sequence[int]]) -> int:
    """Length of the prompts' common prefix, at least one token less than each; 0 if it is too short to matter."""
    first, last = min(prompts), max(prompts)  # all others lie between them
    if first == last:
        return 0
    length, most = 0, min(len(prompt) for prompt in prompts) - 1
    while length < most and first[length] == last[length]:
        length += 1
    return length if length >= SHORTEST_PREFIX else 0


def can_be_captured(model) -> bool:
    """Whether a step of the model is the same sequence of kernels each time: not with sharded models, expert
    routing, or rotary frequencies that depend on the length."""
    config = model.transformer.config.get_text_config()
    experts = any(is_experts(module) for module in model.modules())
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    return model.layout.is_plain and not experts and not kinds & {"dynamic", "longrope"}
