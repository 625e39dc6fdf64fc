"""Settings that all trainers share."""

from dataclasses import dataclass
from typing import Literal

from coati.config import option
from coati.data.config import DataConfig
from coati.errors import UserError
from coati.models.lora import LoraSettings
from coati.parallel.plugins import PluginConfig
from coati.tracking.config import TrackingConfig


@dataclass
class ModelConfig:
    """Where the model and its tokenizer come from."""

    model: str | None = option(None, "folder or name of a pretrained model")
    model_config: str | None = option(None, "a config.json to start from random weights (with --model: overrides it)")
    tokenizer: str | None = option(None, "folder or name of the tokenizer, if it isn't in --model's folder")
    attn_implementation: str = option(
        "auto", "sdpa, eager or flash_attention_2 (CUDA only); auto: sdpa where the model supports it, else eager"
    )
    lora_rank: int = option(0, "rank of LoRA adapters; 0 trains all weights")
    lora_alpha: float = option(16.0, "LoRA's scale: alpha / rank times the adapter")
    lora_dropout: float = option(0.0, "dropout before the adapter")
    lora_target_modules: list[str] = option(("all-linear",), "names of the layers that get adapters")
    merge_lora: bool = option(True, "the final export has the adapters merged into the weights")
    export_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of the final model's weights; auto: that of --model, unless it was trained in a narrower one"
    )

    @property
    def lora(self) -> LoraSettings | None:
        if self.lora_rank == 0:
            return None
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


@dataclass
class RunConfig:
    """How long, how fast, how often."""

    output_dir: str = option("runs/run", "everything the run writes: logs, samples, checkpoints, the final model")
    seed: int = option(42, "of weights, data order, dropout and sampling")
    steps: int = option(0, "optimiser steps (PPO: iterations); 0 for --epochs")
    epochs: float = option(1.0, "passes over the data, when --steps is 0")
    batch_size: int = option(64, "rows of one step over all processes and micro-batches")
    micro_batch_size: int = option(8, "rows of one forward and backward pass on one process")
    max_tokens_per_batch: int | None = option(
        None, "tokens of one forward and backward pass on one process, padding included, instead of --micro_batch_size"
    )
    learning_rate: float = option(1e-5, "AdamW's peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "how it falls to --final_rate after warm-up")
    warmup: float = option(0.03, "share of the steps over which it rises from 0")
    final_rate: float = option(0.1, "where linear and cosine end, as a share of the peak")
    weight_decay: float = option(0.0, "of matrices; vectors are not decayed")
    max_skipped_steps: int = option(3, "stop after this many steps in a row with a loss or gradient that isn't finite")
    log_every: int = option(1, "steps between two lines in the logs")
    eval_every: int = option(0, "steps between two evaluations; 0 for before the first and after the last step only")
    evaluators: list[str] = option((), "functions of the trainer, FILE.py:name, that give more metrics to evaluations")
    save_every: int = option(0, "steps between two checkpoints; 0 for after the last step only")
    keep_checkpoints: int = option(2, "how many of the newest stay; the best stays too")
    resume: str = option("never", "never, auto (the newest whole checkpoint of --output_dir, if any) or a checkpoint")
    samples: int = option(16, "evaluation rows whose texts are kept for the report")

    def check(self, world_size: int):
        """Raises UserError for sizes that don't fit together."""
        for name in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.batch_size % world_size:
            raise UserError(f"batch_size {self.batch_size} is not a multiple of the {world_size} processes")


@dataclass
class TrainerConfig(ModelConfig, DataConfig, PluginConfig, TrackingConfig, RunConfig):
    """Everything that SFT, reward-model and PPO runs have in common."""

    def check(self, world_size: int):
        """Raises UserError for sizes that don't fit together."""
        super().check(world_size)
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.longest_row:
            raise UserError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but a row (of preferences: a pair) can have "
                f"{self.longest_row} tokens: raise it, or allow shorter rows"
            )

    @property
    def longest_row(self) -> int:
        """Most tokens that are trained together: a row, or a pair of them."""
        return self.max_length

    @property
    def rows_per_pass(self) -> int:
        """Rows of the longest kind in one forward and backward pass."""
        if self.max_tokens_per_batch is None:
            return self.micro_batch_size
        return self.max_tokens_per_batch // self.longest_row
