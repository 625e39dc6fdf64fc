"""Settings of all trainers, in sections."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from coati.config import ListOf, Settings, inherited, option, section, settings
from coati.config.environment import EnvironmentConfig
from coati.config.generation import GenerationConfig
from coati.config.generators import GeneratorsConfig
from coati.config.plugin import PluginConfig
from coati.data.config import DataConfig
from coati.data.teaching import fields_of
from coati.errors import UserError
from coati.rewards.config import AnyReward, ModelRewardSettings, ScoringConfig, reward_problems
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
    lora_rank: int = option(0, "rank of LoRA adapters; 0 trains all weights", ge=0, common=True)
    lora_alpha: float = option(16.0, "LoRA's scale: alpha / rank times the adapter", gt=0)
    lora_dropout: float = option(0.0, "dropout before the adapter", ge=0, lt=1)
    lora_target_modules: ListOf[str] = option(("all-linear",), "names of the layers that get adapters")

    @property
    def lora(self) -> "LoraSettings | None":
        if self.lora_rank == 0:
            return None
        from coati.models import LoraSettings

        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


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
        """Raises a UserError for sizes that don't fit so many processes with data of their own."""
        if self.steps > 0:
            self.tracking.check_profile_steps(self.steps)
        if found := list(self.size_problems(world_size)):
            raise UserError("; ".join(found))

    def check_machine(self):
        """Raises a UserError for what the settings need and this machine lacks."""

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


@settings
class SFTConfig(TrainerConfig):
    """Settings of an SFT run."""

    loss: Literal["nll", "dft"] = option(
        "nll", "negative log-likelihood, or dft: each token's times its probability, see docs/sft.md"
    )
    generation: GenerationConfig = section(GenerationConfig, "how the sample responses are drawn")

    def check_machine(self):
        self.generation.check_installed()


# --- from preferences


@settings
class RewardModeling(Settings):
    """Bradley-Terry rewards (1706.03741; InstructGPT, 2203.02155)."""

    type: Literal["reward"] = option("reward", "the method")
    use_margin: bool = option(False, "demand the data's margin between the two rewards (Llama 2)")
    label_smoothing: float = option(0.0, "share of the pairs taken to be labeled the wrong way round", ge=0, lt=1)
    centering: float = option(0.0, "weight of (chosen + rejected)^2, which keeps rewards near zero", ge=0)


@settings
class RewardConfig(TrainerConfig):
    """Settings of a reward-model run."""

    algorithm: RewardModeling = section(RewardModeling, "what is learned from the preferences")

    @property
    def longest_row(self) -> int:
        return 2 * self.data.max_length


@settings
class PreferenceAlgorithm(Settings):
    """A loss on responses that are better or worse.

    Attributes:
        has_reference: whether it compares the policy with a reference; is_paired: whether it compares two responses.
    """

    has_reference: ClassVar[bool] = True
    is_paired: ClassVar[bool] = True
    # those that a method can't set
    label_smoothing: ClassVar[float] = 0.0
    gamma: ClassVar[float] = 0.0
    length_normalized: ClassVar[bool] = False
    share_prompts: ClassVar[bool] = False
    cache_reference: ClassVar[bool] = False

    beta: float = option(
        0.1, "scale of the rewards; with a reference, how strongly it holds the policy", gt=0, common=True
    )


@settings
class PairedAlgorithm(PreferenceAlgorithm):
    """A loss on pairs."""

    nll_coefficient: float = option(0.0, "weight of the chosen responses' negative log-likelihood per token", ge=0)
    share_prompts: bool = option(
        False, "read what a pair's responses both begin with once: faster where prompts are long"
    )


@settings
class ReferencedAlgorithm(PairedAlgorithm):
    """A loss on pairs that compares the policy with a reference."""

    cache_reference: bool = option(
        False, "compute the reference's log-probs once, keep them in --cache_dir and leave its model out"
    )


@settings
class DPO(ReferencedAlgorithm):
    """Direct preference optimization (2305.18290)."""

    type: Literal["dpo"] = option("dpo", "the method")
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round (cDPO)", ge=0, lt=1)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class RobustDPO(ReferencedAlgorithm):
    """DPO for noisy labels (2403.00409)."""

    type: Literal["robust-dpo"] = option("robust-dpo", "the method")
    label_smoothing: float = option(0.1, "share of the pairs labeled the wrong way round", ge=0, lt=0.5)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class IPO(ReferencedAlgorithm):
    """Identity preference optimization (2310.12036)."""

    type: Literal["ipo"] = option("ipo", "the method")


@settings
class Hinge(ReferencedAlgorithm):
    """SLiC's hinge loss on DPO's rewards (2305.10425)."""

    type: Literal["hinge"] = option("hinge", "the method")
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class SimPO(PairedAlgorithm):
    """SimPO (2405.14734)."""

    has_reference: ClassVar[bool] = False
    type: Literal["simpo"] = option("simpo", "the method")
    beta: float = inherited(PreferenceAlgorithm, "beta", 2.0)
    gamma: float = option(0.5, "the margin by which the chosen response's reward should be the larger", ge=0)
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round", ge=0, lt=1)


