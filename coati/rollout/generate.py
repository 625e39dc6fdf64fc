"""Sampled responses with the log-probs they were sampled with."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coati.rollout.config import GenerationConfig
from coati.rollout.engine import RolloutEngine
from coati.rollout.generator import Completion, OnDone, Request, report
from coati.rollout.prompts import pad_left
from coati.rollout.vllm import VLLMEngine
from coati.transfer import to_device

KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Rollout:
    """Prompts and responses, one row each: prompt, response, then padding on the right.

    Attributes:
        input_ids: int64 `[batch, seq]`.
        attention_mask: bool `[batch, seq]`, True on prompt and response.
        response_mask: bool `[batch, seq]`, True on response tokens, EOS included.
        log_probs: float32 `[batch, seq]`, of the response tokens at sampling (at the sampling temperature, before
            top-k and the like); 0 elsewhere. None where transformers generated: beam search, and models without keys
            and values.
        finished: bool `[batch]`, the response ended by itself, not at the longest length.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor | None
    finished: Tensor

    def response_ids(self) -> list[list[int]]:
        """The sampled ids of each response."""
        rows, masks = self.input_ids.cpu(), self.response_mask.cpu()
        return [row[mask].tolist() for row, mask in zip(rows, masks, strict=True)]

    def to(self, device):
        """The same on another device."""
        return replace(self, **{name: to_device(x, device) for name, x in vars(self).items() if x is not None})

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: list[Completion], pad_id: int, device) -> "Rollout":
        """Rows of given prompts and completions."""
        seq = max(len(p) + len(c.ids) for p, c in zip(prompts, completions, strict=True))
        input_ids = torch.full((len(prompts), seq), pad_id)
        attention_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        response_mask, log_probs = torch.zeros_like(attention_mask), torch.zeros(input_ids.shape)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = len(prompt), len(prompt) + len(completion.ids)
            input_ids[i, :end] = torch.tensor([*prompt, *completion.ids])
            attention_mask[i, :end] = response_mask[i, start:end] = True
            if completion.log_probs is not None:
                log_probs[i, start:end] = torch.tensor(completion.log_probs)
        sampled = all(completion.log_probs is not None for completion in completions)
        finished = torch.tensor([completion.finish_reason != "length" for completion in completions])
        tensors = (input_ids, attention_mask, response_mask, log_probs if sampled else None, finished)
        return cls(*(None if x is None else to_device(x, device) for x in tensors))


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    eos_ids: list[int],
    pad_id: int,
    seeds: Sequence | None = None,
    tokenizer=None,
    batch_size: int = 64,
    on_done: OnDone | None = None,
) -> Rollout:
    """Draws one response a prompt.

    Args:
        model: an `Actor` with all its weights at hand (`Engine.full()`).
        prompts: token ids.
        eos_ids: tokens that end a response.
        seeds: one for each response: an int or several; drawn from torch's generator if not given.
        tokenizer: for `config.stop`.
        batch_size: rows generated together.
        on_done: called with a prompt's place and its completion, as soon as coati's engine has ended it.

    Raises:
        UserError: settings that contradict each other, or an empty prompt.
    """
    config.check_generation()
    if seeds is None:
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
    with_vllm = config.rollout_engine == "vllm"
    if config.num_beams > 1 or not (with_vllm or has_keys_and_values(model)):
        completions = report(_by_transformers(model, prompts, config, eos_ids, pad_id, tokenizer), on_done)
    else:
        stop = stop_at(tokenizer, config.stop) if config.stop else None
        kind = VLLMEngine if with_vllm else RolloutEngine
        engine = kind(model, config, eos_ids=eos_ids, stop=stop, slots=batch_size)
        completions = engine.generate([Request(p, s) for p, s in zip(prompts, seeds, strict=True)], on_done)
    return Rollout.of(prompts, completions, pad_id, next(model.parameters()).device)


def has_keys_and_values(model) -> bool:
    """Whether every layer attends to keys and values, as `RolloutEngine` needs; not so in Mamba and its hybrids."""
    transformer = model.transformer
    kinds = getattr(transformer.config, "layer_types", None) or ()
    return not transformer._is_stateful and set(kinds) <= KEYS_AND_VALUES


def stop_at(tokenizer, texts: Sequence[str]):
    """Says which responses now hold one of the texts, from their ids; asked after every token."""
    # a token has a byte or more; the few before it may change how the first ones are written
    reach = max(len(text.encode()) for text in texts) + 4

    def stopped(responses: list[list[int]]) -> list[bool]:
        ends = tokenizer.batch_decode([ids[-reach:] for ids in responses])
        return [any(text in end for text in texts) for end in ends]

    return stopped


def _by_transformers(model, prompts, config: GenerationConfig, eos_ids, pad_id, tokenizer) -> list[Completion]:
    sampling = config.temperature > 0 and config.num_beams == 1
    keywords = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p) if sampling else {}
    if sampling and config.min_p:
        keywords["min_p"] = config.min_p
    if config.stop:
        keywords |= dict(stop_strings=list(config.stop), tokenizer=tokenizer)
    ids, mask = pad_left(prompts, pad_id, next(model.parameters()).device)
    with _nothing_but_our_settings(model.transformer):
        sequences = model.generate(
            ids,
            mask.long(),
            do_sample=sampling,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens or None,
            repetition_penalty=config.repetition_penalty,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
            **keywords,
        )
    responses = sequences[:, ids.shape[1] :]
    lengths, finished = response_lengths(responses, eos_ids)
    return [
        Completion(row[:n].tolist(), None, "eos" if end else "length")
        for row, n, end in zip(responses, lengths.tolist(), finished.tolist(), strict=True)
    ]


@contextmanager
def _nothing_but_our_settings(transformer):
    """transformers fills what we don't name from the checkpoint's generation_config.json; a repetition penalty from
    there would sample from another distribution than the one that is trained."""
    from transformers import GenerationConfig as Defaults

    published = transformer.generation_config
    transformer.generation_config = Defaults(suppress_tokens=published.suppress_tokens)
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
