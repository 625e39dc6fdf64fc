"""vLLM (Kwon et al., 2309.06180) behind the rollout engine's interface, in this process.

It starts when a model first generates and stays as long as the model. The weights are synced before each batch
of requests; on a GPU vLLM sleeps between batches, when its weights and its KV cache take no memory. It has log-probs
before its temperature, or after everything; ours are those at the temperature and before anything else. So vLLM's
temperature stays at 1, and its model's logits are scaled.
"""

import copy
import gc
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.models.adapters import merged
from coati.rollout.generator import Completion, FollowUps, OnDone, Request, in_rounds, notify_done
from coati.rollout.prompts import suppressed_ids

# read by vLLM when it is imported; what the user has set stays
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it moves training's threads to other cores
    "VLLM_LOGGING_LEVEL": "ERROR",  # it warns at each start, and at each weight sync that tables were missing
    "VLLM_NO_USAGE_STATS": "1",
}
_engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> vllm.LLM


class VLLMEngine:
    """Completes requests with the weights that `model` has now. Random numbers differ from those of `RolloutEngine`:
    the same seed gives another response. Each process has its own vLLM, and all must start it together.

    Args:
        model: an `Actor` with unsharded weights (`Engine.full()`); adapters are merged for vLLM.
        eos_ids: tokens that end a response.
        stop: says which responses contain a stop string; they are sampled to their end first, and then truncated.
        slots: rows that are generated together, as of a model's first engine.
    """

    def __init__(
        self,
        model,
        config: GenerationConfig,
        *,
        eos_ids: list[int],
        stop: Callable[[list[list[int]]], list[bool]] | None = None,
        slots: int = 256,
    ):
        self.model, self.config, self.eos_ids, self.stop, self.slots = model, config, list(eos_ids), stop, slots

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], on_done: OnDone | None = None, follow_ups: FollowUps | None = None
    ) -> list[Completion]:
        """One completion per request, in the order of their numbers.

        Args:
            on_done: called with each request's number and its completion when all have ended.
            follow_ups: requests after these, which begin when all before have ended. The KV cache that they go on from
                is vLLM's prefix cache.

        Raises:
            UserError: an empty prompt, one that leaves no room for its response, or a model that vLLM doesn't support.
        """
        if not requests:
            return []
        dtype = working_dtype(self.model)
        with _preserving_process_state(next(self.model.parameters()).device):
            os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are passed in this process
            if self.model not in _engines:
                _engines[self.model] = _start(self.model, self.config, self.slots, dtype)
            llm = _engines[self.model]
            with _awake(llm, _weights(self.model), 1 / (self.config.temperature or 1.0)):
                return in_rounds(partial(self.complete, llm), requests, on_done, follow_ups)

    def complete(self, llm, requests: Sequence[Request], on_done: OnDone) -> list[Completion]:
        """Requests that begin together."""
        self.check(requests, llm.llm_engine.model_config.max_model_len)
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self.run(llm, prompts, [self.parameters(request) for request in requests])
        done = [self.completion(*pair) for pair in zip(requests, outputs, strict=True)]
        return notify_done(done, on_done)

    def run(self, llm, prompts: list[dict], parameters: list) -> list:
        try:
            return llm.generate(prompts, parameters, use_tqdm=False)
        except RuntimeError as error:
            if "Unsupported" not in str(error):  # an unsupported head width is only noticed here
                raise
            kind = type(self.model.transformer).__name__
            raise UserError(f"vLLM does not support this {kind}: {str(error).splitlines()[0]}") from error

    def check(self, requests: Sequence[Request], longest: int):
        if suppressed_ids(self.model):
            raise UserError("vLLM would sample this model's suppress_tokens: rollout_engine coati")
        for i, request in enumerate(requests):
            if not len(request.prompt):
                raise UserError(f"prompt {i} is empty: generation starts from at least one token")
            if (length := len(request.prompt) + self.limit(request)) > longest:
                raise UserError(
                    f"prompt {i} and its response may have {length} tokens, and vLLM's KV cache holds {longest}: "
                    "raise vllm_cache if the model's max_position_embeddings allow more"
                )

    def limit(self, request: Request) -> int:
        return self.config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def parameters(self, request: Request):
        """vLLM's `SamplingParams`."""
        from vllm import SamplingParams

        c, limit = self.config, self.limit(request)
        entropy = [request.seed] if isinstance(request.seed, int) else list(request.seed)
        if request.begun:  # else its noise would be that of the tokens that have begun
            entropy.append(request.begun)
        return SamplingParams(
            temperature=float(c.temperature > 0),  # the logits have been divided by it
            top_k=c.top_k,
            top_p=c.top_p,
            min_p=c.min_p,
            repetition_penalty=c.repetition_penalty,
            max_tokens=limit,
            min_tokens=min(max(c.min_new_tokens - request.begun, 0), limit),
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # the model's own: `eos_ids` are all there are
            seed=int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1),
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )

    def completion(self, request: Request, output) -> Completion:
        output = output.outputs[0]
        ids, count, stopped = list(output.token_ids), len(output.token_ids), False
        if self.stop:
            begun = list(request.prompt[-request.begun :]) if request.begun else []
            stops = self.stop([begun + ids[:n] for n in range(1, count + 1)])
            stopped = any(stops)
            count = stops.index(True) + 1 if stopped else count
        log_probs = [candidates[token].logprob for token, candidates in zip(ids, output.logprobs, strict=True)]
        if ids[count - 1] in self.eos_ids:
            reason = "eos"
        else:
            reason = "stop" if stopped else "length"
        return Completion(ids[:count], log_probs[:count], reason)


