"""Settings that all trainers share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coati.config import Settings, option
from coati.config.generation import GenerationConfig
from coati.config.plugin import PluginConfig
from coati.data.config import DataConfig
from coati.errors import UserError
from coati.rewards.config import ScoringConfig
from coati.tracking.config import TrackingConfig

if TYPE_CHECKING:  # settings are read before torch is loaded
    from coati.models import LoraSettings

REFERENCE_FREE = ("simpo", "orpo", "cpo")
WITH_NLL = ("orpo", "cpo")  # the log-likelihood of the chosen answer is part of these
SMOOTHED = ("dpo", "robust", "simpo", "cpo")
NORMALISABLE = ("dpo", "robust", "hinge", "cpo")
GROUPS = ("grpo", "dr_grpo", "rloo", "rloo_std", "reinforce++-baseline")  # advantages that compare answers


@dataclass
class ModelConfig(Settings):
    """Where the model and its tokenizer come from."""

    model: str | None = option(None, "folder or name of a pretrained model", path="model", common=True)
    model_config: str | None = option(
        None, "a config.json to start from random weights (with --model: overrides it)", path="model"
    )
    tokenizer: str | None = option(
        None, "folder or name of the tokenizer, if it isn't in --model's folder", path="model"
    )
    attn_implementation: str = option(
        "auto", "sdpa, eager or flash_attention_2 (CUDA only); auto: sdpa where the model supports it, else eager"
    )
    lora_rank: int = option(0, "rank of LoRA adapters; 0 trains all weights", ge=0, common=True)
    lora_alpha: float = option(16.0, "LoRA's scale: alpha / rank times the adapter", gt=0)
    lora_dropout: float = option(0.0, "dropout before the adapter", ge=0, lt=1)
    lora_target_modules: list[str] = option(("all-linear",), "names of the layers that get adapters")
    merge_lora: bool = option(True, "the final export has the adapters merged into the weights")
    export_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of the final model's weights; auto: that of --model, unless it was trained in a narrower one"
    )

    @property
    def lora(self) -> "LoraSettings | None":
        if self.lora_rank == 0:
            return None
        from coati.models import LoraSettings

        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


@dataclass
class RunConfig(Settings):
    """How long, how fast, how often."""

    output_dir: str = option(
        "runs/run", "everything the run writes: logs, samples, checkpoints, the final model", path="output", common=True
    )
    seed: int = option(42, "of weights, data order, dropout and sampling", ge=0, lt=2**32, common=True)
    deterministic: bool = option(False, "the same bits in every run on a GPU, by slower kernels")
    steps: int = option(0, "optimiser steps (PPO: iterations); 0 for --epochs", ge=0, common=True)
    epochs: float = option(1.0, "passes over the data, when --steps is 0", gt=0, common=True)
    batch_size: int = option(64, "rows of one step over all processes and micro-batches", ge=1, common=True)
    micro_batch_size: int = option(8, "rows of one forward and backward pass on one process", ge=1, common=True)
    max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward and backward pass on one process, padding included, instead of --micro_batch_size",
        ge=1,
    )
    learning_rate: float = option(1e-5, "AdamW's peak learning rate", ge=0, common=True)
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "how it falls to --final_rate after warm-up")
    warmup: float = option(0.03, "share of the steps over which it rises from 0", ge=0, le=1)
    final_rate: float = option(0.1, "where linear and cosine end, as a share of the peak", ge=0, le=1)
    weight_decay: float = option(0.0, "of matrices; vectors are not decayed", ge=0)
    log_every: int = option(1, "steps between two lines in the logs", ge=1)
    eval_every: int = option(
        0, "steps between two evaluations; 0 for before the first and after the last step only", ge=0, common=True
    )
    evaluators: list[str] = option(
        (), "functions of the trainer, FILE.py:name, that give more metrics to evaluations", path="function"
    )
    save_every: int = option(0, "steps between two checkpoints; 0 for after the last step only", ge=0, common=True)
    keep_checkpoints: int = option(2, "how many of the newest stay; the best stays too", ge=1)
    resume: str = option(
        "never",
        "never, auto (the newest whole checkpoint of --output_dir, if any) or a checkpoint",
        path="checkpoint",
        common=True,
    )
    samples: int = option(16, "evaluation rows whose texts are kept for the report", ge=0)
    push_to_hub: str | None = option(
        None, "ORG/NAME on the Hugging Face Hub that the final model is uploaded to, see docs/tracking.md"
    )
    hub_private: bool = option(True, "it is private there")
    profile_steps: list[int] = option((), "steps that are profiled, counted from 1, see docs/tracking.md", ge=1)

    def check(self, world_size: int):
        """Raises UserError for sizes that don't fit together."""
        if self.batch_size % world_size:
            raise UserError(f"batch_size {self.batch_size} is not a multiple of the {world_size} processes")
        if self.steps > 0:
            self.check_profile_steps(self.steps)
        if self.push_to_hub is not None:
            self._check_hub_name(self.push_to_hub)

    def _check_hub_name(self, name: str):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"push_to_hub is {name!r}: it takes ORG/NAME ({str(error).splitlines()[0]})") from error
        if "/" not in name:
            raise UserError(f"push_to_hub is {name!r}: it takes ORG/NAME, with your own name for ORG if there is none")

    def check_profile_steps(self, total_steps: int):
        """Raises UserError for steps that the run does not have."""
        if beyond := [step for step in self.profile_steps if step > total_steps]:
            raise UserError(f"profile_steps has {', '.join(map(str, beyond))}, but the run ends at step {total_steps}")


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