@settings
class ORPO(PairedAlgorithm):
    """Odds ratio preference optimization (2403.07691)."""

    has_reference: ClassVar[bool] = False
    type: Literal["orpo"] = option("orpo", "the method")
    nll_coefficient: float = inherited(PairedAlgorithm, "nll_coefficient", 1.0)


@settings
class CPO(PairedAlgorithm):
    """Contrastive preference optimization (2401.08417)."""

    has_reference: ClassVar[bool] = False
    type: Literal["cpo"] = option("cpo", "the method")
    nll_coefficient: float = inherited(PairedAlgorithm, "nll_coefficient", 1.0)
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round", ge=0, lt=1)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class KTO(PreferenceAlgorithm):
    """Kahneman-Tversky optimization (2402.01306), from responses that are good or bad."""

    is_paired: ClassVar[bool] = False
    type: Literal["kto"] = option("kto", "the method")
    desirable_weight: float = option(1.0, "weight of good responses", ge=0)
    undesirable_weight: float = option(1.0, "weight of bad responses", ge=0)


@settings
class PreferenceConfig(TrainerConfig):
    """Settings of a preference run."""

    algorithm: Annotated[DPO | RobustDPO | IPO | Hinge | SimPO | ORPO | CPO | KTO, Field(discriminator="type")] = (
        section(DPO, "what is learned from the preferences, see docs/preference.md")
    )

    @property
    def longest_row(self) -> int:
        return 2 * self.data.max_length if self.algorithm.is_paired else self.data.max_length

    def problems(self) -> Iterator[str]:
        if self.algorithm.share_prompts and self.parallel.splits_models:
            yield "share_prompts needs replicated models: leave it out with tensor, pipeline or sequence parallelism"
        if not self.algorithm.is_paired and self.batch_size < 2:
            yield "kto pairs each prompt with another row's response: batch_size must be at least 2"


# --- from rewards

Aggregation = Literal["token", "sequence", "sum", "constant"]


