"""A model that completes what comes, in a thread of its own.

Any thread may submit and cancel; the worker's thread computes. Its pieces are handed to each item's own `emit`.
"""

import copy
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from coati.config.generation import GenerationConfig
from coati.data import prepare_tokenizer
from coati.data.messages import Messages
from coati.data.templates import ChatTemplate, template_errors
from coati.errors import UserError
from coati.models.opened import OpenedModel
from coati.rollout import RolloutEngine
from coati.rollout.engine.live import HEADS, LiveRequest
from coati.rollout.generate import has_kv_cache
from coati.rollout.generator import Completion
from coati.rollout.prompts import eos_ids
from coati.serve.protocol import ApiError, Choice, Token, Wanted, refused
from coati.serve.text import TextStream, token_bytes

logger = logging.getLogger(__name__)
PREFILL_TOKENS = 2048  # of prompts at a time: others wait for their next token meanwhile
SCORED_LOGITS = 2**24  # in memory at a time
# of all streams together: a piece costs more than the token that it is made of, so many streams get theirs less often
PIECES_PER_SECOND = 640


class QueueFull(Exception):
    """No more requests may wait."""


class Closed(Exception):
    """The worker takes no more requests."""


@dataclass(frozen=True)
class Failure:
    """What is emitted in place of the rest where a computation has failed."""

    message: str


class Stream:
    """A response on its way from the worker's thread to whoever waits for it.

    Args:
        index: of the choice in its request.
        emit: called in the worker's thread with a `Choice` for every piece, of which the last one has a finish reason,
            or with a `Failure`. Not called after `canceled` is set. Of a stream, the first token is a piece at once,
            and what follows as often as its share of `PIECES_PER_SECOND` allows; else the whole response is one.

    Attributes:
        tokens: that were sampled so far, EOS included.
    """

    def __init__(
        self, index: int, prompt: list[int], wanted: Wanted, seed: Sequence[int], limit: int, emit: Callable, worker
    ):
        self.index, self.prompt, self.wanted, self.emit, self.worker = index, prompt, wanted, emit, worker
        self.text = TextStream(worker.decode, wanted.stop)
        self.tokens, self.canceled = 0, False
        self.undecoded: list[int] = []
        self.piece = Choice(index)  # that is emitted next
        self.emitted = -math.inf  # when the last one was
        self.request = LiveRequest(
            prompt,
            seed,
            limit,
            heads=HEADS if wanted.heads else 0,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            on_token=self.on_token,
        )

    def on_token(self, completion: Completion) -> str:
        """Emits what a token has made certain, if it is time to; returns the finish reason."""
        self.tokens += 1
        if self.canceled:
            self.worker.ended(self)
            return "canceled"
        token, reason = completion.ids[-1], completion.finish_reason
        if token not in self.worker.silent:
            self.undecoded.append(token)
            if self.wanted.log_probs:
                ids, log_probs = completion.heads[-1] if self.wanted.heads else ((), ())
                heads = list(zip(ids, log_probs, strict=True))[: self.wanted.heads]
                self.piece.tokens.append(self.worker.token(token, completion.log_probs[-1], heads))
        now = time.monotonic()
        wait = len(self.worker.running) / PIECES_PER_SECOND
        is_due = bool(reason) or (self.wanted.stream and now - self.emitted >= wait)
        if self.undecoded and (is_due or self.wanted.stop):
            self.piece.text += self.text.add(self.undecoded)
            self.undecoded = []
        if reason and not self.text.stopped:
            self.piece.text += self.text.end()
        if self.text.stopped:
            reason = "stop"
        if reason or (is_due and (self.piece.text or self.piece.tokens)):
            self.piece.finish_reason = {"eos": "stop", "": None}.get(reason, reason)
            self.emit(self.piece)
            self.piece, self.emitted = Choice(self.index), now
        if reason:
            self.worker.ended(self)
        return reason


@dataclass
class Scoring:
    """A prompt whose own tokens' log-probs are wanted.

    Attributes:
        emit: called in the worker's thread with the tokens, a list of `Token`, or with a `Failure`.
    """

    index: int
    prompt: list[int]
    heads: int
    emit: Callable
    canceled: bool = False


