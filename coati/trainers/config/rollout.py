"""Settings that the methods which learn from their own responses have in common."""

from collections.abc import Iterator
from typing import Literal

from coati.config import ListOf, Settings, option, section, settings
from coati.config.environment import EnvironmentConfig
from coati.config.generation import GenerationConfig
from coati.config.generators import GeneratorsConfig
from coati.rewards.config import AnyReward, ModelRewardSettings, ScoringConfig, reward_problems
from coati.trainers.config.base import EvaluationConfig, TrainerConfig

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

    router_replay: bool = option(
        False, "tokens of a mixture of experts go to the experts that they went to at sampling, see docs/plugins.md"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient != 0


@settings
class RolloutEvaluationConfig(EvaluationConfig):
    """What is measured on the evaluation prompts."""

    eval_temperature: float | None = option(
        None, "of the evaluation's responses, 0 for greedy; `temperature` if not given", ge=0
    )


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
    evaluation: RolloutEvaluationConfig = section(RolloutEvaluationConfig, "what is measured, and how often")

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
    def evaluation_sampling(self) -> GenerationConfig:
        """How the responses of evaluations are drawn."""
        temperature = self.evaluation.eval_temperature
        return self.generation if temperature is None else self.generation.at_temperature(temperature)

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
    def oversampling(self) -> float:
        """Groups that are drawn for each that is missing."""
        return 1.0

    @property
    def rest_epochs(self) -> int:
        """Epochs that a prompt is left out for whose responses all earn the same."""
        return 0

    @property
    def heads(self) -> int:
        """Of how many most likely tokens the sampler's log-probs are kept with each token."""
        return 0

    @property
    def router_replay(self) -> bool:
        """Whether samples come with the experts that their tokens went to."""
        return False

    @property
    def learns_token_rewards(self) -> bool:
        """Whether it matters to what is learned at which of a response's tokens a reward falls."""
        return False

    @property
    def reward_model(self) -> str | None:
        """The first reward model of the rewards."""
        return next((reward.path for reward in self.rewards if isinstance(reward, ModelRewardSettings)), None)

    def objectives_of(self, path: str | None) -> dict[str, float] | None:
        """The weights that the rewards give to the objectives of a reward model."""
        models = [reward for reward in self.rewards if isinstance(reward, ModelRewardSettings)]
        return next((reward.objectives for reward in models if reward.path == path), None)

    @property
    def models(self) -> list[str]:
        return super().models + [path for reward in self.rewards for path in reward.model_paths]

    def problems(self) -> Iterator[str]:
        group_size = self.responses // self.batch_size
        splits, on_tokens = self.parallel.splits_models, self.learns_token_rewards
        yield from reward_problems(self.rewards, self.scoring, group_size, splits, on_tokens)
        if self.generation.compile_generation and not self.parallel.holds_whole_models:
            yield "compile_generation is for models that are replicated: ddp, zero1 or zero2"
        if self.generation.rollout_engine == "vllm" and not self.parallel.holds_whole_models:
            yield "vLLM takes models that are replicated: ddp, zero1, zero2, or --rollout_engine coati"
        if self.generators.max_staleness and (self.refills is not None or self.rest_epochs):
            yield (
                "with dynamic_sampling and rest_epochs rewards decide which prompts come next, so sampling can't be "
                "ahead: leave them out, or max_staleness at 0"
            )
        if self.generators.partial_rollouts and self.generators.max_staleness < 2:
            yield "partial_rollouts draws responses in max_staleness parts: raise max_staleness to 2 or more"
        if self.generators.partial_rollouts and (self.environment.path or self.router_replay):
            yield "partial_rollouts is for single responses without router_replay: leave it out, or environment"
        split = self.parallel.pipeline_parallel > 1 or self.parallel.splits_sequences
        if self.router_replay and (split or self.generation.rollout_engine == "vllm" or self.environment.path):
            yield (
                "router_replay is for single responses of coati's rollout engine, and for whole sequences: leave out "
                "environment, vLLM, pipeline and sequence parallelism"
            )
        if self.router_replay and self.generation.compile_generation:
            yield "router_replay looks into the model while it samples: leave out compile_generation"
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
        super().check_machine()
        self.generation.check_installed()
        for reward in self.rewards:
            reward.check_installed()