@settings
class RolloutAlgorithm(Settings):
    """What the methods that learn from rewards have in common."""

    kl_coefficient: float = option(
        0.05, "weight of the KL penalty to the reference; 0 needs no reference model", ge=0, common=True
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimate of the KL per token, see docs/ppo.md")
    kl_stop: float | None = option(
        None, "ends an iteration's updates when the policy has moved this far, nats per token", ge=0
    )
    ppo_epochs: int = option(2, "passes over an iteration's responses", ge=1)
    minibatches: int = option(1, "optimizer steps per pass", ge=1)
    aggregation: Aggregation = option(
        "token", "mean over tokens, of responses' means or of their sums, or by max_new_tokens"
    )
    clip_low: float = option(0.2, "the policy's ratio is clipped from below at 1 - this", ge=0)
    clip_high: float = option(0.2, "and from above at 1 + this", ge=0)
    dual_clip: float | None = option(
        None, "bound on the objective of bad actions, as a multiple of the advantage", gt=1
    )
    max_rollout_kl: float = option(
        0.1, "stop where the log-probs of trainer and sampler differ by more than this, nats per token", ge=0
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient != 0


@settings
class RolloutConfig(TrainerConfig):
    """Settings of runs that learn from their own responses; `steps` are iterations, `batch_size` the prompts of one."""

    algorithm: RolloutAlgorithm
    generation: GenerationConfig = section(GenerationConfig, "how responses are drawn")
    environment: EnvironmentConfig = section(
        EnvironmentConfig, "what the policy talks to over several turns, if it does"
    )
    generators: GeneratorsConfig = section(GeneratorsConfig, "sampling in processes of their own, if there are such")
    rewards: ListOf[AnyReward] = option(
        (),
        "what scores responses: entries such as math, or {type: regex, pattern: ..., weight: 0.2}; see docs/rewards.md",
        common=True,
    )
    scoring: ScoringConfig = section(ScoringConfig, "what becomes of what the rewards say")

    @property
    def longest_row(self) -> int:
        if self.environment.path:
            return self.environment.max_tokens
        return self.data.max_prompt_length + self.generation.max_new_tokens

    @property
    def prompts(self) -> int:
        """Prompts that the policy responds to in an iteration."""
        return self.batch_size

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
    def rest_epochs(self) -> int:
        """Epochs that a prompt is left out for whose responses all earn the same."""
        return 0

    @property
    def reward_model(self) -> str | None:
        """The first reward model of the rewards."""
        return next((reward.path for reward in self.rewards if isinstance(reward, ModelRewardSettings)), None)

    @property
    def models(self) -> list[str]:
        return super().models + [r.path for r in self.rewards if isinstance(r, ModelRewardSettings)]

    def problems(self) -> Iterator[str]:
        yield from reward_problems(self.rewards, self.scoring)
        if self.generation.compile_generation and not self.parallel.holds_whole_models:
            yield "compile_generation is for models that are replicated: ddp, zero1 or zero2"
        if self.generation.rollout_engine == "vllm" and not self.parallel.holds_whole_models:
            yield "vLLM takes models that are replicated: ddp, zero1, zero2, or --rollout_engine coati"
        if self.generators.max_staleness and (self.refills is not None or self.rest_epochs):
            yield (
                "with dynamic_sampling and rest_epochs rewards decide which prompts come next, so sampling can't be "
                "ahead: leave them out, or max_staleness at 0"
            )
        if self.generation.num_beams > 1:
            yield "a policy learns from samples: leave num_beams at 1"
        if self.environment.path and self.generation.max_new_tokens >= self.environment.max_tokens:
            yield (
                f"an episode of {self.environment.max_tokens} tokens has no room for a response of "
                f"{self.generation.max_new_tokens}: raise environment.max_tokens or lower max_new_tokens"
            )

    def size_problems(self, world_size: int) -> Iterator[str]:
        yield from super().size_problems(world_size)
        minibatches = self.algorithm.minibatches
        if self.batch_size % (minibatches * world_size):
            yield (
                f"batch_size {self.batch_size} is not a multiple of {minibatches * world_size} "
                f"({minibatches} minibatches x {world_size} processes)"
            )

    def check_machine(self):
        self.generation.check_installed()
        for reward in self.rewards:
            reward.check_installed()


@settings
class PPO(RolloutAlgorithm):
    """Proximal policy optimization with a critic (1707.06347; InstructGPT, 2203.02155)."""

    type: Literal["ppo"] = option("ppo", "the method")
    policy_loss: Literal["clip", "dppo", "dis"] = option(
        "clip", "what is done with the policy's ratio, see docs/ppo.md"
    )
    critic_model: str | None = option(
        None, "where the critic starts; the reward model, else --model, if not given", path="model"
    )
    critic_prompt: str | None = option(
        None,
        "what the critic reads as the last message of the prompt, with names of fields in braces: {prompt} is what the "
        "policy reads, and another one may hold the right answer, see docs/ppo.md",
    )
    critic_learning_rate: float = option(1e-5, "AdamW's peak learning rate for the critic", ge=0, common=True)
    critic_warmup: int = option(0, "iterations in which only the critic learns", ge=0)
    critic_updates: int = option(1, "the critic's steps per step of the policy", ge=1)
    kl_target: float | None = option(None, "nats per response that the KL coefficient adapts itself to hold", gt=0)
    kl_horizon: float = option(10000, "responses over which an adaptive coefficient moves", gt=0)
    gamma: float = option(1.0, "discount per token", ge=0, le=1)
    gae_level: Literal["token", "turn"] = option(
        "token", "what gamma and lambda count: tokens, or the turns of an episode"
    )
    gae_lambda: float = option(0.95, "GAE's trade of bias and variance", ge=0, le=1)
    length_adaptive_alpha: float | None = option(
        None, "lambda of a response of length l is 1 - 1 / (this x l) instead, for the policy's advantages", gt=0
    )
    critic_lambda: float | None = option(
        None, "lambda of the critic's targets, if not the policy's; 1 for what was really earned", ge=0, le=1
    )
    value_range: ListOf[float] = option(
        (), "least and greatest return there can be, between which the critic's values are held"
    )
    whiten_advantages: bool = option(True, "advantages get mean 0 and standard deviation 1 over the global batch")
    shared_trunk: bool = option(False, "policy and critic are two heads of one model: one forward pass gives both")
    value_coefficient: float = option(0.1, "weight of the value loss beside the policy's, with shared_trunk", ge=0)
    value_clip: float = option(
        0.2, "how far a value may move in an iteration before it stops learning; 0 for no limit", ge=0
    )
    ptx_data: ListOf[str] = option(
        (), "SFT data mixed into the policy's loss, so that it keeps what it knew", path="data"
    )
    ptx_coefficient: float = option(0.0, "weight of that loss", ge=0)

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.kl_target is not None

    def problems(self) -> Iterator[str]:
        if bool(self.ptx_data) != (self.ptx_coefficient > 0):
            yield "ptx_data and ptx_coefficient go together: give both or neither"
        if self.shared_trunk and self.critic_model:
            yield "shared_trunk has no critic_model: the value head starts from --model if that has one"
        if self.critic_prompt is not None:
            from coati.data.teaching import fields_of

            if self.shared_trunk:
                yield "critic_prompt is for a critic of its own: leave out shared_trunk"
            try:
                fields_of(self.critic_prompt, "critic_prompt")
            except ValueError as error:
                yield str(error)
        if self.shared_trunk and self.critic_updates > 1:
            yield "shared_trunk takes one step for both heads: leave critic_updates at 1"
        if self.length_adaptive_alpha is not None and self.critic_lambda is None:
            yield "length_adaptive_alpha is for the policy's advantages: give the critic's lambda as critic_lambda too"
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            yield f"value_range takes two numbers, the lesser one first, and not {list(self.value_range)}"
        if self.policy_loss != "clip" and self.dual_clip is not None:
            yield f"policy_loss {self.policy_loss} has no dual_clip: leave it out"


@settings
class SAO(PPO):
    """PPO from single responses with a strict trust region and a critic that learns twice (2607.07508)."""

    type: Literal["sao"] = option("sao", "the method")
    policy_loss: Literal["clip", "dppo", "dis"] = inherited(PPO, "policy_loss", "dis")
    clip_low: float = inherited(PPO, "clip_low", 0.3)
    clip_high: float = inherited(PPO, "clip_high", 5.0)
    ppo_epochs: int = inherited(PPO, "ppo_epochs", 1)
    kl_coefficient: float = inherited(PPO, "kl_coefficient", 0.0)
    critic_updates: int = inherited(PPO, "critic_updates", 2)
    length_adaptive_alpha: float | None = inherited(PPO, "length_adaptive_alpha", 1.5)
    critic_lambda: float | None = inherited(PPO, "critic_lambda", 1.0)
    whiten_advantages: bool = inherited(PPO, "whiten_advantages", False)


@settings
class BPCO(PPO):
    """PPO with bounded values, real returns and a trust region of probabilities (2608.23566)."""

    type: Literal["bpco"] = option("bpco", "the method")
    policy_loss: Literal["clip", "dppo", "dis"] = inherited(PPO, "policy_loss", "dppo")
    aggregation: Aggregation = inherited(PPO, "aggregation", "sum")
    minibatches: int = inherited(PPO, "minibatches", 4)
    ppo_epochs: int = inherited(PPO, "ppo_epochs", 1)
    kl_coefficient: float = inherited(PPO, "kl_coefficient", 0.0)
    critic_warmup: int = inherited(PPO, "critic_warmup", 15)
    length_adaptive_alpha: float | None = inherited(PPO, "length_adaptive_alpha", 0.4)
    critic_lambda: float | None = inherited(PPO, "critic_lambda", 1.0)
    value_range: ListOf[float] = inherited(PPO, "value_range", (0.0, 1.0))
    value_clip: float = inherited(PPO, "value_clip", 0.5)
    whiten_advantages: bool = inherited(PPO, "whiten_advantages", False)


@settings
class PPOConfig(RolloutConfig):
    """Settings of a PPO run; `steps` are iterations and `batch_size` the prompts of one."""

    algorithm: Annotated[PPO | SAO | BPCO, Field(discriminator="type")] = section(
        PPO, "proximal policy optimization, see docs/ppo.md"
    )

    @property
    def models(self) -> list[str]:
        return super().models + ([self.algorithm.critic_model] if self.algorithm.critic_model else [])

    @property
    def longest_row(self) -> int:
        return max(super().longest_row, self.data.max_length) if self.algorithm.ptx_data else super().longest_row

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.algorithm.gae_level == "turn" and not (self.environment.path and self.environment.turn_rewards):
            yield "gae_level turn is for the rewards of an environment's turns: give --environment, and turn_rewards"
        if self.algorithm.critic_prompt is not None:
            if self.environment.path:
                yield "critic_prompt is of prompts, and an environment begins its episodes itself: leave one out"
            if self.max_tokens_per_batch is not None:
                yield "critic_prompt makes longer rows for the critic: give micro_batch_size, not max_tokens_per_batch"
            if self.parallel.splits_sequences:
                yield "critic_prompt makes rows of other lengths for the critic: leave out sequence parallelism"
        if self.algorithm.gae_level == "turn" and self.algorithm.length_adaptive_alpha is not None:
            yield "length_adaptive_alpha counts tokens: leave it out with gae_level turn"
        if self.algorithm.shared_trunk and self.parallel.splits_models:
            yield (
                "shared_trunk runs under ddp, zero1, zero2 and gemini: leave out tensor, pipeline and "
                "sequence parallelism, or shared_trunk"
            )
        if self.algorithm.shared_trunk and self.optimizer.learning_rate <= 0 < self.algorithm.critic_learning_rate:
            yield "shared_trunk needs a learning_rate above 0: the value head's is a multiple of it"


Advantage = Literal[
    "grpo", "dr_grpo", "rloo", "rloo_std", "maxrl", "gdpo", "turns", "reinforce++", "reinforce++-baseline", "remax"
]
COMPARE_RESPONSES = (
    "grpo",
    "dr_grpo",
    "rloo",
    "rloo_std",
    "maxrl",
    "gdpo",
    "turns",
    "reinforce++-baseline",
)  # advantages within a group
PolicyLoss = Literal["clip", "gspo", "cispo", "sapo", "dppo", "vespo", "dis", "none"]
KLPlace = Literal["loss", "reward"]
KLEstimator = Literal["k1", "k2", "k3"]
CorrectionLevel = Literal["none", "token", "sequence", "geometric"]


@settings
class Correction(Settings):
    """What is done about rollouts that another distribution sampled than the one that is trained."""

    weights: Literal["auto", "none", "token", "sequence", "geometric"] = option(
        "auto",
        "tokens weigh p(trainer) / p(sampler): their own, their response's, or its geometric mean per token; auto: "
        "token with max_staleness or vLLM, else none",
    )
    cap: float = option(2.0, "the greatest weight", ge=1)
    reject: CorrectionLevel = option("none", "tokens whose ratio of this level is out of bounds are left out")
    reject_below: float = option(0.5, "the least ratio that is accepted", ge=0, le=1)
    reject_above: float = option(2.0, "the greatest ratio that is accepted", ge=1)
    bypass: bool = option(False, "the policy's ratio is to the sampler's log-probs, which are not recomputed")
    off_policy_bound: float | None = option(
        None, "bad responses that the policy has left by more than this, nats per token, are left out", ge=0
    )

    @property
    def recomputes(self) -> bool:
        """Whether it compares the trainer's log-probs before the updates with the sampler's."""
        return self.weights not in ("auto", "none") or self.reject != "none"

    def problems(self) -> Iterator[str]:
        if self.bypass and self.recomputes:
            yield (
                "bypass takes the sampler's log-probs for the trainer's, so there is no ratio of them: "
                "leave out weights and reject, or bypass"
            )


@settings
class GRPO(RolloutAlgorithm):
    """Group relative policy optimization (DeepSeekMath, 2402.03300; its KL coefficient is 0.04)."""

    type: Literal["grpo"] = option("grpo", "the method")
    group_size: int = option(8, "responses per prompt", ge=1, common=True)
    advantage: Advantage = option("grpo", "what a response's advantage is, see docs/grpo.md")
    advantage_std_floor: float = option(0.1, "least standard deviation that rloo_std divides by", gt=0)
    turn_discount: float = option(
        1.0, "of turns: what a later turn's reward counts for an earlier one, per turn; 0 for its own alone", ge=0, le=1
    )
    policy_loss: PolicyLoss = option("clip", "what is done with the policy's ratio, see docs/grpo.md")
    gate_positive: float = option(1.0, "of sapo: how soon a ratio off 1 counts less, for positive advantages", gt=0)
    gate_negative: float = option(1.05, "of sapo: the same for negative ones", gt=0)
    power_positive: float = option(2.0, "of vespo: how soon less likely responses fade, for good ones", ge=0)
    decay_positive: float = option(3.0, "of vespo: how soon likelier responses fade, for good ones", gt=0)
    power_negative: float = option(3.0, "of vespo: how soon less likely responses fade, for bad ones", ge=0)
    decay_negative: float = option(2.0, "of vespo: how soon likelier responses fade, for bad ones", gt=0)
    aggregation: Aggregation = inherited(RolloutAlgorithm, "aggregation", "sequence")
    kl_coefficient: float = inherited(RolloutAlgorithm, "kl_coefficient", 0.0)
    kl_estimator: KLEstimator = inherited(RolloutAlgorithm, "kl_estimator", "k3")
    kl_in: KLPlace = option("loss", "where the penalty is")
    refresh_reference: int = option(
        0, "the reference is updated to the current policy every so many iterations; 0 for never", ge=0
    )
    ppo_epochs: int = inherited(RolloutAlgorithm, "ppo_epochs", 1)
    entropy_coefficient: float = option(0.0, "weight of the entropy bonus, the mean entropy per token")
    observation_coefficient: float = option(
        0.0, "weight of the loss on what the environment says, which the policy learns to foretell", ge=0
    )
    final_temperature: float | None = option(
        None, "where the temperature arrives, linearly, with the last iteration", ge=0
    )
    dynamic_sampling: bool = option(False, "prompts whose responses all earn the same are replaced by further ones")
    max_refills: int = option(4, "how often an iteration draws further prompts", ge=0)
    rest_epochs: int = option(
        0, "epochs that a prompt whose responses all earn the same is left out: too easy, or too hard", ge=0
    )
    overlong_buffer: int = option(
        0, "last tokens before max_new_tokens in which a response's score falls; 0 for none", ge=0
    )
    overlong_penalty: float = option(1.0, "by how much it falls in all", ge=0)
    mask_truncated: bool = option(False, "responses that are cut at max_new_tokens are left out of the loss")
    correction: Correction = section(Correction, "of rollouts that another distribution sampled, see docs/grpo.md")
    share_prompts: bool = option(False, "read a prompt once for all its responses: faster where it is long beside them")

    def problems(self) -> Iterator[str]:
        if (self.advantage in COMPARE_RESPONSES or self.dynamic_sampling or self.rest_epochs) and self.group_size < 2:
            yield f"{self.advantage}, dynamic_sampling and rest_epochs compare responses: group_size must be at least 2"
        if self.dynamic_sampling and self.max_refills < 1:
            yield "dynamic_sampling needs max_refills of at least 1"
        if self.kl_coefficient != 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            yield "the gradient of k1 in the loss is 0 in the mean: choose kl_estimator k2 or k3, or kl_in reward"
        if self.refresh_reference and self.kl_coefficient == 0:
            yield "refresh_reference needs a reference: give kl_coefficient too"
        if self.advantage == "maxrl" and self.kl_coefficient != 0 and self.kl_in == "reward":
            yield "maxrl divides by the mean reward, which a penalty may make negative: kl_in loss"
        if self.advantage == "gdpo" and self.kl_coefficient != 0 and self.kl_in == "reward":
            yield "gdpo normalizes each reward by itself, and a penalty is none of them: kl_in loss"
        if self.advantage == "gdpo" and (self.dynamic_sampling or self.overlong_buffer):
            yield "gdpo compares each reward, not their sum: leave out dynamic_sampling and overlong_buffer"
        if self.policy_loss == "vespo" and self.correction.weights not in ("auto", "none"):
            yield (
                "vespo weights whole responses itself: leave out the correction's weights "
                "(bypass makes its ratio one to the sampler)"
            )
        if self.policy_loss not in ("clip", "gspo") and self.dual_clip is not None:
            yield f"policy_loss {self.policy_loss} has no dual_clip: leave it out"


@settings
class DrGRPO(GRPO):
    """GRPO without its length and difficulty biases (2503.20783)."""

    type: Literal["dr-grpo"] = option("dr-grpo", "the method")
    advantage: Advantage = inherited(GRPO, "advantage", "dr_grpo")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "constant")


@settings
class DAPO(GRPO):
    """Clip-higher, dynamic sampling, token mean (2503.14476)."""

    type: Literal["dapo"] = option("dapo", "the method")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")
    clip_high: float = inherited(GRPO, "clip_high", 0.28)
    dynamic_sampling: bool = inherited(GRPO, "dynamic_sampling", True)


@settings
class GSPO(GRPO):
    """GRPO with the ratio of whole responses (2507.18071)."""

    type: Literal["gspo"] = option("gspo", "the method")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "gspo")
    clip_low: float = inherited(GRPO, "clip_low", 3e-4)
    clip_high: float = inherited(GRPO, "clip_high", 4e-4)


