"""Settings of GRPO and its relatives."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from coati.config import Settings, inherited, option, section, settings
from coati.trainers.config.rollout import Aggregation, RolloutAlgorithm, RolloutConfig

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
    score_centering: int = option(
        0,
        "of how many most likely tokens the sampler's probabilities are kept with each one that it draws, to take the "
        "score that it expects off the token's own; 0 for no centering",
        ge=0,
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
        if self.score_centering and self.recomputes:
            yield "score_centering has weights of its own, for all tokens: leave out weights and reject"


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
    oversampling: float = option(
        1.0, "groups that dynamic sampling draws for each that is missing, so that fewer refills are needed", ge=1
    )
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
        if self.oversampling > 1 and not self.dynamic_sampling:
            yield "oversampling is for dynamic_sampling: leave it out, or set that"
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
        if self.correction.score_centering and self.policy_loss != "cispo":
            yield (
                "score_centering is for log-probs with constant weights: give policy_loss cispo, with clip_low and "
                "clip_high 0 for no weights"
            )
        if self.correction.score_centering and (self.mask_truncated or self.observation_coefficient):
            yield "score_centering is for all sampled tokens: leave out mask_truncated and observation_coefficient"
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
    def learns_token_rewards(self) -> bool:
        return self.algorithm.advantage == "reinforce++"

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
        has_its_own = a.correction.bypass or a.correction.score_centering or a.policy_loss == "vespo"
        return replace(a.correction, weights="token" if is_other and not has_its_own else "none")

    @property
    def shared_prefix_group(self) -> int:
        return min(self.algorithm.group_size, self.micro_batch_size) if self.algorithm.share_prompts else 1

    @property
    def refills(self) -> int | None:
        return self.algorithm.max_refills if self.algorithm.dynamic_sampling else None

    @property
    def oversampling(self) -> float:
        return self.algorithm.oversampling

    @property
    def rest_epochs(self) -> int:
        return self.algorithm.rest_epochs

    @property
    def heads(self) -> int:
        return self.algorithm.correction.score_centering

    @property
    def router_replay(self) -> bool:
        return self.algorithm.router_replay

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        a, split = self.algorithm, self.parallel.splits_models
        for temperature in (self.generation.temperature, a.final_temperature):
            if temperature is not None and temperature <= 0:
                yield "the responses of a group must differ: temperature and final_temperature must be above 0"
        if self.generators.partial_rollouts and a.final_temperature is not None:
            yield "partial_rollouts draws for several iterations at the same temperature: leave out final_temperature"
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
        if a.correction.score_centering and (split or self.generation.rollout_engine == "vllm"):
            yield (
                "score_centering needs coati's rollout engine and replicated models: leave out vLLM, tensor, pipeline "
                "and sequence parallelism"
            )
        if a.correction.score_centering and self.environment.path:
            yield "score_centering is for single responses: leave it out with an environment"
        if a.correction.score_centering and not self.generation.draws_from_all:
            yield (
                "score_centering needs the distribution that is drawn from: leave out top_k, top_p, min_p, "
                "repetition_penalty and min_new_tokens"
            )
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
        if a.share_prompts and self.model.padding_free:
            yield "share_prompts reads groups without padding in its own way: leave out padding_free"
        if a.share_prompts and split:
            yield "share_prompts needs replicated models: leave out tensor, pipeline and sequence parallelism"