class Worker:
    """Completes and scores what is submitted, with one model.

    Args:
        slots: responses that are generated together.
        max_queue: items that may wait for a slot.
        max_length: the longest prompt with its response, in tokens; None for that of the model, 4096 at most.

    Attributes:
        notes: on what the tokenizer lacked.
        prompt_tokens, generated_tokens: how many there have been.

    Raises:
        UserError: a model without a KV cache, or max_length is more than it reads.
    """

    def __init__(
        self, name: str, opened: OpenedModel, slots: int = 64, max_queue: int = 256, max_length: int | None = None
    ):
        if not has_kv_cache(opened.actor):
            raise UserError(f"{name} ({opened.folder}) has layers without a KV cache: coati's engine can't serve it")
        if max_length is not None and max_length > opened.max_length:
            raise UserError(f"--max_length {max_length} is more than the {opened.max_length} tokens that {name} reads")
        self.name, self.actor, self.slots, self.max_queue = name, opened.actor, slots, max_queue
        self.max_length = max_length or min(opened.max_length, 4096)
        self.tokenizer, self.notes = prepare_tokenizer(opened.tokenizer, learns_responses=False)
        self.vocabulary = len(self.tokenizer)
        ends = eos_ids(self.tokenizer, opened.actor)
        self.silent = {*ends, self.tokenizer.pad_token_id}  # tokens that are no part of the text
        self.bytes_of = token_bytes(self.tokenizer)
        self.engine = RolloutEngine(
            opened.actor, GenerationConfig(), eos_ids=ends, slots=slots, prefill_tokens=PREFILL_TOKENS
        )
        # threads can't share one tokenizer
        self.encoder, self.encoding = copy.deepcopy(self.tokenizer), threading.Lock()
        self.condition = threading.Condition()
        self.waiting: deque[Stream | Scoring] = deque()
        self.running: set[Stream] = set()
        self.closed = False
        self.prompt_tokens = self.generated_tokens = 0
        self.thread = threading.Thread(target=self.run, daemon=True, name=f"model {name}")

    # --- text and tokens

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A text's tokens, by any thread."""
        with self.encoding:
            return self.encoder(text, add_special_tokens=add_special_tokens)["input_ids"]

    def chat_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the next response begins, by any thread.

        Raises:
            ApiError: the model's chat template refuses it.
        """
        with self.encoding:
            try:
                text = ChatTemplate(self.encoder).render(messages, add_generation_prompt=True)
            except template_errors() as error:
                raise refused("messages", f"can't be written by the model's chat template: {error}") from None
        return self.encode(text, add_special_tokens=False)

    def token(self, id: int, log_prob: float | None, heads=()) -> Token:
        return Token(self.bytes_of(id), log_prob, [(self.bytes_of(int(i)), float(value)) for i, value in heads])

    # --- for any thread

    def streams(self, prompt: list[int], wanted: Wanted, emit: Callable, first: int = 0) -> list[Stream]:
        """The `wanted.n` responses to a prompt, numbered from `first`.

        Raises:
            ApiError: the prompt doesn't fit, or has ids that the model lacks.
        """
        self.check_prompt(prompt)
        room = self.max_length - len(prompt)
        limit = room if wanted.max_tokens is None else wanted.max_tokens
        if room < 1 or limit > room:
            asked = "" if wanted.max_tokens is None else f" and {limit} tokens of the response"
            message = f"This model's maximum context length is {self.max_length} tokens: {len(prompt)} tokens of the "
            raise ApiError(400, f"{message}prompt{asked} are too many", "prompt", "context_length_exceeded")
        seed = secrets.randbits(64) if wanted.seed is None else wanted.seed % 2**64
        numbers = range(first, first + wanted.n)
        return [Stream(i, prompt, wanted, [seed, i], limit, emit, self) for i in numbers]

    def scoring(self, prompt: list[int], wanted: Wanted, emit: Callable, index: int = 0) -> Scoring:
        """The log-probs of a prompt's own tokens.

        Raises:
            ApiError: as `streams`.
        """
        self.check_prompt(prompt)
        if len(prompt) > self.max_length:
            message = f"This model's maximum context length is {self.max_length} tokens: {len(prompt)} are too many"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        return Scoring(index, prompt, wanted.heads, emit)

    def check_prompt(self, prompt: list[int]):
        if not prompt:
            raise refused("prompt", "has no token: generation starts from at least one")
        if not all(0 <= id < self.vocabulary for id in prompt):
            raise refused("prompt", f"has token ids that the model lacks: there are 0 to {self.vocabulary - 1}")

    def submit(self, items: Sequence[Stream | Scoring]):
        """Puts items at the end of those that wait, all of them or none.

        Raises:
            QueueFull: there are too many.
            Closed: `close` was called.
        """
        with self.condition:
            if self.closed:
                raise Closed
            free = max(self.slots - len(self.running), 0)
            if len(self.waiting) + len(items) > self.max_queue + free:
                raise QueueFull
            self.waiting.extend(items)
            self.condition.notify()

    def cancel(self, items: Sequence[Stream | Scoring]):
        """Nobody waits for these any more: those in progress end at their next token."""
        with self.condition:
            for item in items:
                item.canceled = True
            self.waiting = deque(item for item in self.waiting if not item.canceled)

    def close(self):
        """Takes no more, and ends the thread after what was submitted."""
        with self.condition:
            self.closed = True
            self.condition.notify()

    def start(self):
        """Starts the thread and waits for a first token, so that what can't run is known at once.

        Raises:
            UserError: the GPU lacks memory for the KV cache, or the model has failed.
        """
        self.thread.start()
        done: list[Choice | Failure] = []
        arrived = threading.Event()

        def emit(piece):
            done.append(piece)
            arrived.set()

        greedy = Wanted(self.name, max_tokens=1, temperature=0.0)
        self.submit(self.streams([min(self.silent)], greedy, emit))
        arrived.wait()
        if isinstance(done[0], Failure):
            raise UserError(f"{self.name} can't generate: {done[0].message}")
        self.prompt_tokens = self.generated_tokens = 0

    # --- for the worker's own thread

    def run(self):
        while not self.closed or self.waiting:
            try:
                self.engine.serve(self.poll, self.max_length)
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("model %s has failed", self.name)
                self.fail(str(error))

    def fail(self, message: str):
        """What was in progress is lost."""
        with self.condition:
            lost, self.running = self.running, set()
        for stream in lost:
            stream.emit(Failure(message))

    def poll(self, free: int) -> list[LiveRequest] | None:
        """What the engine begins next; waits while it has nothing to do. None for the end."""
        with self.condition:
            while not self.running and not self.waiting and not self.closed:
                self.condition.wait()
            if not self.running and not self.waiting:
                return None
            taken, scoring = [], None
            while self.waiting and len(taken) < free and scoring is None:
                item = self.waiting.popleft()
                if isinstance(item, Scoring):
                    scoring = item  # one at a time: rows in progress wait for it
                else:
                    taken.append(item)
            self.running |= set(taken)
            self.prompt_tokens += sum(len(item.prompt) for item in taken) + (len(scoring.prompt) if scoring else 0)
        if scoring is not None:
            self.score(scoring)
        return [stream.request for stream in taken]

    def ended(self, stream: Stream):
        """A stream leaves its slot."""
        with self.condition:
            self.running.discard(stream)
            self.generated_tokens += stream.tokens

    def score(self, scoring: Scoring):
        try:
            tokens = self.tokens_of_prompt(scoring.prompt, scoring.heads)
        except Exception as error:
            logger.exception("model %s has failed to score a prompt", self.name)
            scoring.emit(Failure(str(error)))
        else:
            scoring.emit(tokens)

    def tokens_of_prompt(self, prompt: list[int], heads: int) -> list[Token]:
        """A prompt's tokens with their log-probs; the first one has none."""
        tokens = [self.token(prompt[0], None)]
        ids = torch.tensor([prompt], device=self.engine.device)
        targets = torch.ones_like(ids, dtype=torch.bool)
        targets[:, 0] = False
        if len(prompt) == 1:
            return tokens
        states = self.actor.target_states(ids, None, targets)
        rows = max(SCORED_LOGITS // self.vocabulary, 1)
        for chunk, next_ids in zip(states.split(rows), ids[0, 1:].split(rows), strict=True):
            logits = self.actor.logits_of(chunk).float()
            total = logits.logsumexp(-1, keepdim=True)
            log_probs = (logits.gather(1, next_ids[:, None]) - total).squeeze(1).tolist()
            highest, found = logits.topk(min(heads, logits.shape[-1]))
            tops = [
                list(zip(*pair, strict=True)) for pair in zip(found.tolist(), (highest - total).tolist(), strict=True)
            ]
            pairs = zip(next_ids.tolist(), log_probs, tops, strict=True)
            tokens += [self.token(id, log_prob, top) for id, log_prob, top in pairs]
        return tokens
