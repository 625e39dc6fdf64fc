"""What each plugin doesn't support, checked before any work; the settings are `coati.config.plugin.PluginConfig`."""

import platform

from coati.config.plugin import PLUGINS, Plugin, PluginConfig
from coati.errors import UserError


def resolve_precision(config: PluginConfig) -> str:
    """The precision that `auto` stands for under this plugin on this machine."""
    if config.precision != "auto":
        return config.precision
    import torch

    if not torch.cuda.is_available():
        return "fp32" if PLUGINS[config.plugin].computes_in_fp32 else "bf16"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def cpu_emulates_bf16() -> bool:
    """Whether this is an x86 CPU without instructions for bf16: products take several times as long as in fp32."""
    import torch

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_plugin(config: PluginConfig, *, lora: bool = False, world_size: int | None = None):
    """Raises for unsupported combinations, before any work.

    Raises:
        UserError: one line that names an alternative.
    """
    if config.plugin not in PLUGINS:
        raise UserError(f"unknown plugin {config.plugin!r}: choose one of {', '.join(PLUGINS)}")
    plugin = PLUGINS[config.plugin]
    _check_sizes(config, plugin, world_size)
    if lora and not plugin.trains_adapters:
        raise UserError(
            f"{config.plugin} doesn't support LoRA adapters: use --plugin zero2, with --tensor_parallel if the frozen "
            "model is too big for one GPU, or all weights (--lora_rank 0, adapters merged)"
        )
    if config.precision == "fp32" and not plugin.computes_in_fp32:
        raise UserError(f"{config.plugin} computes in bf16 or fp16: use --precision bf16, or --plugin zero2 for fp32")
    if config.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")


def _check_sizes(config: PluginConfig, plugin: Plugin, world_size: int | None):
    """Tensor, pipeline and sequence parallelism: what goes with what."""
    sizes = {f"{kind}_parallel": getattr(config, f"{kind}_parallel") for kind in ("tensor", "pipeline", "sequence")}
    used = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    if config.split_sequence and (sizes["tensor_parallel"] == 1 or len(used) > 1):
        raise UserError("split_sequence splits what tensor_parallel alone replicates: use it with tensor_parallel only")
    if not used:
        return
    if world_size is not None and world_size % config.model_parallel_size:
        raise UserError(f"{' x '.join(used)} needs a multiple of {config.model_parallel_size} processes: {world_size}")
    if not plugin.splits:
        raise UserError(f"{config.plugin} doesn't combine with {used[0]}: use --plugin zero1")
    if sizes["pipeline_parallel"] > 1 and "pipeline_parallel" not in plugin.splits:
        raise UserError(
            "zero2 would exchange gradients once per micro-batch under pipeline_parallel: use --plugin zero1"
        )
    if sizes["sequence_parallel"] > 1 and len(used) > 1:
        raise UserError(
            f"sequence_parallel doesn't combine with {used[0]}: use one of them, with --plugin zero1 or zero2"
        )
