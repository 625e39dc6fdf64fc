"""Settings that all trainers have in common, in sections."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from coati.config import ListOf, Settings, option, section, settings
from coati.config.plugin import PluginConfig
from coati.data.config import DataConfig
from coati.errors import UserError
from coati.tracking.config import TrackingConfig

if TYPE_CHECKING:  # settings are read before torch is loaded
    from coati.models import LoraSettings


@settings
class ModelConfig(Settings):
    """Where the model and its tokenizer come from."""

    path: str | None = option(None, "folder or name of a pretrained model", path="model", common=True)
    model_config: str | None = option(
        None, "a config.json to start from random weights (with --model: overrides it)", path="model"
    )
    tokenizer: str | None = option(
        None, "folder or name of the tokenizer, if it isn't in --model's folder", path="model"
    )
    attn_implementation: str = option(
        "auto",
        "sdpa, eager, on CUDA flash_attention_2 or flex_attention; auto: sdpa where the model supports it, else eager",
    )
    padding_free: bool = option(
        False,
        "read the rows of a micro-batch one after the other, without padding, and count none in max_tokens_per_batch: "
        "for flash_attention_2 or flex_attention; others compute each row's scores with all rows",
    )
    router_loss: float = option(
        0.0,
        "weight of the loss that spreads tokens evenly over a mixture's experts, often 0.001 to 0.02",
        ge=0,
    )
    quantize_base: Literal["nf4"] | None = option(
        None,
        "nf4: the weights under adapters are kept in 4 bits (QLoRA): those of policy, critic, reference, and of reward "
        "models that are adapters; under ddp and ZeRO",
    )
    lora_rank: int = option(0, "rank of LoRA adapters; 0 trains all weights", ge=0, common=True)
    lora_alpha: float = option(16.0, "LoRA's scale: alpha / rank times the adapter", gt=0)
    lora_dropout: float = option(0.0, "dropout before the adapter", ge=0, lt=1)
    lora_target_modules: ListOf[str] = option(("all-linear",), "names of the layers that get adapters")
    lora_variant: Literal["lora", "rslora", "dora"] = option(
        "lora",
        "rslora: the scale is alpha / sqrt(rank), so that high ranks don't fade; dora: the length of each row of the "
        "sum of weight and adapter trains by itself, for more time per step",
    )
    lora_modules_to_save: ListOf[str] = option(
        (), "modules that train whole beside the adapters, such as embed_tokens and lm_head for new tokens"
    )

    def problems(self) -> Iterator[str]:
        if self.lora_modules_to_save and not self.lora_rank:
            yield "lora_modules_to_save is for adapters: set lora_rank too, or leave it out"

    @property
    def lora(self) -> "LoraSettings | None":
        if self.lora_rank == 0:
            return None
        from coati.models import LoraSettings

        return LoraSettings(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            variant=self.lora_variant,
            modules_to_save=list(self.lora_modules_to_save),
        )


@settings
class OptimizerConfig(Settings):
    """AdamW and its learning rate."""

    learning_rate: float = option(1e-5, "AdamW's peak learning rate", ge=0, common=True)
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "how it falls to --final_rate after warm-up")
    warmup: float = option(0.03, "share of the steps over which it rises from 0", ge=0, le=1)
    final_rate: float = option(0.1, "where linear and cosine end, as a share of the peak", ge=0, le=1)
    weight_decay: float = option(0.0, "of matrices; vectors are not decayed", ge=0)
    adam_beta1: float = option(0.9, "decay of the gradients' running mean", ge=0, lt=1)
    adam_beta2: float = option(0.999, "decay of their squares' running mean", ge=0, lt=1)


@settings
class CheckpointConfig(Settings):
    """What a run can continue from."""

    save_every: int = option(0, "steps between two checkpoints; 0 for after the last step only", ge=0, common=True)
    keep_checkpoints: int = option(2, "how many of the newest stay; the best stays too", ge=1)
    resume: str = option(
        "never",
        "never, auto (the newest complete checkpoint of --output_dir, if any) or a checkpoint",
        path="checkpoint",
        common=True,
    )


@settings
class ExportConfig(Settings):
    """The finished model."""

    merge_lora: bool = option(True, "it has the adapters merged into the weights")
    export_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of its weights; auto: that of --model, unless it was trained in a narrower one"
    )
    push_to_hub: str | None = option(
        None, "ORG/NAME on the Hugging Face Hub that it is uploaded to, see docs/tracking.md"
    )
    hub_private: bool = option(True, "it is private there")

    def problems(self) -> Iterator[str]:
        if self.push_to_hub is None:
            return
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.push_to_hub)
        except HFValidationError as error:
            yield f"push_to_hub is {self.push_to_hub!r}: it takes ORG/NAME ({str(error).splitlines()[0]})"
        else:
            if "/" not in self.push_to_hub:
                yield f"push_to_hub is {self.push_to_hub!r}: it takes ORG/NAME, your own name for ORG if there is none"


@settings
class EvaluationConfig(Settings):
    """What is measured on the evaluation data."""

    eval_every: int = option(
        0, "steps between two evaluations; 0 for before the first and after the last step only", ge=0, common=True
    )
    evaluators: ListOf[str] = option(
        (), "functions of the trainer, FILE.py:name, that give more metrics to evaluations", path="function"
    )
    samples: int = option(16, "evaluation rows whose texts are kept for the report", ge=0)
    eval_column: str | None = option(
        None,
        "field of the evaluation rows, such as subset, for whose values metrics are told too; their file if not given",
    )


@settings
class TrainerConfig(Settings):
    """Everything that all runs have in common."""

    output_dir: str = option(
        "runs/run", "everything the run writes: logs, samples, checkpoints, the final model", path="output", common=True
    )
    seed: int = option(42, "of weights, data order, dropout and sampling", ge=0, lt=2**32, common=True)
    deterministic: bool = option(False, "the same bits in every run on a GPU, by slower kernels")
    steps: int = option(0, "optimizer steps (of rollout methods: iterations); 0 for --epochs", ge=0, common=True)
    epochs: float = option(1.0, "passes over the data, when --steps is 0", gt=0, common=True)
    batch_size: int = option(64, "rows of one step over all processes and micro-batches", ge=1, common=True)
    micro_batch_size: int = option(8, "rows of one forward and backward pass on one process", ge=1, common=True)
    max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward and backward pass on one process, padding included, instead of --micro_batch_size",
        ge=1,
    )
    log_every: int = option(1, "steps between two lines in the logs", ge=1)
    model: ModelConfig = section(ModelConfig, "where it comes from, and what of it is trained")
    data: DataConfig = section(DataConfig, "rows, and how they become tokens")
    optimizer: OptimizerConfig = section(OptimizerConfig, "AdamW and its learning rate")
    parallel: PluginConfig = section(PluginConfig, "how the model is spread over processes")
    evaluation: EvaluationConfig = section(EvaluationConfig, "what is measured, and how often")
    checkpoints: CheckpointConfig = section(CheckpointConfig, "what a run can continue from")
    export: ExportConfig = section(ExportConfig, "the finished model")
    tracking: TrackingConfig = section(TrackingConfig, "where metrics and samples go")

    def size_problems(self, world_size: int) -> Iterator[str]:
        """What doesn't fit so many processes with data of their own."""
        if self.batch_size % world_size:
            yield f"batch_size {self.batch_size} is not a multiple of the {world_size} processes"
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.longest_row:
            yield (
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, but a row (of preferences: a pair) can have "
                f"{self.longest_row} tokens: raise it, or allow shorter rows"
            )

    @property
    def models(self) -> list[str]:
        """What names a model whose weights the run loads."""
        return [self.model.path] if self.model.path else []

    def check(self, world_size: int):
        """Raises a UserError for sizes that don't fit so many processes with data of their own, or one another."""
        if self.steps > 0:
            self.tracking.check_profile_steps(self.steps)
        if self.model.router_loss and self.parallel.pipeline_parallel > 1:
            raise UserError(
                "router_loss needs all layers on each process: leave out pipeline_parallel, or set router_loss to 0"
            )
        if self.model.padding_free and (self.parallel.splits_sequences or self.parallel.pipeline_parallel > 1):
            raise UserError(
                "padding_free makes one row of a micro-batch, which pipeline_parallel, sequence_parallel and "
                "split_sequence don't split: leave it out, or use tensor_parallel"
            )
        if found := list(self.size_problems(world_size)):
            raise UserError("; ".join(found))

    def check_machine(self):
        """Raises a UserError for what the settings need and this machine lacks."""
        if self.parallel.offload_activations:
            import torch

            if self.parallel.device == "cpu" or not torch.cuda.is_available():
                raise UserError("offload_activations needs a GPU: a CPU's activations are in the host's memory already")

    @property
    def longest_row(self) -> int:
        """Most tokens that are trained together: a row, or a pair of them."""
        return self.data.max_length

    @property
    def rows_per_pass(self) -> int:
        """Rows of the longest kind in one forward and backward pass."""
        if self.max_tokens_per_batch is None:
            return self.micro_batch_size
        return self.max_tokens_per_batch // self.longest_row
