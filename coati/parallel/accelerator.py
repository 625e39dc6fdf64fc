"""What Colossal-AI 0.5.0 needs to run its plugins on CPU ranks over gloo.

Its `CpuAccelerator` raises in most methods, three places assert CUDA or NPU, and Gemini's Adam wants a compiled kernel.
This module has an accelerator with the missing methods and an Adam on torch's kernels; `install()` registers them.
"""

import contextlib
import sys

import torch
import torch.distributed as dist
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.zero.gemini.chunk import Chunk, ChunkManager
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer
from torch.optim.adam import adam as adam_of_torch
from torch.optim.adamw import adamw as adamw_of_torch


class _NoStream:
    """CPU operations run in order: there is no stream to wait for."""

    def wait_stream(self, *_):
        """Nothing to wait for."""

    wait_event = wait_stream

    def synchronize(self):
        """Nothing to wait for."""

    record_event = synchronize


class HostAccelerator(CpuAccelerator):
    """Colossal-AI's CPU accelerator with every method its plugins call."""

    @property
    def name(self):
        # Gemini's chunks tell "on the device" from "offloaded" by this name and know cuda, npu and cpu; with "cpu" a
        # resident chunk would count as offloaded and its bookkeeping asserts.
        return "npu"

    @name.setter
    def name(self, value):
        """The base class assigns its own name."""

    def current_device(self):
        return torch.device("cpu")

    def set_device(self, device=None):
        """There is one CPU."""

    def get_device_name(self, device=None):
        return "cpu"

    def device_count(self):
        return 1

    def synchronize(self, device=None):
        """CPU operations have finished when they return."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, new_state, device=None):
        torch.set_rng_state(new_state)

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def seed(self):
        torch.seed()

    def initial_seed(self):
        return torch.initial_seed()

    def empty_cache(self):
        """The allocator of the C library keeps no cache that torch could empty."""

    def memory_allocated(self, device=None):
        return self.memory_reserved()

    def max_memory_allocated(self, device=None):
        return self.max_memory_reserved() * 1024

    def reset_peak_memory_stats(self, device=None):
        """The kernel's peak of a process can't be reset."""

    def Stream(self, *args, **kwargs):
        return _NoStream()

    def current_stream(self, device=None):
        return _NoStream()

    default_stream = current_stream

    def set_stream(self, stream):
        """There is one stream."""

    def stream(self, stream):
        return contextlib.nullcontext()

    def autocast(self, enabled=True, dtype=torch.bfloat16, cache_enabled=True):
        return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def adam_update(params, grads, first, second, *, lr, betas, eps, step, adamw, bias_correction, weight_decay, scale):
    """One Adam(W) step in place on lists of tensors, by torch's fused kernel.

    `scale` divides the gradients first (loss scale times clipping); -1 means none.

    Raises:
        ValueError: without bias correction, which is not implemented.
    """
    if not bias_correction:
        raise ValueError("Adam without bias correction is not implemented")
    grads = [g.to(m.dtype) if scale == -1 else g.to(m.dtype) / scale for g, m in zip(grads, first, strict=True)]
    steps = [torch.tensor(float(step - 1), device=p.device) for p in params]  # the kernel counts before it uses them
    update = adamw_of_torch if adamw else adam_of_torch
    settings = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    update(params, grads, first, second, [], steps, fused=True, amsgrad=False, maximize=False, **settings)


class _TorchCPUAdam:
    """The interface of Colossal-AI's compiled CPU Adam."""

    def __init__(self, lr, beta1, beta2, eps, weight_decay, adamw_mode):
        self.adamw_mode = adamw_mode

    def step(self, step, lr, beta1, beta2, eps, weight_decay, bias_correction, p, g, m, v, div_scale=-1):
        settings = dict(lr=lr, betas=(beta1, beta2), eps=eps, step=step, weight_decay=weight_decay, scale=div_scale)
        adam_update([p], [g], [m], [v], adamw=self.adamw_mode, bias_correction=bias_correction, **settings)