@dataclass
class SFTConfig(TrainerConfig, GenerationConfig):
    """Settings of an SFT run; the generation settings are those of the sample answers."""

    def check(self, world_size: int):
        super().check(world_size)
        self.check_generation()


@dataclass
class RewardConfig(TrainerConfig):
    """Settings of a reward-model run."""

    use_margin: bool = option(False, "demand the data's margin between the two rewards (Llama 2)")
    label_smoothing: float = option(0.0, "share of the pairs taken to be labelled the wrong way round", ge=0, lt=1)
    centering: float = option(0.0, "weight of (chosen + rejected)^2, which keeps rewards near zero", ge=0)

    @property
    def longest_row(self) -> int:
        return 2 * self.max_length


@dataclass
class PreferenceConfig(TrainerConfig):
    """Settings of a preference run."""

    loss: Literal["dpo", "robust", "hinge", "ipo", "simpo", "orpo", "cpo", "kto"] = option(
        "dpo",
        "what is learnt from the preferences, see docs/preference.md; kto is for answers without pairs",
        common=True,
    )
    beta: float = option(
        0.1, "scale of the rewards; with a reference, how strongly it holds the policy", gt=0, common=True
    )
    label_smoothing: float = option(
        0.0, "dpo, robust, simpo, cpo: share of the pairs labelled the wrong way round", ge=0, lt=1
    )
    gamma: float = option(0.5, "simpo: the margin by which the chosen answer's reward should be the larger", ge=0)
    length_normalised: bool = option(False, "dpo, robust, hinge, cpo: average an answer's log-probs (others: always)")
    nll_coefficient: float | None = option(
        None,
        "weight of the chosen answers' negative log-likelihood a token (default: 1 for orpo and cpo, else 0)",
        ge=0,
    )
    desirable_weight: float = option(1.0, "kto: weight of good answers", ge=0)
    undesirable_weight: float = option(1.0, "kto: weight of bad answers", ge=0)
    share_prompts: bool = option(
        False, "read what a pair's answers both begin with once: faster where prompts are long (not for kto)"
    )
    cache_reference: bool = option(
        False, "compute the reference's log-probs once, keep them in --cache_dir and leave its model out (not for kto)"
    )

    @property
    def longest_row(self) -> int:
        return self.max_length if self.loss == "kto" else 2 * self.max_length

    @property
    def nll_weight(self) -> float:
        return float(self.loss in WITH_NLL) if self.nll_coefficient is None else self.nll_coefficient

    def check(self, world_size: int):
        super().check(world_size)
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}: for robust it must be less than 0.5")
        if self.label_smoothing > 0 and self.loss not in SMOOTHED:
            raise UserError(f"{self.loss} has no label_smoothing: leave it at 0, or use one of {', '.join(SMOOTHED)}")
        if self.length_normalised and self.loss not in NORMALISABLE:
            raise UserError(f"length_normalised is for {', '.join(NORMALISABLE)}: leave it out with {self.loss}")
        if self.loss == "kto":
            self._check_kto()
        if self.share_prompts and self.splits_models:
            raise UserError(
                "share_prompts needs whole models: leave it out with tensor, pipeline or sequence parallelism"
            )
        if self.cache_reference and self.loss in (*REFERENCE_FREE, "kto"):
            raise UserError(f"{self.loss} has no reference that stays the same for a row: leave cache_reference out")

    def _check_kto(self):
        if self.nll_weight != 0:
            raise UserError("kto has no chosen answers: leave nll_coefficient out")
        if self.batch_size < 2:
            raise UserError("kto pairs each prompt with another row's answer: batch_size must be at least 2")
        if self.share_prompts:
            raise UserError("share_prompts reads a pair as one row: leave it out with kto, which has no pairs")


