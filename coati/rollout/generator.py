"""The protocol of generators: token ids in, completions out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from coati.config.generation import GenerationConfig


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: token ids.
        seed: of this response's noise: the same seed gives the same response in any batch.
        max_new_tokens: its longest response, if not that of the configuration.
        states: of a completion that the prompt goes on from, see `Completion`: its part of the prompt is not read
            again. For the weights that it was sampled with.
        heads: of how many of the most likely tokens the log-probs are wanted too, wherever one is sampled; the same for
            all requests of a call. By coati's engine only.
    """

    prompt: Sequence[int]
    seed: int | Sequence[int] = 0
    max_new_tokens: int | None = None
    states: Any = None
    heads: int = 0


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
        states: keys and values of the prompt and the response, if they were to be kept and the generator could; opaque.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = field(default_factory=list)
    finish_reason: str = ""
    heads: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    states: Any = None


OnDone = Callable[[int, Completion], None]


def notify_done(completions: list[Completion], on_done: OnDone | None) -> list[Completion]:
    """Calls `on_done` for each completion, and returns them."""
    for i, completion in enumerate(completions if on_done else ()):
        on_done(i, completion)
    return completions


class Generator(Protocol):
    """Completes requests, by any engine. It knows token ids only."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: GenerationConfig,
        on_done: OnDone | None = None,
        keep_states: bool = False,
    ) -> list[Completion]:
        """One completion per request, in their order, with the weights that the policy has now.

        Args:
            sampling: how tokens are drawn.
            on_done: called with a request's place and its completion as soon as that is known to have ended.
            keep_states: so that other requests can go on from the completions.
        """
