"""Completions by coati's engine, by vLLM or by transformers, depending on the settings."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from coati.config.generation import GenerationConfig
from coati.rollout.engine import RolloutEngine
from coati.rollout.generator import Completion, FollowUps, OnDone, Request, in_rounds, notify_done
from coati.rollout.prompts import eos_ids, pad_left
from coati.rollout.vllm import VLLMEngine

KV_CACHE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class PolicyGenerator:
    """The `Generator` of a policy that is being trained: each call samples with the current weights.

    Args:
        full: gives the plain model with unsharded weights, for the time of a call (`Engine.full`).
        batch_size: rows generated together.
    """

    def __init__(self, full: Callable[[], AbstractContextManager], tokenizer, pad_id: int, batch_size: int = 64):
        self.full, self.tokenizer, self.pad_id, self.batch_size = full, tokenizer, pad_id, batch_size

    @classmethod
    def of_actor(cls, actor, tokenizer, batch_size: int = 64) -> "PolicyGenerator":
        """Of an `Actor` that is whole in this process."""
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(lambda: nullcontext(actor), tokenizer, pad, batch_size)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: GenerationConfig,
        on_done: OnDone | None = None,
        follow_ups: FollowUps | None = None,
    ) -> list[Completion]:
        """See `Generator`. The weights are gathered once."""
        with self.full() as model:
            options = dict(pad_id=self.pad_id, tokenizer=self.tokenizer, batch_size=self.batch_size, on_done=on_done)
            options |= dict(eos_ids=eos_ids(self.tokenizer, model), follow_ups=follow_ups)
            return complete(model, requests, sampling, **options)


def complete(
    model,
    requests: Sequence[Request],
    sampling: GenerationConfig,
    *,
    eos_ids: list[int],
    pad_id: int = 0,
    tokenizer=None,
    batch_size: int = 64,
    on_done: OnDone | None = None,
    follow_ups: FollowUps | None = None,
) -> list[Completion]:
    """One completion per request, in the order of their numbers, by the engine that the settings choose.

    Args:
        model: an `Actor` with unsharded weights.
        eos_ids: tokens that end a response.
        pad_id: what fills rows where transformers generates.
        tokenizer: for `sampling.stop`.
        batch_size: rows generated together.
        on_done: called with a request's number and its completion as soon as that is known to have ended.
        follow_ups: requests after these. vLLM and transformers begin them when all before have ended.

    Raises:
        UserError: settings that contradict each other, or an empty prompt.
    """
    sampling.check_installed()
    with_vllm = sampling.rollout_engine == "vllm"
    if sampling.num_beams > 1 or not (with_vllm or has_kv_cache(model)):

        def by_transformers(requests: Sequence[Request], on_done: OnDone) -> list[Completion]:
            prompts = [request.prompt for request in requests]
            return notify_done(_by_transformers(model, prompts, sampling, eos_ids, pad_id, tokenizer), on_done)

        return in_rounds(by_transformers, requests, on_done, follow_ups)
    stop = stop_at(tokenizer, sampling.stop) if sampling.stop else None
    options = dict(eos_ids=eos_ids, stop=stop, slots=batch_size)
    if with_vllm:
        return VLLMEngine(model, sampling, **options).generate(requests, on_done, follow_ups)
    return RolloutEngine(model, sampling, **options).generate(requests, on_done, follow_ups)


def has_kv_cache(model) -> bool:
    """Whether every layer has a KV cache, as `RolloutEngine` needs; not so in Mamba and its hybrids."""
    transformer = model.transformer
    kinds = getattr(transformer.config.get_text_config(), "layer_types", None) or ()
    return not transformer._is_stateful and set(kinds) <= KV_CACHE_LAYERS


def stop_at(tokenizer, texts: Sequence[str]):
    """A function that says which responses now contain one of the texts, from their ids; called after every token."""
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
    """transformers takes other settings from the checkpoint's generation_config.json; its repetition penalty would
    sample from another distribution than the one that is trained."""
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