@settings
class LUSPO(GSPO):
    """GSPO without its preference for short responses (2602.05261)."""

    type: Literal["luspo"] = option("luspo", "the method")
    aggregation: Aggregation = inherited(GSPO, "aggregation", "sum")


@settings
class CISPO(GRPO):
    """Clipped importance weights instead of clipped ratios (MiniMax-M1, 2506.13585)."""

    type: Literal["cispo"] = option("cispo", "the method")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "cispo")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")
    clip_low: float = inherited(GRPO, "clip_low", 1.0)
    clip_high: float = inherited(GRPO, "clip_high", 4.0)


@settings
class SAPO(GRPO):
    """A soft gate on the ratio instead of clipping (2511.20347)."""

    type: Literal["sapo"] = option("sapo", "the method")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "sapo")


@settings
class DPPO(GRPO):
    """A trust region of probabilities instead of ratios (2602.04879)."""

    type: Literal["dppo"] = option("dppo", "the method")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "dppo")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")
    clip_low: float = inherited(GRPO, "clip_low", 0.15)
    clip_high: float = inherited(GRPO, "clip_high", 0.15)


@settings
class VESPO(GRPO):
    """A smooth weight of whole responses instead of clipping (2602.10693)."""

    type: Literal["vespo"] = option("vespo", "the method")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "vespo")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")


