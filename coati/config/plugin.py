"""How a model is spread over processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from coati.config.options import Settings, option, settings


@dataclass(frozen=True)
class Plugin:
    """What a plugin is like.

    Attributes:
        shards_weights: ranks share the weights; elsewhere each has all of them between steps.
        shards_gradients: and the gradients, so that they cost less memory with every rank.
        offloads: optimizer states are on the host.
        computes_in_fp32: whether it can; trains_adapters: whether it can train some of the weights only.
        splits: with which kinds of model parallelism it goes together.
    """

    shards_weights: bool = False
    shards_gradients: bool = False
    offloads: bool = False
    computes_in_fp32: bool = True
    trains_adapters: bool = True
    splits: tuple[str, ...] = ()


PLUGINS = {
    "ddp": Plugin(splits=("tensor_parallel", "pipeline_parallel", "sequence_parallel")),
    "zero1": Plugin(splits=("tensor_parallel", "pipeline_parallel", "sequence_parallel")),
    "zero2": Plugin(shards_gradients=True, splits=("tensor_parallel", "sequence_parallel")),
    "zero2-offload": Plugin(shards_gradients=True, offloads=True),
    "gemini": Plugin(shards_weights=True, shards_gradients=True, computes_in_fp32=False, trains_adapters=False),
}


@settings
class PluginConfig(Settings):
    """How a model is spread over the processes."""

    plugin: Literal["ddp", "zero1", "zero2", "zero2-offload", "gemini"] = option(
        "ddp", "what is sharded, see docs/plugins.md", common=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on GPUs (fp16 on those before Ampere) and under gemini, fp32 elsewhere", common=True
    )
    device: Literal["auto", "cpu"] = option("auto", "auto: GPUs, if the machine has any; cpu: no GPU in any case")
    tensor_parallel: int = option(1, "processes that share each layer's weights (with ddp, zero1, zero2)", ge=1)
    pipeline_parallel: int = option(1, "processes that share the layers (with ddp, zero1)", ge=1)
    sequence_parallel: int = option(1, "processes that share each sequence (with ddp, zero1, zero2)", ge=1)
    split_sequence: bool = option(
        False, "with tensor_parallel: each process holds a part of the sequence between layers"
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global L2 norm; 0 for no clipping", ge=0)
    max_skipped_steps: int = option(
        3, "stop after this many steps in a row with a loss or gradient that isn't finite", ge=1
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, 4/3 time", common=True
    )
    offload_activations: bool = option(
        False, "with gradient_checkpointing, on GPUs: what it keeps of each layer waits in the host's memory"
    )
    feed_forward_tokens: int = option(
        0,
        "for long rows: tokens that a layer's feed-forward block computes at a time, and once more in the backward "
        "pass; 0: all",
        ge=0,
    )
    shard_fraction: float = option(1.0, "gemini: share of the parameters that is sharded (0: as zero2)", ge=0, le=1)
    offload_optimizer_fraction: float = option(
        0.0, "gemini: share of the optimizer states kept on the host", ge=0, le=1
    )
    offload_parameter_fraction: float = option(0.0, "gemini: share of the parameters kept on the host", ge=0, le=1)

    def problems(self) -> Iterator[str]:
        if self.offload_activations and not self.gradient_checkpointing:
            yield "offload_activations is about what gradient_checkpointing keeps: set gradient_checkpointing too"
        if self.feed_forward_tokens and self.split_sequence:
            yield "feed_forward_tokens and split_sequence both split rows between layers: leave one of them out"

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on one micro-batch together."""
        return self.tensor_parallel * self.pipeline_parallel * self.sequence_parallel

    @property
    def splits_models(self) -> bool:
        """Whether several processes work on one micro-batch together."""
        return self.model_parallel_size > 1

    @property
    def splits_vocabulary(self) -> bool:
        """Whether no process has the logits of all tokens."""
        return self.tensor_parallel > 1

    @property
    def splits_sequences(self) -> bool:
        """Whether no process has all tokens of a row between layers."""
        return self.sequence_parallel > 1 or self.split_sequence

    @property
    def holds_whole_models(self) -> bool:
        """Whether each process has all weights of a model between steps."""
        return not self.splits_models and not PLUGINS[self.plugin].shards_weights