def working_dtype(model) -> torch.dtype:
    """What the model computes in: under autocast not what its weights are in."""
    parameter = next(model.parameters())
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def cache_bytes(config: GenerationConfig, on_gpu: bool) -> int:
    """Bytes of vLLM's KV cache."""
    default = 8.0 if on_gpu else 1.0
    return int((config.vllm_cache or default) * 2**30)


def gpu_options(free: int, total: int, weights: int, cache: int) -> dict:
    """What a `vllm.LLM` on a GPU is started with beside models that train. Arguments in bytes.

    Raises:
        UserError: there is too little free memory.
    """
    if weights + cache > free:
        sizes = [f"{nbytes / 2**30:.1f} GiB" for nbytes in (weights, cache, free)]
        raise UserError(
            f"vLLM needs {sizes[0]} for its weights and {sizes[1]} for its KV cache, and {sizes[2]} of the GPU are "
            "free: lower vllm_cache, shard the training states (--plugin zero2), or use rollout_engine coati"
        )
    # vLLM takes what it is told for its cache; it only compares this fraction with what is free
    return dict(enforce_eager=False, enable_sleep_mode=True, gpu_memory_utilization=(weights + cache) / total)


def _start(model, config: GenerationConfig, slots: int, dtype: torch.dtype):
    """A `vllm.LLM` of the model's architecture, with random weights."""
    from vllm import LLM

    transformer, device = model.transformer, next(model.parameters()).device
    sizes = vllm_memory(model, config, dtype, on_gpu=device.type == "cuda")
    options: dict = dict(enforce_eager=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        options = gpu_options(*torch.cuda.mem_get_info(device), sizes["parameters"], sizes["KV cache"])
    architecture = copy.deepcopy(transformer.config)
    architecture.architectures = [type(transformer).__name__]
    architecture.eos_token_id = None  # min_tokens would hold it back, too
    with tempfile.TemporaryDirectory() as folder:
        architecture.save_pretrained(folder)
        try:
            llm = LLM(
                folder,
                load_format="dummy",
                dtype=dtype,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's: nothing but our settings
                # a vLLM per rank, each on the GPU of its rank: any other executor takes GPU 0
                distributed_executor_backend="external_launcher",
                max_model_len=-1,  # as much as fits
                max_num_seqs=slots,
                kv_cache_memory_bytes=sizes["KV cache"],
                **options,
            )
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"vLLM does not support this {type(transformer).__name__}: {reason}") from error
    # at its end it would destroy torch's process group, which is training's
    llm.llm_engine.engine_core._finalizer.detach()
    return llm


@contextmanager
def _awake(llm, weights: list[tuple[str, torch.Tensor]], scale: float):
    """Inside, vLLM has these weights and a KV cache; they take memory of a GPU there only."""
    sleeps = llm.llm_engine.model_config.enable_sleep_mode
    if sleeps:
        llm.wake_up(tags=["weights"])
    llm.collective_rpc(_load_weights, args=(weights, scale))
    if sleeps:
        llm.wake_up(tags=["kv_cache"])
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept the KV cache of earlier weights")
    try:
        yield
    finally:
        if sleeps:
            llm.sleep(level=2)  # the weights are not copied to the host: the next call brings new ones


def vllm_memory(model, config: GenerationConfig, dtype: torch.dtype, on_gpu: bool) -> dict[str, int]:
    """Bytes that vLLM takes while it generates (on a CPU, for as long as it runs), by kind: its own weights, and the
    KV cache."""
    weights = {id(p): p.numel() for name, p in model.transformer.named_parameters() if "lora_" not in name}
    return {"parameters": dtype.itemsize * sum(weights.values()), "KV cache": cache_bytes(config, on_gpu)}


def _weights(model) -> list[tuple[str, torch.Tensor]]:
    """The weights by their names in a checkpoint, with adapters merged."""
    from transformers.core_model_loading import revert_weight_conversion

    transformer = merged(model.model) if model.has_adapter else model.transformer
    return list(revert_weight_conversion(transformer, transformer.state_dict()).items())


def _load_weights(worker, weights: list[tuple[str, torch.Tensor]], scale: float):
    """In vLLM's worker: other weights, and logits times `scale`."""
    worker.model_runner.reload_weights(weights_iterator=iter(weights))
    processor = worker.model_runner.get_model().logits_processor
    processor.own_scale = getattr(processor, "own_scale", processor.scale)
    processor.scale = processor.own_scale * scale


@contextmanager
def _preserving_process_state(device: torch.device):
    """At its start vLLM seeds all generators and hides what there is from the garbage collector. On a CPU it makes
    torch.set_num_threads do nothing and sets variables (LD_PRELOAD among them) for processes that it doesn't start."""
    state, numbers, set_num_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    environment = dict(os.environ)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)
            torch.set_num_threads = set_num_threads
            gc.unfreeze()
            os.environ.clear()
            os.environ.update(environment)