@settings
class GDPO(GRPO):
    """Several rewards, each normalized by itself (2601.05242)."""

    type: Literal["gdpo"] = option("gdpo", "the method")
    advantage: Advantage = inherited(GRPO, "advantage", "gdpo")


@settings
class MaxRL(GRPO):
    """Maximum likelihood of success instead of its probability (2602.02710)."""

    type: Literal["maxrl"] = option("maxrl", "the method")
    advantage: Advantage = inherited(GRPO, "advantage", "maxrl")


@settings
class ECHO(GRPO):
    """GRPO that learns from what its environment says, too (2605.24517)."""

    type: Literal["echo"] = option("echo", "the method")
    observation_coefficient: float = inherited(GRPO, "observation_coefficient", 0.05)


@settings
class RLOO(GRPO):
    """REINFORCE with a leave-one-out baseline (2402.14740)."""

    type: Literal["rloo"] = option("rloo", "the method")
    advantage: Advantage = inherited(GRPO, "advantage", "rloo")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "none")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "constant")
    kl_coefficient: float = inherited(GRPO, "kl_coefficient", 0.03)
    kl_estimator: KLEstimator = inherited(GRPO, "kl_estimator", "k1")
    kl_in: KLPlace = inherited(GRPO, "kl_in", "reward")


