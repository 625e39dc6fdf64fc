"""Which plugin spreads a model over the processes, and what each of them can't do. Free of torch: a run's settings are
checked before it is loaded."""

from dataclasses import dataclass
from typing import Literal

from coati.config import option
from coati.errors import UserError


@dataclass(frozen=True)
class Plugin:
    """What a plugin is like.

    Attributes:
        shards_weights: ranks share the weights; elsewhere each has all of them between steps.
        computes_in_fp32, trains_adapters: whether it can.
        splits: with which kinds of model parallelism it goes together.
    """

    shards_weights: bool = False
    computes_in_fp32: bool = True
    trains_adapters: bool = True
    splits: tuple[str, ...] = ()


PLUGINS = {
    "ddp": Plugin(splits=("tensor_parallel", "pipeline_parallel", "sequence_parallel")),
    "zero1": Plugin(splits=("tensor_parallel", "pipeline_parallel", "sequence_parallel")),
    "zero2": Plugin(splits=("tensor_parallel", "sequence_parallel")),
    "zero2-offload": Plugin(),
    "gemini": Plugin(shards_weights=True, computes_in_fp32=False, trains_adapters=False),
}


@dataclass
class PluginConfig:
    """How a model is spread over the processes."""

    plugin: str = option("ddp", f"one of {', '.join(PLUGINS)}")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on GPUs (fp16 on those before Ampere) and under gemini, fp32 elsewhere"
    )
    tensor_parallel: int = option(1, "processes that share each layer's weights (with ddp, zero1, zero2)")
    pipeline_parallel: int = option(1, "processes that share the layers (with ddp, zero1)")
    sequence_parallel: int = option(1, "processes that share each sequence (with ddp, zero1, zero2)")
    split_sequence: bool = option(
        False, "with tensor_parallel: each process holds a part of the sequence between layers"
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global L2 norm; 0 for no clipping")
    max_skipped_steps: int = option(3, "stop after this many steps in a row with a loss or gradient that isn't finite")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, 4/3 time")
    shard_fraction: float = option(1.0, "gemini: share of the parameters that is sharded (0: as zero2)")
    offload_optimizer_fraction: float = option(0.0, "gemini: share of the optimizer states kept on the host")
    offload_parameter_fraction: float = option(0.0, "gemini: share of the parameters kept on the host")

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on one micro-batch together."""
        return self.tensor_parallel * self.pipeline_parallel * self.sequence_parallel

    @property
    def holds_whole_models(self) -> bool:
        """Whether each process has all weights of a model between steps."""
        return self.model_parallel_size == 1 and not PLUGINS[self.plugin].shards_weights


def resolve_precision(config: PluginConfig) -> str:
    """The precision that `auto` stands for under this plugin on this machine."""
    if config.precision != "auto":
        return config.precision
    import torch

    if not torch.cuda.is_available():
        return "fp32" if PLUGINS[config.plugin].computes_in_fp32 else "bf16"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def check_plugin(config: PluginConfig, *, lora: bool = False, world_size: int | None = None):
    """Refuses what Colossal-AI can't do, before any work.

    Raises:
        UserError: one line that names an alternative.
    """
    if config.plugin not in PLUGINS:
        raise UserError(f"unknown plugin {config.plugin!r}: choose one of {', '.join(PLUGINS)}")
    plugin = PLUGINS[config.plugin]
    _check_sizes(config, plugin, lora, world_size)
    if lora and not plugin.trains_adapters:
        raise UserError(
            f"{config.plugin} can't train LoRA adapters: use --plugin zero2, or train all weights (--lora_rank 0)"
        )
    if config.precision == "fp32" and not plugin.computes_in_fp32:
        raise UserError(f"{config.plugin} computes in bf16 or fp16: use --precision bf16, or --plugin zero2 for fp32")
    if config.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")
    for name in ("shard_fraction", "offload_optimizer_fraction", "offload_parameter_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}: it must lie between 0 and 1")


def _check_sizes(config: PluginConfig, plugin: Plugin, lora: bool, world_size: int | None):
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
    if world_size is not None and world_size % config.model_parallel_size:
        raise UserError(f"{' x '.join(used)} needs a multiple of {config.model_parallel_size} processes: {world_size}")
    if not plugin.splits:
        raise UserError(f"{config.plugin} doesn't combine with {used[0]}: use --plugin zero1")
    if lora:
        raise UserError(f"LoRA adapters don't combine with {used[0]}: use --plugin zero2 alone, or --lora_rank 0")
    if sizes["pipeline_parallel"] > 1 and "pipeline_parallel" not in plugin.splits:
        raise UserError("zero2 would exchange gradients once a micro-batch under pipeline_parallel: use --plugin zero1")
    if sizes["sequence_parallel"] > 1 and len(used) > 1:
        raise UserError(
            f"sequence_parallel doesn't combine with {used[0]}: use one of them, with --plugin zero1 or zero2"
        )