@dataclass
class RolloutConfig(TrainerConfig, GenerationConfig, ScoringConfig):
    """Settings of runs that learn from their own answers; `steps` are iterations, `batch_size` the prompts of one."""

    kl_coefficient: float = option(
        0.05, "weight of the KL penalty to the reference; 0 needs no reference model", ge=0, common=True
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimate of the KL a token, see docs/ppo.md")
    kl_stop: float | None = option(
        None, "ends an iteration's updates when the policy has moved this far, nats a token", ge=0
    )
    ppo_epochs: int = option(2, "passes over an iteration's answers", ge=1)
    minibatches: int = option(1, "optimiser steps a pass", ge=1)
    clip_low: float = option(0.2, "the policy's ratio is clipped from below at 1 - this", ge=0)
    clip_high: float = option(0.2, "and from above at 1 + this", ge=0)
    dual_clip: float | None = option(
        None, "bound on the objective of bad actions, as a multiple of the advantage", gt=1
    )
    generation_batch_size: int = option(64, "answers drawn at a time on one process", ge=1)
    max_rollout_kl: float = option(
        0.1, "stop when sampling and training disagree by more than this, nats a token", ge=0
    )

    @property
    def longest_row(self) -> int:
        return self.max_prompt_length + self.max_new_tokens

    @property
    def responses(self) -> int:
        """Responses that an iteration learns from."""
        return self.batch_size

    @property
    def shared_prefix_group(self) -> int:
        """Responses that are read as one row; 1 for each alone."""
        return 1

    @property
    def refills(self) -> int | None:
        """How often an iteration may draw further prompts; None where it takes all that it has drawn."""
        return None

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient != 0

    def check(self, world_size: int):
        super().check(world_size)
        self.check_generation()
        unit = self.minibatches * world_size
        if self.batch_size % unit:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of {unit} "
                f"({self.minibatches} minibatches x {world_size} processes)"
            )
        if self.compile_generation and not self.holds_whole_models:
            raise UserError("compile_generation is for models that are whole on every process: ddp, zero1 or zero2")
        if self.rollout_engine == "vllm" and not self.holds_whole_models:
            raise UserError(
                "vLLM takes models that are whole on every process: ddp, zero1, zero2, or --rollout_engine coati"
            )
        if self.num_beams > 1:
            raise UserError("a policy learns from samples: leave num_beams at 1")


@dataclass
class PPOConfig(RolloutConfig):
    """Settings of a PPO run; `steps` are iterations and `batch_size` the prompts of one."""

    critic_model: str | None = option(
        None, "where the critic starts; the reward model, else --model, if not given", path="model"
    )
    critic_learning_rate: float = option(1e-5, "AdamW's peak learning rate for the critic", ge=0, common=True)
    critic_warmup: int = option(0, "iterations in which only the critic learns", ge=0)
    kl_target: float | None = option(None, "nats an answer that the KL coefficient adapts itself to hold", gt=0)
    kl_horizon: float = option(10000, "answers over which an adaptive coefficient moves", gt=0)
    gamma: float = option(1.0, "discount a token", ge=0, le=1)
    gae_lambda: float = option(0.95, "GAE's trade of bias and variance", ge=0, le=1)
    whiten_advantages: bool = option(True, "advantages get mean 0 and standard deviation 1 over the global batch")
    shared_trunk: bool = option(False, "policy and critic are two heads of one model: one forward pass gives both")
    value_coefficient: float = option(0.1, "weight of the value loss beside the policy's, with shared_trunk", ge=0)
    value_clip: float = option(
        0.2, "how far a value may move in an iteration before it stops learning; 0 for no limit", ge=0
    )
    ptx_data: list[str] = option(
        (), "SFT data mixed into the policy's loss, so that it keeps what it knew", path="data"
    )
    ptx_coefficient: float = option(0.0, "weight of that loss", ge=0)

    @property
    def longest_row(self) -> int:
        return max(super().longest_row, self.max_length) if self.ptx_data else super().longest_row

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.kl_target is not None

    def check(self, world_size: int):
        super().check(world_size)
        if bool(self.ptx_data) != (self.ptx_coefficient > 0):
            raise UserError("ptx_data and ptx_coefficient go together: give both or neither")
        if self.shared_trunk and self.splits_models:
            raise UserError(
                "shared_trunk runs under ddp, zero1, zero2 and gemini: leave out tensor, pipeline and "
                "sequence parallelism, or shared_trunk"
            )
        if self.shared_trunk and self.learning_rate <= 0 < self.critic_learning_rate:
            raise UserError("shared_trunk needs a learning_rate above 0: the value head's is a multiple of it")
        if self.shared_trunk and self.critic_model:
            raise UserError("shared_trunk has no critic_model: the value head starts from --model if that has one")


