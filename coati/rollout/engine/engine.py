"""Generation with a model's current weights.

The engine knows token ids only: prompts in; sampled ids, their log-probs and finish reasons out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from coati.config.generation import GenerationConfig
from coati.models.experts import is_experts
from coati.models.routing import RoutingNotes
from coati.rollout.engine.batch import ContinuousBatch
from coati.rollout.engine.live import LiveRequest, LiveSampler
from coati.rollout.engine.packed_weights import packed_weights
from coati.rollout.engine.reader import PromptReader
from coati.rollout.engine.sampling import Sampler
from coati.rollout.generator import Completion, FollowUps, OnDone, Request
from coati.rollout.prompts import suppressed_ids

FEWEST_PACKED = 16  # steps: with fewer, packing the weights takes longer than it saves


class RolloutEngine:
    """Completes requests with the weights that `model` has now, by continuous batching.

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
        reader: reads prompts, and knows how many of their tokens the model has read.
        batch_class: what goes over the tokens of a call.
    """

    batch_class = ContinuousBatch

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
        self.model, self.config, self.eos_ids, self.stop, self.slots = model, config, set(eos_ids), stop, slots
        self.device = next(model.parameters()).device
        self.reader = PromptReader(model, slots, prefill_tokens)
        self.sampler = Sampler(config, eos_ids, self.device, suppressed_ids(model))
        self.live_sampler = LiveSampler(self.device, suppressed_ids(model))
        self.cuda_graphs = cuda_graphs and self.device.type == "cuda" and can_be_captured(model)
        self.steps_behind = 0 if self.device.type == "cpu" else 1

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
        if not requests:
            return []
        limits = [self.limit_of(request) for request in requests]
        longest = max(len(request.prompt) + limit for request, limit in zip(requests, limits, strict=True))
        if follow_ups is not None:
            longest = max(longest, follow_ups.longest)
        notes = RoutingNotes(self.model) if requests[0].with_routing else None
        with self.sampling(max(limits)), notes.noted() if notes else nullcontext():
            batch = self.batch_class(
                self,
                requests,
                longest=longest,
                most=len(requests),
                notes=notes,
                on_done=on_done,
                follow_ups=follow_ups,
            )
            batch.run()
        return batch.completions

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
        requests: list[LiveRequest] | None = []
        while not requests:
            requests = poll(self.slots)
            if requests is None:
                return
        with self.sampling():
            self.batch_class(self, requests, longest=longest, most=self.slots, poll=poll).run()

    def limit_of(self, request: Request) -> int:
        """Tokens of its completion, at most."""
        return self.config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    @contextmanager
    def sampling(self, steps: int | None = None) -> Iterator[None]:
        """Inside, the model is as sampling wants it.

        Args:
            steps: as many tokens of a row at most; None if there is no end of them.
        """
        training = self.model.training
        self.model.eval()
        try:
            with packed_weights(self.model) if self.gains_from_packing(steps) else nullcontext():
                yield
        finally:
            self.model.train(training)

    def gains_from_packing(self, steps: int | None) -> bool:
        """Whether there are enough steps for what packing costs. A compiled step can't read packed weights."""
        return not self.config.compile_generation and (steps is None or steps >= FEWEST_PACKED)


def can_be_captured(model) -> bool:
    """Whether a step of the model is the same sequence of kernels each time: not with sharded models, expert
    routing, or rotary frequencies that depend on the length."""
    config = model.transformer.config.get_text_config()
    experts = any(is_experts(module) for module in model.modules())
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    return model.layout.is_plain and not experts and not kinds & {"dynamic", "longrope"}
