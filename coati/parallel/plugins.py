"""From one word (`zero2`, `gemini`, ...) to a configured Colossal-AI plugin, or one line that says why not."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from coati.config import option
from coati.errors import UserError

# Name -> how it lays out its fp32 master weights
PLUGINS = {"ddp": "ddp", "zero1": "zero", "zero2": "zero", "zero2-offload": "zero", "gemini": "gemini"}


@dataclass
class PluginConfig:
    """How a model is spread over the processes."""

    plugin: str = option("ddp", f"one of {', '.join(PLUGINS)}")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on CUDA and under gemini, fp32 elsewhere"
    )
    tensor_parallel: int = option(1, "processes that share each layer's weights (with ddp, zero1, zero2)")
    pipeline_parallel: int = option(1, "processes that share the layers (with ddp, zero1)")
    sequence_parallel: int = option(1, "processes that share each sequence (with ddp, zero1, zero2)")
    split_sequence: bool = option(
        False, "with tensor_parallel: each process holds a part of the sequence between layers"
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global L2 norm; 0 for no clipping")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, 4/3 time")
    gemini_placement: Literal["static", "auto"] = option("static", "auto moves chunks by CUDA's memory statistics")
    shard_fraction: float = option(1.0, "gemini, static: share of the parameters that is sharded (0: as zero2)")
    offload_optimizer_fraction: float = option(0.0, "gemini, static: share of the optimiser states kept on the host")
    offload_parameter_fraction: float = option(0.0, "gemini, static: share of the parameters kept on the host")

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on one micro-batch together."""
        return self.tensor_parallel * self.pipeline_parallel * self.sequence_parallel


def resolve_precision(config: PluginConfig) -> str:
    """The precision that `auto` stands for under this plugin on this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if config.plugin == "gemini" or torch.cuda.is_available() else "fp32"


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
                "gemini can't train LoRA adapters: use --plugin zero2, or all weights (--lora_rank 0, adapters merged)"
            )
        if precision == "fp32":
            raise UserError("gemini computes in bf16 or fp16: use --precision bf16, or --plugin zero2 for fp32")
        if config.gemini_placement == "auto" and not cuda:
            raise UserError("gemini's auto placement reads CUDA's memory statistics: use --gemini_placement static")
    if precision == "fp16" and not cuda:
        raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")
    for name in ("shard_fraction", "offload_optimizer_fraction", "offload_parameter_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}: it must lie between 0 and 1")


def _check_sizes(config: PluginConfig, lora: bool, world_size: int | None):
    """Tensor, pipeline and sequence parallelism: what goes with what."""
    sizes = {f"{kind}_parallel": getattr(config, f"{kind}_parallel") for kind in ("tensor", "pipeline", "sequence")}
    used = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: it must be at least 1")
    if config.split_sequence and (sizes["tensor_parallel"] == 1 or len(used) > 1):
        raise UserError(
            "split_sequence splits what tensor_parallel alone leaves whole: use it with tensor_parallel only"
        )
    if not used:
        return
    if lora:
        raise UserError(
            f"LoRA adapters don't combine with {used[0]}: use --plugin zero2 alone, or all weights (--lora_rank 0, "
            "adapters merged)"
        )
    if world_size is not None and world_size % config.model_parallel_size:
        raise UserError(f"{' x '.join(used)} needs a multiple of {config.model_parallel_size} processes: {world_size}")
    if config.plugin in ("gemini", "zero2-offload"):
        raise UserError(f"{config.plugin} doesn't combine with {used[0]}: use --plugin zero1")
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
        overlap_communication=torch.cuda.is_available(),
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

    cuda = torch.cuda.is_available()
    static = config.gemini_placement == "static"
    fractions = dict(
        shard_param_frac=config.shard_fraction,
        offload_optim_frac=config.offload_optimizer_fraction,
        offload_param_frac=config.offload_parameter_fraction,
    )
    return GeminiPlugin(
        placement_policy=config.gemini_placement,
        precision=precision,
        max_norm=config.max_grad_norm,
        enable_gradient_accumulation=accumulates,
        enable_async_reduce=cuda,
        pin_memory=cuda,
        initial_scale=2**16,
        **(fractions if static else {}),
    )