@settings
class ReinforcePlusPlus(GRPO):
    """REINFORCE with PPO's clipping and no critic (2501.03262)."""

    type: Literal["reinforce++"] = option("reinforce++", "the method")
    group_size: int = inherited(GRPO, "group_size", 1)
    advantage: Advantage = inherited(GRPO, "advantage", "reinforce++")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")
    kl_coefficient: float = inherited(GRPO, "kl_coefficient", 0.01)
    kl_estimator: KLEstimator = inherited(GRPO, "kl_estimator", "k1")
    kl_in: KLPlace = inherited(GRPO, "kl_in", "reward")


@settings
class ReMax(GRPO):
    """REINFORCE with a greedy baseline (2310.10505)."""

    type: Literal["remax"] = option("remax", "the method")
    group_size: int = inherited(GRPO, "group_size", 1)
    advantage: Advantage = inherited(GRPO, "advantage", "remax")
    policy_loss: PolicyLoss = inherited(GRPO, "policy_loss", "none")
    aggregation: Aggregation = inherited(GRPO, "aggregation", "token")


@settings
class GRPOConfig(RolloutConfig):
    """Settings of GRPO and its relatives; `steps` are iterations and `batch_size` the prompts of one, each with
    `group_size` responses."""

    algorithm: Annotated[
        GRPO
        | DrGRPO
        | DAPO
        | GSPO
        | LUSPO
        | CISPO
        | SAPO
        | DPPO
        | VESPO
        | GDPO
        | MaxRL
        | ECHO
        | RLOO
        | ReinforcePlusPlus
        | ReMax,
        Field(discriminator="type"),
    ] = section(GRPO, "how the policy learns from what responses earn, see docs/grpo.md")

    @property
    def responses(self) -> int:
        return self.batch_size * self.algorithm.group_size

    @property
    def correction(self) -> Correction:
        """The algorithm's, with `auto` decided."""
        a = self.algorithm
        if a.correction.weights != "auto":
            return a.correction
        is_other = self.generators.max_staleness > 0 or self.generation.rollout_engine == "vllm"
        corrects = is_other and not a.correction.bypass and a.policy_loss != "vespo"
        return replace(a.correction, weights="token" if corrects else "none")

    @property
    def shared_prefix_group(self) -> int:
        return min(self.algorithm.group_size, self.micro_batch_size) if self.algorithm.share_prompts else 1

    @property
    def refills(self) -> int | None:
        return self.algorithm.max_refills if self.algorithm.dynamic_sampling else None

    @property
    def rest_epochs(self) -> int:
        return self.algorithm.rest_epochs

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        a, split = self.algorithm, self.parallel.splits_models
        for temperature in (self.generation.temperature, a.final_temperature):
            if temperature is not None and temperature <= 0:
                yield "the responses of a group must differ: temperature and final_temperature must be above 0"
        if self.scoring.normalize_reward:
            yield "a response is compared with its group, not with a running mean: leave out normalize_reward"
        if a.refresh_reference and (not self.parallel.holds_whole_models or self.model.lora is not None):
            yield "refresh_reference is for models that are replicated (ddp, zero1, zero2), without LoRA"
        if a.overlong_buffer > self.generation.max_new_tokens:
            yield f"overlong_buffer must be between 0 and max_new_tokens, {self.generation.max_new_tokens}"
        if a.advantage == "gdpo" and (self.scoring.reward_clip or self.scoring.missing_eos_penalty):
            yield "gdpo compares each reward, not their sum: leave out reward_clip and missing_eos_penalty"
        if a.mask_truncated and self.scoring.missing_eos_penalty is not None:
            yield "mask_truncated leaves out what missing_eos_penalty punishes: choose one"
        if a.entropy_coefficient != 0 and self.parallel.splits_vocabulary:
            yield "entropy_coefficient needs the whole vocabulary on every process: leave out tensor_parallel"
        group = self.shared_prefix_group
        if a.share_prompts and (group < 2 or max(a.group_size, self.micro_batch_size) % group > 0):
            yield "share_prompts needs group_size and micro_batch_size of 2 or more, one a multiple of the other"
        if self.environment.path and a.share_prompts:
            yield "share_prompts reads one prompt for its responses, and episodes have several turns: leave it out"
        if self.environment.path and a.advantage == "remax":
            yield "remax compares with a greedy response, and an episode is none: choose another advantage"
        if a.observation_coefficient and not self.environment.path:
            yield "observation_coefficient is for what an environment says, and there is none: give --environment"
        if a.advantage == "turns" and not (self.environment.path and self.environment.turn_rewards):
            yield "turns compares the rewards of an environment's turns: give --environment, and turn_rewards"
        if a.advantage == "turns" and (a.dynamic_sampling or a.rest_epochs):
            yield "turns compares turns, not the sums of episodes: leave out dynamic_sampling and rest_epochs"
        if self.environment.path and a.overlong_buffer:
            yield "overlong_buffer is of single responses: leave it out with an environment"
        if a.share_prompts and split:
            yield "share_prompts needs replicated models: leave out tensor, pipeline and sequence parallelism"


