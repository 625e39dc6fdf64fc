"""Requests that join and leave while others are in progress, each with its own way of drawing: a server's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coati.rollout.engine.sampling import draw
from coati.rollout.generator import Completion, Request
from coati.transfer import upload

HEADS = 20  # of how many tokens live requests may ask for log-probs


@dataclass(frozen=True, kw_only=True)
class LiveRequest(Request):
    """A request for `RolloutEngine.serve`. Its log-probs are the model's own, at temperature 1.

    Attributes:
        heads: as `Request`'s, 0 or `HEADS`.
        temperature: of sampling; 0 for greedy.
        top_p: nucleus mass.
        on_token: called with the completion after every token, where `finish_reason` says whether it has ended; returns
            its finish reason, which may end it for another reason, or "" to go on.
    """

    temperature: float
    top_p: float
    on_token: Callable[[Completion], str]


def needs_of(requests: Sequence[LiveRequest]) -> tuple[bool, bool, bool]:
    """Whether any of these draws, any of them from a nucleus, and any asks for heads. What none needs is not
    computed."""
    draws = any(request.temperature > 0 for request in requests)
    nucleus = any(request.temperature > 0 and request.top_p < 1 for request in requests)
    return draws, nucleus, any(request.heads for request in requests)


class LiveSampler:
    """Draws each row's token in its own way.

    Args:
        suppressed: tokens that are never drawn.
    """

    def __init__(self, device: torch.device, suppressed: Sequence[int] = ()):
        self.suppressed = upload(suppressed, device)

    def __call__(
        self, logits: Tensor, keys: Tensor, counts: Tensor, temperatures: Tensor | None, top_p: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next tokens `[batch]`, and the log-probs at temperature 1 that the model gives them, float32 `[batch]`.

        Args:
            logits: `[batch, vocabulary]`.
            keys, counts: of each row's noise, see `draw`.
            temperatures: float32 `[batch]`, 0 for greedy; None if all are.
            top_p: nucleus masses, float32 `[batch]`; None if all are 1.
        """
        logits = logits.float()
        scores = logits if len(self.suppressed) == 0 else logits.index_fill(1, self.suppressed, -torch.inf)
        tokens = scores.argmax(-1)
        if temperatures is not None:
            greedy = temperatures == 0
            scaled = scores / torch.where(greedy, 1.0, temperatures)[:, None]
            scaled = scaled if top_p is None else nucleus_of(scaled, top_p)
            tokens = torch.where(greedy, tokens, draw(scaled, keys, counts)[0])
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def nucleus_of(scores: Tensor, top_p: Tensor) -> Tensor:
    """Scores with -inf outside of each row's nucleus: the fewest tokens that hold its mass (Holtzman et al.,
    1904.09751, equation 3).

    Args:
        scores: float32 `[batch, vocabulary]`; top_p: float32 `[batch]`, above 0.
    """
    ordered, order = scores.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    outside = probs.cumsum(-1) - probs >= top_p[:, None]
    return scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
