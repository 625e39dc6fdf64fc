"""Sampling of the next token.

A draw is a function of the distribution, the row's key and the token's number, computed where the logits are: a race of
exponential clocks (the Gumbel-max trick, Maddison et al., 1411.0030) on noise from a counter. So a sample depends on no
other row, no other sample and no generator's state, a token of probability 0 is never drawn, and there is no cumulative
sum, which on GPUs is neither monotonic nor the same each time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from coati.config.generation import GenerationConfig
from coati.losses.language import at_temperature
from coati.transfer import upload

BLOCK = 128


class Sampler:
    """Draws tokens as `GenerationConfig` says.

    Args:
        eos_ids: tokens that end a response; they wait for `min_new_tokens`.
        suppressed: tokens that are never drawn.
    """

    def __init__(
        self, config: GenerationConfig, eos_ids: list[int], device: torch.device, suppressed: Sequence[int] = ()
    ):
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.config = config
        self.eos_ids, self.suppressed = upload(eos_ids, device), upload(suppressed, device)
        self.warpers = []
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            self.warpers.append(MinPLogitsWarper(config.min_p))

    def __call__(self, logits: Tensor, keys: Tensor, counts: Tensor, seen: Tensor | None = None):
        """The next tokens `[batch]` and their log-probs, float32 `[batch]`.

        The log-probs are the model's own at the sampling temperature, as training computes them: before the repetition
        penalty, `min_new_tokens`, top-k, top-p and min-p.

        Args:
            logits: `[batch, vocabulary]`.
            keys: int64 `[batch]`, of each row's noise, see `key_of`.
            counts: int64 `[batch]`, tokens that each response has so far.
            seen: bool `[batch, vocabulary]`, tokens of the row so far; for the repetition penalty.
        """
        logits = logits.float()
        temperature = self.config.temperature or 1.0
        unadjusted = logits if temperature == 1 else logits / temperature
        scores = self.adjust(logits, counts, seen)
        if self.config.temperature == 0:
            tokens, total = scores.argmax(-1), unadjusted.logsumexp(-1)
        elif scores is logits and not self.warpers:
            tokens, total = draw(unadjusted, keys, counts)
        else:
            tokens, total = draw(self.warp(scores / temperature), keys, counts)[0], unadjusted.logsumexp(-1)
        return tokens, unadjusted.gather(1, tokens[:, None]).squeeze(1) - total

    def adjust(self, logits: Tensor, counts: Tensor, seen: Tensor | None) -> Tensor:
        """Repetition penalty (Keskar et al., 1909.05858, section 4.1), shortest response and tokens that are never
        drawn; `logits` themselves if there is nothing to do."""
        scores, penalty = logits, self.config.repetition_penalty
        if seen is not None:
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.config.min_new_tokens:
            too_short = (counts < self.config.min_new_tokens)[:, None]
            scores = scores.index_fill(1, self.eos_ids, -torch.inf).where(too_short, scores)
        return scores if len(self.suppressed) == 0 else scores.index_fill(1, self.suppressed, -torch.inf)

    def warp(self, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores


def draw(scores: Tensor, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens from the distributions that are the softmax of `scores`, int64 `[batch]`, and the log of the sum of their
    exponentials, float32 `[batch]`.

    Two races: first between blocks of `BLOCK` tokens by the blocks' sums, then between the tokens of the winner. Their
    product is the distribution itself, and takes noise for a small part of the vocabulary only.

    Args:
        scores: float32 `[batch, vocabulary]`, -inf for what can't be drawn.
        keys, counts: int64 `[batch]`; the same pair gives the same noise.
    """
    scores = pad(scores, (0, -scores.shape[1] % BLOCK), value=-torch.inf)
    blocks = scores.unflatten(1, (-1, BLOCK))
    sums = blocks.logsumexp(-1)
    noise = gumbel(keys, counts, sums.shape[1] + BLOCK)
    block = (sums + noise[:, BLOCK:]).argmax(-1)
    chosen = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)
    return block * BLOCK + (chosen + noise[:, :BLOCK]).argmax(-1), sums.logsumexp(-1)


def most_likely(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens, int64 `[batch, count]`, and their log-probs, float32, as `Sampler` has them.

    Args:
        logits: `[batch, vocabulary]`.
        temperature: of sampling.
    """
    logits = at_temperature(logits, temperature)
    highest, ids = logits.topk(count)
    return ids, highest - logits.logsumexp(-1, keepdim=True)


def key_of(seed: int | Sequence[int]) -> int:
    """A row's key, int64, from the seed that its request has."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64).view(np.int64)[0])


def gumbel(keys: Tensor, counts: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float64 `[batch, size]`: entry j of a row is a function of its key, its count and j."""
    lanes = torch.arange(1, size + 1, device=keys.device) * _GOLDEN
    bits = _mix(_mix(keys + (counts + 1) * _GOLDEN)[:, None] + lanes)
    uniform = ((bits >> 12 & (2**52 - 1)).double() + 0.5) * 2.0**-52  # never 0 or 1
    return -(-uniform.log()).log()


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014), which makes a sequence of numbers random; int64 wraps."""
    x = (x ^ (x >> 30 & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (2**33 - 1))
