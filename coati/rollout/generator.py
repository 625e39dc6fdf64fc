"""The protocol of generators: token ids in, completions out."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from coati.config.generation import GenerationConfig


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: token ids.
        seed: of this response's noise: the same seed gives the same response in any batch.
        max_new_tokens: its longest response, if not that of the configuration; without what has begun.
        states: of a completion that the prompt goes on from, see `Completion`: its part of the prompt is not read
            again. For the weights that it was sampled with.
        heads: of how many of the most likely tokens the log-probs are wanted too, wherever one is sampled; the same for
            all requests of a call. By coati's engine only.
        with_routing: whether it is wanted which experts the tokens go to; the same for all requests of a call. By
            coati's engine only, and not with states.
        keep_states: whether the completion's are kept, so that another request can go on from it.
        begun: how many of the prompt's last tokens are of the response already: its noise, stop texts and
            `min_new_tokens` go on from there. vLLM's noise is another one then.
    """

    prompt: Sequence[int]
    seed: int | Sequence[int] = 0
    max_new_tokens: int | None = None
    _: KW_ONLY
    states: Any = None
    heads: int = 0
    with_routing: bool = False
    keep_states: bool = False
    begun: int = 0


@dataclass
class Completion:
    """A response.

    Attributes:
        ids: the sampled tokens, EOS included.
        log_probs: of those tokens by the model at the sampling temperature (before top-k and the like); None after
            beam search.
        finish_reason: "eos", "stop" (a stop string or id) or "length".
        heads: for each of these tokens, the ids and the log-probs of those that were most likely there, two arrays
            `[heads]`; empty where the request has no heads.
        routing: the experts that the tokens of prompt and response went to but the last one, int16
            `[tokens - 1, layers, k]`; None where that was not asked for.
        states: keys and values of the prompt and the response, if they were to be kept and the generator could; opaque.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = field(default_factory=list)
    finish_reason: str = ""
    heads: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    routing: np.ndarray | None = None
    states: Any = None


OnDone = Callable[[int, Completion], None]
Done = TypeVar("Done")


@dataclass(frozen=True)
class FollowUps:
    """Requests that come after completions, as a conversation's next turn does.

    Attributes:
        next: from a completion's number to the request after it, or None; it may have to wait for that. Follow-ups are
            numbered on from the first requests in the order in which they are given.
        longest: tokens that such a prompt has at most, with its response.
        steps: tokens per row between two times at which follow-ups join the other rows. `next` is called at the second
            of these after a completion, or when there is no other row. Not at once, and not when it would not wait:
            which rows are computed together then never depends on a clock, and neither do the bits of a result.
    """

    next: Callable[[int], Request | None]
    longest: int
    steps: int = 8


def notify_done(done: list[Done], on_done: Callable[[int, Done], Any] | None) -> list[Done]:
    """Calls `on_done` for each completion (or sample) with its number, and returns them."""
    for i, one in enumerate(done if on_done else ()):
        on_done(i, one)
    return done


def in_rounds(
    generate: Callable[[Sequence[Request], OnDone], list[Completion]],
    requests: Sequence[Request],
    on_done: OnDone | None,
    follow_ups: FollowUps | None,
) -> list[Completion]:
    """Requests and their follow-ups by what completes a whole batch at a time."""
    completions: list[Completion] = []
    while True:
        first = len(completions)

        def heard(i: int, completion: Completion, first=first):
            if on_done is not None:
                on_done(first + i, completion)

        completions += generate(requests, heard)
        if follow_ups is None:
            return completions
        following = [follow_ups.next(i) for i in range(first, len(completions))]
        requests = [request for request in following if request is not None]
        if not requests:
            return completions


class Generator(Protocol):
    """Completes requests, by any engine. It knows token ids only."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: GenerationConfig,
        on_done: OnDone | None = None,
        follow_ups: FollowUps | None = None,
    ) -> list[Completion]:
        """One completion per request, in the order of their numbers, with the weights that the policy has now.

        Args:
            sampling: how tokens are drawn.
            on_done: called with a request's number and its completion as soon as that is known to have ended.
            follow_ups: requests after these.
        """