class _TorchFusedAdam:
    """The interface of Colossal-AI's compiled multi-tensor Adam."""

    @staticmethod
    def multi_tensor_adam(
        chunk, overflow, tensors, lr, beta1, beta2, eps, step, adamw, bias_correction, weight_decay, scale
    ):
        grads, params, first, second = tensors
        settings = dict(lr=lr, betas=(beta1, beta2), eps=eps, step=step, weight_decay=weight_decay, scale=scale)
        adam_update(params, grads, first, second, adamw=bool(adamw), bias_correction=bool(bias_correction), **settings)


class _TorchAdamExtension(_Extension):
    """Adam for Gemini, which takes Colossal-AI's only, by torch's kernels: Colossal-AI's own take two minutes to
    compile on each new machine."""

    def __init__(self):
        super().__init__("adam_in_torch", support_aot=False, support_jit=False, priority=10)

    def is_available(self):
        return True

    def assert_compatible(self):
        """Torch runs wherever we run."""

    def build_aot(self):
        raise RuntimeError("Adam in torch operations is not compiled")

    build_jit = build_aot

    def load(self):
        return type("kernel", (_TorchFusedAdam,), {"CPUAdamOptimizer": _TorchCPUAdam})


def _accept_any_device(optimizer):
    """In place of a check that asserts cuda or npu, and nothing else that we rely on."""


def install():
    """Prepares Colossal-AI for this machine, once per process."""
    # colossalai's pipeline looks for these, the second over gloo where torch has NCCL; only Huawei's torch has them
    if not hasattr(dist, "is_hccl_available"):
        setattr(dist, "is_hccl_available", lambda: False)  # noqa: B010
    if not hasattr(dist.Backend, "HCCL"):
        setattr(dist.Backend, "HCCL", "hccl")  # noqa: B010
    _fix_gemini()
    for loader in (FusedOptimizerLoader, CPUAdamLoader):
        loader.REGISTRY = [_TorchAdamExtension]
    if torch.cuda.is_available():
        return
    set_accelerator(HostAccelerator())
    LowLevelZeroOptimizer._sanity_checks = _accept_any_device
    _keep_gemini_shards_in_place()


def _fix_gemini():
    """Three defects of Gemini 0.5.0.

    With gradient accumulation, an unsharded chunk has its earlier gradients multiplied by the number of ranks, and then
    summed over the ranks: on two ranks the first micro-batch counts twice. Dividing beforehand
    restores the sum. Its destructor fails at interpreter exit, when torch is half gone, with a page of messages. And it
    rejects checkpoints in which Adam's step is a number, as the other plugins write it.
    """
    if getattr(ChunkManager, "fixed_by_coati", False):
        return
    rearrange, destroy = ChunkManager.rearrange_accumulated_grad_chunk, GeminiDDP.__del__

    def rearrange_counting_once(self, chunk):
        if chunk.grad_chunk.is_gathered:
            chunk.grad_chunk.cuda_global_chunk.div_(chunk.pg_size)
        return rearrange(self, chunk)

    def destroy_unless_exiting(self):
        if not sys.is_finalizing():
            destroy(self)

    load = GeminiOptimizer.load_single_param_states

    def load_numbers_too(self, param_id, saved_states):
        return load(self, param_id, {name: torch.as_tensor(value) for name, value in saved_states.items()})

    GeminiOptimizer.load_single_param_states = load_numbers_too
    ChunkManager.rearrange_accumulated_grad_chunk = rearrange_counting_once
    GeminiDDP.__del__ = destroy_unless_exiting
    ChunkManager.fixed_by_coati = True


def _keep_gemini_shards_in_place():
    """On CPU ranks Gemini mistakes its shards for offloaded ones, and asserts when it fetches them. Models of less than
    32M parameters don't show it: they are not sharded."""
    if getattr(Chunk, "fixed_by_coati", False):
        return
    close = Chunk.close_chunk

    def close_in_place(chunk):
        close(chunk)
        if not chunk.keep_gathered:
            chunk.cuda_shard, chunk.cpu_shard = chunk.cpu_shard, None

    def stay(manager, *arguments, **keywords):
        """There is one place."""

    Chunk.close_chunk, ChunkManager.move_chunk = close_in_place, stay
    Chunk.fixed_by_coati = True
