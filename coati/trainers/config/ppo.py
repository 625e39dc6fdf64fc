"""Settings of PPO and its relatives."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from coati.config import ListOf, inherited, option, section, settings
from coati.data.teaching import fields_of
from coati.trainers.config.rollout import Aggregation, RolloutAlgorithm, RolloutConfig


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
    def learns_token_rewards(self) -> bool:
        return True

    @property
    def models(self) -> list[str]:
        return super().models + ([self.algorithm.critic_model] if self.algorithm.critic_model else [])

    @property
    def router_replay(self) -> bool:
        return self.algorithm.router_replay

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
        if self.algorithm.shared_trunk and self.model.padding_free:
            yield "shared_trunk reads rows for two heads, with their padding: leave out padding_free"
        if self.algorithm.shared_trunk and self.parallel.splits_models:
            yield (
                "shared_trunk runs under ddp, zero1, zero2 and gemini: leave out tensor, pipeline and "
                "sequence parallelism, or shared_trunk"
            )
        if self.algorithm.shared_trunk and self.optimizer.learning_rate <= 0 < self.algorithm.critic_learning_rate:
            yield "shared_trunk needs a learning_rate above 0: the value head's is a multiple of it"
