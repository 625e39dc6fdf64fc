"""Sampled responses with the log-probs they were sampled with.

The engine knows token ids only: prompts in; ids, log-probs and finish reasons out. It is transformers' `generate`.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from coati.config import option
from coati.errors import UserError


@dataclass
class GenerationConfig:
    """How responses are drawn."""

    max_new_tokens: int = option(128, "longest response, in tokens")
    min_new_tokens: int = option(0, "shortest response, in tokens")
    temperature: float = option(1.0, "of sampling; 0 for greedy")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0 for all")
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this share of the probability")
    num_beams: int = option(1, "beam search with that many beams instead of sampling")


@dataclass(frozen=True)
class Rollout:
    """Prompts and responses, one row each: prompt, response, then padding on the right.

    Attributes:
        input_ids: int64 `[batch, seq]`.
        attention_mask: bool `[batch, seq]`, True on prompt and response.
        response_mask: bool `[batch, seq]`, True on response tokens, EOS included.
        log_probs: float32 `[batch, seq]`, of the response tokens at sampling (at the sampling temperature, before
            top-k and top-p); 0 elsewhere. None under beam search.
        finished: bool `[batch]`, the response ended with EOS.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor | None
    finished: Tensor

    def response_ids(self) -> list[list[int]]:
        """The sampled ids of each response."""
        return [ids[mask].tolist() for ids, mask in zip(self.input_ids, self.response_mask, strict=True)]


class _RecordLogProbs:
    """A logits processor that keeps the log-prob of every sampled token, one step's logits at a time.

    transformers can return all scores, but that is [batch, new tokens, vocabulary] of memory.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.previous: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids)
        self.previous = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def take(self, input_ids: Tensor):
        """Looks up the last token of `input_ids` in the distribution it was drawn from."""
        if self.previous is not None:
            self.columns.append(self.previous.gather(1, input_ids[:, -1:]))


def generate(
    model, prompts: Tensor, prompt_mask: Tensor, config: GenerationConfig, *, eos_ids: list[int], pad_id: int
) -> Rollout:
    """Draws one response a prompt.

    Args:
        model: an `Actor` with all its weights at hand (`Engine.full()`).
        prompts: int64 `[batch, prompt]`, padded on the left.
        prompt_mask: bool `[batch, prompt]`.
        eos_ids: tokens that end a response.

    Raises:
        UserError: settings that contradict each other.
    """
    if config.temperature == 0 and config.num_beams == 1 and (config.top_k or config.top_p < 1):
        raise UserError("temperature 0 is greedy: leave out top_k and top_p, or raise the temperature")
    from transformers import MinNewTokensLengthLogitsProcessor

    sampling = config.temperature > 0 and config.num_beams == 1
    recorder = _RecordLogProbs(config.temperature if sampling else 1.0)
    processors = [recorder] if config.num_beams == 1 else []
    if config.min_new_tokens:  # after the recorder: it keeps the policy's own distribution
        width, device = prompts.shape[1], prompts.device
        processors.append(MinNewTokensLengthLogitsProcessor(width, config.min_new_tokens, eos_ids, device=device))
    keywords = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p) if sampling else {}
    with _nothing_but_our_settings(model.transformer):
        sequences = model.generate(
            prompts,
            prompt_mask.long(),
            do_sample=sampling,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
            logits_processor=processors,
            **keywords,
        )
    responses = sequences[:, prompts.shape[1] :]
    log_probs = None
    if config.num_beams == 1:
        recorder.take(sequences)
        log_probs = torch.cat(recorder.columns, dim=1)
    return _compact(prompts, prompt_mask.bool(), responses, log_probs, eos_ids, pad_id)


@contextmanager
def _nothing_but_our_settings(transformer):
    """transformers fills what we don't name from the checkpoint's generation_config.json; a repetition penalty from
    there would sample from another distribution than the one that is trained."""
    from transformers import GenerationConfig as Defaults

    published = transformer.generation_config
    transformer.generation_config = Defaults()
    try:
        yield
    finally:
        transformer.generation_config = published


def response_lengths(responses: Tensor, eos_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens up to and including the first EOS, `[batch]`, and whether there is one, bool `[batch]`.

    Found by position: what stands after the first EOS is padding whatever its id, and an EOS that is also the padding
    token still counts as the response's own.
    """
    is_eos = torch.isin(responses, torch.tensor(eos_ids, device=responses.device))
    finished = is_eos.any(dim=1)
    first = is_eos.long().argmax(dim=1) + 1
    return torch.where(finished, first, responses.shape[1]), finished


def _compact(prompts, prompt_mask, responses, log_probs, eos_ids, pad_id) -> Rollout:
    """Moves all padding to the right: absolute positions are then the same in rollout and training."""
    lengths, finished = response_lengths(responses, eos_ids)
    prompt_lengths = prompt_mask.sum(1)
    seq = int((prompt_lengths + lengths).max())
    shape = (len(prompts), seq)
    device = prompts.device
    input_ids = torch.full(shape, pad_id, dtype=torch.long, device=device)
    placed = torch.zeros(shape, device=device)
    for row, (p, n) in enumerate(zip(prompt_lengths.tolist(), lengths.tolist(), strict=True)):
        input_ids[row, :p] = prompts[row][prompt_mask[row]]
        input_ids[row, p : p + n] = responses[row, :n]
        if log_probs is not None:
            placed[row, p : p + n] = log_probs[row, :n]
    positions = torch.arange(seq, device=device)[None]
    attention_mask = positions < (prompt_lengths + lengths)[:, None]
    response_mask = attention_mask & (positions >= prompt_lengths[:, None])
    return Rollout(input_ids, attention_mask, response_mask, None if log_probs is None else placed, finished)