@dataclass
class GRPOConfig(RolloutConfig):
    """Settings of a GRPO run; `steps` are iterations and `batch_size` the prompts of one, each with `group_size`
    answers."""

    group_size: int = option(8, "answers to a prompt", ge=1, common=True)
    advantage: Literal["grpo", "dr_grpo", "rloo", "rloo_std", "reinforce++", "reinforce++-baseline", "remax"] = option(
        "grpo", "what an answer's advantage is, see docs/grpo.md"
    )
    advantage_std_floor: float = option(0.1, "least standard deviation that rloo_std divides by", gt=0)
    policy_loss: Literal["clip", "gspo", "cispo", "none"] = option(
        "clip", "what is done with the policy's ratio, see docs/grpo.md"
    )
    aggregation: Literal["token", "sequence", "constant"] = option(
        "sequence", "mean over tokens, of answers' means, or by max_new_tokens"
    )
    kl_coefficient: float = option(
        0.0, "weight of the KL penalty to the reference; 0 needs no reference model", ge=0, common=True
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "estimate of the KL a token, see docs/ppo.md")
    kl_in: Literal["loss", "reward"] = option("loss", "where the penalty is")
    refresh_reference: int = option(
        0, "iterations after which the reference becomes the policy of then; 0 for never", ge=0
    )
    ppo_epochs: int = option(1, "passes over an iteration's answers", ge=1)
    entropy_coefficient: float = option(0.0, "weight of the mean entropy a token, which is taken off the loss")
    final_temperature: float | None = option(
        None, "where the temperature arrives, linearly, with the last iteration", ge=0
    )
    dynamic_sampling: bool = option(False, "prompts whose answers all earn the same are replaced by further ones")
    max_refills: int = option(4, "how often an iteration draws further prompts", ge=0)
    overlong_buffer: int = option(
        0, "last tokens before max_new_tokens in which an answer's score falls; 0 for none", ge=0
    )
    overlong_penalty: float = option(1.0, "by how much it falls in all", ge=0)
    mask_truncated: bool = option(False, "answers that are cut at max_new_tokens are left out of the loss")
    importance_correction: Literal["none", "truncated", "masked"] = option(
        "none", "tokens weigh p(training) / p(sampling), bounded"
    )
    importance_cap: float = option(2.0, "the bound; masked: 0 beyond it and below 1 / it", ge=1)
    share_prompts: bool = option(False, "read a prompt once for all its answers: faster where it is long beside them")

    @property
    def responses(self) -> int:
        return self.batch_size * self.group_size

    @property
    def shared_prefix_group(self) -> int:
        return min(self.group_size, self.micro_batch_size) if self.share_prompts else 1

    @property
    def refills(self) -> int | None:
        return self.max_refills if self.dynamic_sampling else None

    def check(self, world_size: int):
        super().check(world_size)
        self._check_groups()
        self._check_reference()
        self._check_lengths()
        if self.policy_loss in ("cispo", "none") and self.dual_clip is not None:
            raise UserError(f"policy_loss {self.policy_loss} has no dual_clip: leave it out")
        if self.share_prompts:
            self._check_shared_prompts()
        if self.entropy_coefficient != 0 and self.splits_vocabulary:
            raise UserError(
                "entropy_coefficient needs the whole vocabulary on every process: leave out tensor_parallel"
            )

    def _check_groups(self):
        compares = self.advantage in GROUPS or self.dynamic_sampling
        if compares and self.group_size < 2:
            raise UserError(f"{self.advantage} and dynamic_sampling compare answers: group_size must be at least 2")
        for temperature in (self.temperature, self.final_temperature):
            if temperature is not None and temperature <= 0:
                raise UserError("the answers of a group must differ: temperature and final_temperature must be above 0")
        if self.normalise_reward:
            raise UserError("an answer is compared with its group, no running mean: leave out normalise_reward")
        if self.dynamic_sampling and self.max_refills < 1:
            raise UserError("dynamic_sampling needs max_refills of at least 1")

    def _check_reference(self):
        if self.kl_coefficient != 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "the gradient of k1 in the loss is 0 in the mean: choose kl_estimator k2 or k3, or kl_in reward"
            )
        if self.refresh_reference == 0:
            return
        if self.kl_coefficient == 0:
            raise UserError("refresh_reference needs a reference: give kl_coefficient too")
        if not self.holds_whole_models or self.lora is not None:
            raise UserError(
                "refresh_reference is for models that are whole on every process (ddp, zero1, zero2), without LoRA"
            )

    def _check_lengths(self):
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise UserError(f"overlong_buffer must be between 0 and max_new_tokens, {self.max_new_tokens}")
        if self.mask_truncated and self.missing_eos_penalty is not None:
            raise UserError("mask_truncated leaves out what missing_eos_penalty punishes: choose one")

    def _check_shared_prompts(self):
        group = self.shared_prefix_group
        if group < 2 or max(self.group_size, self.micro_batch_size) % group > 0:
            raise UserError(
                "share_prompts needs group_size and micro_batch_size of 2 or more, one a multiple of the other"
            )
        if self.splits_models:
            raise UserError("share_prompts needs whole models: leave out tensor, pipeline and sequence parallelism")