# --- from a teacher

SELF = "self"  # the teacher that is the model which the run starts from


@settings
class Distillation(Settings):
    """Distillation from a teacher's distributions (GKD, 2306.13649)."""

    # what other methods that sample can set
    minibatches: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False

    type: Literal["distill"] = option("distill", "the method")
    teacher: str | None = option(
        None,
        "folder or name of the teacher, whose tokenizer must be the student's; self: a copy of --model",
        path="model",
        common=True,
    )
    teachers: dict[str, str] | None = option(
        None,
        "several instead: of each value that --teacher_column has, the folder or name, such as {math: A, code: B}",
        path="model",
    )
    teacher_column: str | None = option(None, "the field of the data that names a row's teacher")
    teacher_prompt: str | None = option(
        None,
        "what the teacher reads as the last message of the prompt, with names of fields in braces: {prompt} is what "
        "stands there, {response} the row's response",
    )
    teacher_ema: float = option(
        0.0,
        "of teacher self: after each iteration this share of its weights comes from the student; 0 leaves it as it is, "
        "1 makes it the current student",
        ge=0,
        le=1,
    )
    skip_tokens: int = option(0, "first tokens of each response that are not learned", ge=0)
    on_policy_share: float = option(
        1.0,
        "share of an iteration's rows that the student responds to itself; of the others it learns the data's "
        "responses (GKD's lambda)",
        ge=0,
        le=1,
        common=True,
    )
    divergence: Literal["forward", "reverse", "jsd"] = option(
        "reverse", "KL(teacher || student), KL(student || teacher), or what lies between them", common=True
    )
    beta: float = option(
        0.5, "of jsd: the teacher's weight in the mixture; near 0 it is like forward, near 1 like reverse", gt=0, lt=1
    )
    distill_temperature: float = option(1.0, "temperature of both distributions that are compared", gt=0)
    max_rollout_kl: float = inherited(RolloutAlgorithm, "max_rollout_kl", 0.1)

    @property
    def named_teachers(self) -> dict[str | None, str]:
        """Folder or name of each teacher, by what the rows call it; an only teacher has no name there."""
        if self.teachers is not None:
            return dict(self.teachers)
        return {} if self.teacher is None else {None: self.teacher}

    def problems(self) -> Iterator[str]:
        if self.beta != 0.5 and self.divergence != "jsd":
            yield f"beta belongs to divergence jsd: leave it out with {self.divergence}"
        if self.teacher is not None and self.teachers is not None:
            yield "teacher is of all rows, and teachers of some each: give one of the two"
        if (self.teachers is None) != (self.teacher_column is None):
            yield "teachers and teacher_column go together: give both or neither"
        if self.teachers is not None and (not self.teachers or SELF in self.teachers.values()):
            yield "teachers are folders or names, one at least: a copy of the student is --teacher self alone"
        if self.teacher_ema and self.teacher != SELF:
            yield "teacher_ema moves a copy of the student: give teacher self, or leave it out"
        if self.teacher_prompt is not None:
            if self.on_policy_share < 1:
                yield "teacher_prompt is for the student's own responses: leave on_policy_share at 1"
            try:
                fields_of(self.teacher_prompt)
            except ValueError as error:
                yield str(error)


