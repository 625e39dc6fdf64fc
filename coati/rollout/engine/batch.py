"""Continuous batching: rows that are completed together, where one that has ended makes room for one that waits.

So it is across the turns of a conversation: what follows a response, once it is known, comes back to a slot while
others are in the middle of theirs, with the keys and values that were kept. It comes after a number of steps and not
after a time: rows that are computed together change each other's last bits, so a batch that depended on how fast
environments answer would make every run a different one. What is not known by then is waited for.

The state of the rows (last token, length, KV cache) is on the device, and a step needs nothing from the host. So on a
GPU the host is a step behind: it launches a step before it has read the tokens of the previous one, and a row that
ended there is still computed once more.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coati.errors import UserError
from coati.models.routing import RoutingNotes
from coati.rollout.engine.graphs import StepGraphs, round_up
from coati.rollout.engine.live import HEADS, LiveRequest, needs_of
from coati.rollout.engine.rows import ReadRow, Row, Slots, states_in
from coati.rollout.engine.sampling import key_of, most_likely
from coati.rollout.generator import Completion, FollowUps, OnDone, Request
from coati.rollout.prompts import pad_right
from coati.transfer import Download, upload

if TYPE_CHECKING:
    from coati.rollout.engine.engine import RolloutEngine


class ContinuousBatch:
    """Completes requests.

    Args:
        engine: whose model completes them, and whose samplers draw.
        requests: the first ones.
        longest: tokens of a prompt with its response, at most: all slots have room for that many.
        most: rows at a time, at most.
        notes: takes down which experts tokens go to.
        on_done, follow_ups: see `RolloutEngine.generate`.
        poll: see `RolloutEngine.serve`; requests are live then, and their completions are not collected.

    Attributes:
        completions: one per request, by their numbers.
        rows: those in the slots; ready: those that wait for one, and whose prompts have been read.
        ended: rows that something may follow, each with the period of steps that it ended in.
        kept: rows whose keys and values are kept.
        steps: how many there have been.

    Raises:
        UserError: an empty prompt, or a response whose KV cache exceeds the GPU's memory.
    """

    def __init__(
        self,
        engine: "RolloutEngine",
        requests: Sequence[Request],
        *,
        longest: int,
        most: int,
        notes: RoutingNotes | None = None,
        on_done: OnDone | None = None,
        follow_ups: FollowUps | None = None,
        poll: Callable[[int], list[LiveRequest] | None] | None = None,
    ):
        self.engine, self.model, self.config, self.device = engine, engine.model, engine.config, engine.device
        self.notes, self.on_done, self.follow_ups, self.poll = notes, on_done, follow_ups, poll
        self.completions: list[Completion] = []
        self.rows: list[Row] = []
        self.kept = self.steps = 0
        self.ended: deque[tuple[int, Row]] = deque()
        self.downloads: deque[tuple[list[Row], bool, Download]] = deque()
        self.graphs = StepGraphs(engine.cuda_graphs)
        self.first = self.read(requests)
        self.following: deque[Iterator[list[ReadRow]]] = deque()
        self.ready = deque(self.next_read())
        columns = round_up(1, longest)[1]
        slots = self.count_slots(self.ready[0].cache, columns, most)
        heads = requests[0].heads if poll is None else min(HEADS, self.ready[0].logits.shape[-1])
        self.state = Slots(slots, columns, self.device, heads, live=poll is not None)

    def run(self):
        """Until all rows have ended."""
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
            self.state.close()

    def count_slots(self, read, columns: int, rows: int) -> int:
        """How many slots there are: as many as asked for, or as fit into four fifths of the GPU's free memory."""
        wanted = min(self.engine.slots, rows)
        if self.device.type != "cuda":
            return wanted
        from coati.rollout.engine.cache import stored_as

        bytes_per_slot = sum(x.shape[1] * columns * x.shape[3] * stored_as(x).itemsize for x in states_in(read))
        fits = int(0.8 * free_memory(self.device) // bytes_per_slot)
        if fits == 0:
            raise UserError(
                f"the KV cache of one response of {columns} tokens takes {bytes_per_slot / 2**30:.1f} GiB, more than "
                "the GPU has free: lower max_new_tokens, or spread the model over more GPUs"
            )
        return min(wanted, fits)

    # --- prompts

    def read(self, requests: Sequence[Request]) -> Iterator[list[ReadRow]]:
        """Rows of these requests, once their prompts are read: a batch at a time, and as late as possible."""
        return self.engine.reader.read([self.make_row(request) for request in requests], self.notes)

    def make_row(self, request: Request) -> Row:
        number = len(self.completions)
        if not len(request.prompt):
            raise UserError(f"prompt {number} is empty: generation starts from at least one token")
        row = Row(number, request, self.engine.limit_of(request), key_of(request.seed))
        if self.poll is None:
            self.completions.append(row.completion)
        self.kept += request.states is not None
        return row

    def join(self):
        """Takes requests that have come, as many as there are free slots."""
        requests = self.poll(self.state.cache.slots - len(self.rows))
        if requests is None:
            self.poll = None
        elif requests:
            self.following.append(self.read(requests))

    @property
    def period(self) -> int:
        """Follow-ups join at the end of each."""
        return self.steps // self.follow_ups.steps

    def follow_up(self, last: int):
        """Takes what follows the completions of periods up to `last`."""
        requests = []
        while self.ended and self.ended[0][0] <= last:
            _, row = self.ended.popleft()
            request = self.follow_ups.next(row.index)
            self.kept -= row.kept
            if request is not None:
                requests.append(request)
        if requests:
            self.following.append(self.read(requests))

    def next_read(self) -> list[ReadRow]:
        """The next batch that waits for slots; none at the end."""
        while self.following:
            batch = next(self.following[0], None)
            if batch is not None:
                break
            self.following.popleft()
        else:
            batch = next(self.first, [])
        self.kept -= sum(read.continued for read in batch)
        return batch

    def fill_slots(self):
        """Fills free slots; each row gets its first token."""
        while (first := len(self.rows)) < self.state.cache.slots:
            if not self.ready:
                self.ready.extend(self.next_read())
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

    def start_rows(self, new: list[ReadRow], slots: slice):
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
        if self.engine.cuda_graphs:
            shape = round_up(rows, width)
            shape = (min(shape[0], self.state.cache.slots), min(shape[1], self.state.cache.columns))
        self.graphs.run(self.decode, (*shape, *self.needs(self.rows)))
        self.steps += 1
        self.start_download(self.rows, slice(0, rows), self.notes.take() if self.notes else None)

    def needs(self, rows: list[Row]) -> tuple[bool, ...]:
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
            drawn = self.engine.live_sampler(logits, *noise, temperatures if draws else None, nucleus)
        else:
            with_heads, drawn = True, self.engine.sampler(logits, *noise, seen)
        tokens, state.log_probs[slots] = drawn
        state.tokens[slots] = tokens
        state.drawn[slots] += 1
        if state.heads and with_heads:
            found = most_likely(logits, state.heads[0].shape[1], self.config.temperature or 1.0)
            for stored, values in zip(state.heads, found, strict=True):
                stored[slots] = values
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)

    def start_download(self, rows: list[Row], slots: slice, routing: Tensor | None = None):
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
        while len(self.downloads) > self.engine.steps_behind:
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
        responses = [row.response for row in in_progress]
        stopped = self.engine.stop(responses) if self.engine.stop else [False] * len(responses)
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

    def states_of(self, row: Row):
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

    def finish_reason(self, row: Row, stop: bool) -> str:
        if row.completion.ids[-1] in self.engine.eos_ids:
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
            self.state.move(source, target, width)
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[remain:]


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: free ones, and those that torch keeps for later."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
