"""How the next token is chosen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coati.rollout.config import GenerationConfig


class Sampler:
    """Draws tokens as `GenerationConfig` says, from uniform numbers that are given: each row's are its own, so that a
    sample does not depend on its neighbours.

    Args:
        ends: tokens that end a response; they wait for `min_new_tokens`.
        never: tokens that are never drawn.
    """

    def __init__(self, config: GenerationConfig, ends: list[int], device: torch.device, never: Sequence[int] = ()):
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.config = config
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.never = torch.tensor(never, dtype=torch.long, device=device)
        self.warpers = []
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            self.warpers.append(MinPLogitsWarper(config.min_p))

    def __call__(
        self, logits: Tensor, uniform: Tensor, too_short: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next tokens `[batch]` and their log-probs, float32 `[batch]`.

        The log-probs are the model's own at the sampling temperature, as training computes them: before the repetition
        penalty, `min_new_tokens`, top-k, top-p and min-p.

        Args:
            logits: `[batch, vocabulary]`.
            uniform: float32 `[batch]`, in [0, 1).
            too_short: bool `[batch]`, rows that may not end yet.
            seen: bool `[batch, vocabulary]`, tokens of the row so far; for the repetition penalty.
        """
        logits = logits.float()
        temperature = self.config.temperature or 1.0
        own = (logits if temperature == 1 else logits / temperature).softmax(-1)
        scores = self.adjust(logits, too_short, seen)
        if self.config.temperature == 0:
            tokens = scores.argmax(-1)
        else:
            probabilities = own if scores is logits and not self.warpers else self.warp(scores / temperature)
            tokens = draw(probabilities, uniform)
        return tokens, own.gather(1, tokens[:, None]).squeeze(1).log()

    def adjust(self, logits: Tensor, too_short: Tensor, seen: Tensor | None) -> Tensor:
        """Repetition penalty (Keskar et al., 1909.05858, section 4.1), shortest response and tokens that are never
        drawn; `logits` themselves if there is nothing to do."""
        scores, penalty = logits, self.config.repetition_penalty
        if seen is not None:
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.config.min_new_tokens:
            scores = scores.clone()
            scores[:, self.ends] = scores[:, self.ends].masked_fill(too_short[:, None], -torch.inf)
        return scores if len(self.never) == 0 else scores.index_fill(1, self.never, -torch.inf)

    def warp(self, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.softmax(-1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by the inverse of the cumulative distribution, int64 `[batch]`; never one of probability 0.

    Args:
        probabilities: float32 `[batch, vocabulary]`.
        uniform: float32 `[batch]`, in [0, 1).
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    # rounding could make the product the total itself, beyond the last token that can be drawn
    value = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, value[:, None], right=True).squeeze(1)