@settings
class DistillConfig(RolloutConfig):
    """Settings of a distillation; `steps` are iterations and `batch_size` the rows of one."""

    algorithm: Distillation = section(Distillation, "how the student learns from its teacher, see docs/distillation.md")

    @property
    def prompts(self) -> int:
        return round(self.algorithm.on_policy_share * self.batch_size)

    @property
    def models(self) -> list[str]:
        return super().models + [teacher for teacher in self.algorithm.named_teachers.values() if teacher != SELF]

    @property
    def longest_row(self) -> int:
        longest = super().longest_row if self.algorithm.on_policy_share > 0 else 0
        if self.algorithm.teacher_prompt is not None:
            longest = max(longest, self.data.max_length + self.generation.max_new_tokens)
        return max(longest, self.data.max_length) if self.algorithm.on_policy_share < 1 else longest

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        scoring = self.scoring
        if self.environment.path:
            yield "distillation responds to prompts, in one turn: leave environment out"
        if self.algorithm.teacher_ema and not self.parallel.holds_whole_models:
            yield "teacher_ema is for models that are replicated: ddp, zero1, zero2"
        if self.algorithm.teacher_prompt is not None and self.parallel.splits_sequences:
            yield (
                "teacher_prompt makes rows of other lengths for the teacher, so processes would hold other tokens: "
                "leave out sequence_parallel and split_sequence"
            )
        if scoring.normalize_reward or scoring.reward_clip is not None or scoring.missing_eos_penalty is not None:
            yield (
                "rewards are only measured here, the teacher is what is learned from: leave out normalize_reward, "
                "reward_clip and missing_eos_penalty"
            )

    def size_problems(self, world_size: int) -> Iterator[str]:
        yield from super().size_problems(world_size)
        share, rows = self.algorithm.on_policy_share, self.batch_size
        if abs(share * rows - self.prompts) > 1e-6 * rows or self.prompts % world_size:
            step = world_size / rows
            yield (
                f"on_policy_share {share} of batch_size {rows} is {share * rows:g} prompts, not a multiple of the "
                f"{world_size} processes: use a multiple of {step:g}"
            )
