"""From one word (`zero2`, `gemini`, ...) to a configured Colossal-AI plugin, or one line that says why not."""

from typing import Any

import torch

from coati.config.plugin import PLUGINS, PluginConfig
from coati.errors import UserError


def resolve_precision(config: PluginConfig) -> str:
    """The precision that `auto` stands for under this plugin on this machine."""
    if config.precision != "auto":
        return config.precision
    if not torch.cuda.is_available():
        return "bf16" if config.plugin == "gemini" else "fp32"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def check_plugin(config: PluginConfig, *, lora: bool = False, world_size: int | None = None):
    """Refuses what Colossal-AI can't do, before any work.

    Raises:
        UserError: one line that names an alternative.
    """
    precision, cuda = resolve_precision(config), torch.cuda.is_available()
    if config.plugin not in PLUGINS:
        raise UserError(f"unknown plugin {config.plugin!r}: choose one of {', '.join(PLUGINS)}")
    _check_sizes(config, lora, world_size)
    if config.plugin == "gemini":
        if lora:
            raise UserError(
                "gemini can't train LoRA adapters: use --plugin zero2, or train all weights (--lora_rank 0)"
            )
        if precision == "fp32":
            raise UserError("gemini computes in bf16 or fp16: use --precision bf16, or --plugin zero2 for fp32")
    if precision == "fp16" and not cuda:
        raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")


def _check_sizes(config: PluginConfig, lora: bool, world_size: int | None):
    """Tensor, pipeline and sequence parallelism: what goes with what."""
    sizes = {f"{kind}_parallel": getattr(config, f"{kind}_parallel") for kind in ("tensor", "pipeline", "sequence")}
    used = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    if config.split_sequence and (sizes["tensor_parallel"] == 1 or len(used) > 1):
        raise UserError(
            "split_sequence splits what tensor_parallel alone leaves whole: use it with tensor_parallel only"
        )
    if not used:
        return
    if world_size is not None and world_size % config.model_parallel_size:
        raise UserError(f"{' x '.join(used)} needs a multiple of {config.model_parallel_size} processes: {world_size}")
    if config.plugin in ("gemini", "zero2-offload"):
        raise UserError(f"{config.plugin} doesn't combine with {used[0]}: use --plugin zero1")
    if lora:
        raise UserError(f"LoRA adapters don't combine with {used[0]}: use --plugin zero2 alone, or --lora_rank 0")
    if sizes["pipeline_parallel"] > 1 and config.plugin == "zero2":
        raise UserError("zero2 would exchange gradients once a micro-batch under pipeline_parallel: use --plugin zero1")
    if sizes["sequence_parallel"] > 1 and len(used) > 1:
        raise UserError(
            f"sequence_parallel doesn't combine with {used[0]}: use one of them, with --plugin zero1 or zero2"
        )


def make_booster(config: PluginConfig, *, accumulates: bool):
    """A Colossal-AI booster for one model.

    Args:
        accumulates: whether several backward passes may come before an optimiser step (Gemini wants to know).
    """
    from colossalai.booster import Booster

    precision = resolve_precision(config)
    if config.model_parallel_size > 1:
        return Booster(plugin=_hybrid(config, precision))
    if config.plugin == "ddp":
        return Booster(plugin=_ddp(), mixed_precision="fp16" if precision == "fp16" else None)
    if config.plugin == "gemini":
        return Booster(plugin=_gemini(config, precision, accumulates))
    return Booster(plugin=_zero(config, precision))


def _hybrid(config: PluginConfig, precision: str):
    from coati.parallel.hybrid import HybridPlugin

    split: dict[str, Any] = dict(tp_size=config.tensor_parallel, pp_size=config.pipeline_parallel)
    if config.sequence_parallel > 1:
        split |= dict(sp_size=config.sequence_parallel, enable_sequence_parallelism=True)
        split |= dict(sequence_parallelism_mode="all_to_all")
    return HybridPlugin(
        **split,
        split_sequence=config.split_sequence,
        zero_stage={"ddp": 0, "zero1": 1, "zero2": 2}[config.plugin],
        precision=precision,
        max_norm=config.max_grad_norm,
        # under pipeline parallelism nothing waits for the stream that reduces before gradients are read
        overlap_communication=torch.cuda.is_available() and config.pipeline_parallel == 1,
        broadcast_buffers=False,
    )


def _ddp():
    from colossalai.booster.plugin import TorchDDPPlugin

    return TorchDDPPlugin(broadcast_buffers=False)


def _zero(config: PluginConfig, precision: str):
    from colossalai.booster.plugin import LowLevelZeroPlugin

    return LowLevelZeroPlugin(
        stage=1 if config.plugin == "zero1" else 2,
        precision=precision,
        max_norm=config.max_grad_norm,
        cpu_offload=config.plugin == "zero2-offload",
        overlap_communication=torch.cuda.is_available(),  # CPU tensors have no record_stream
        initial_scale=2**16,
    )


def _gemini(config: PluginConfig, precision: str, accumulates: bool):
    from colossalai.booster.plugin import GeminiPlugin

    cuda, clips = torch.cuda.is_available(), config.max_grad_norm > 0
    return GeminiPlugin(
        placement_policy="static",
        shard_param_frac=config.shard_fraction,
        offload_optim_frac=config.offload_optimizer_fraction,
        offload_param_frac=config.offload_parameter_fraction,
        precision=precision,
        max_norm=config.max_grad_norm,
        enable_gradient_accumulation=accumulates,
        enable_async_reduce=cuda and clips,  # without a norm to wait for, storage is freed while it is still read
        # a pinned copy of every shard on the host pays where shards travel there
        pin_memory=cuda and config.offload_optimizer_fraction + config.offload_parameter_fraction > 0,
        initial_scale=2**16,
    )
