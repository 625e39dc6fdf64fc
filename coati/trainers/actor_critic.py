"""Policy and critic of PPO: two models, or two heads of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from coati.data import collate_sft
from coati.data.collate import SFTBatch
from coati.losses import (
    aggregation_weights,
    bounded_values,
    cross_entropy,
    policy_loss,
    response_targets,
    value_loss,
)
from coati.losses.language import align
from coati.losses.masking import masked
from coati.parallel import Engine
from coati.rollout import Experience, RolloutBatch
from coati.trainers.batching import in_batch_order, model_inputs
from coati.trainers.config import PPO, PPOConfig
from coati.trainers.iteration import count_responses, response_tokens
from coati.trainers.policy import Policy


class Evaluation(NamedTuple):
    """What policy and critic say of a batch.

    Attributes:
        log_probs: of the response tokens; values: before each of them; float32 `[batch, seq]`.
        rollout_kl: of sampling from training, nats per token.
    """

    log_probs: Tensor
    values: Tensor
    rollout_kl: float


@dataclass(frozen=True)
class Rates:
    """Learning rates of a step."""

    policy: float
    critic: float


class PolicyAndCritic(Protocol):
    """What an iteration of PPO asks of the two."""

    def evaluate(self, batch: RolloutBatch, parts: Sequence[Sequence[int]], k: int) -> Evaluation:
        """Log-probs and values of iteration k's batch, whose `parts` are the rows of its micro-batches."""

    def update(self, micro_batches: list[Experience], texts: list[SFTBatch], k: int, rates: Rates) -> dict[str, float]:
        """One optimizer step of both, on this rank's micro-batches; returns its metrics.

        Args:
            texts: of the pre-training mix, for the policy.
        """


@dataclass(frozen=True)
class CriticReading:
    """A micro-batch as a critic of its own reads it.

    Attributes:
        batch: as the policy reads it.
        rows: the responses after the critic's own prompts; None where it reads what the policy does.
    """

    batch: RolloutBatch | Experience
    rows: SFTBatch | None

    @classmethod
    def of(cls, batch: RolloutBatch | Experience) -> "CriticReading":
        if batch.critic_rows is None:
            return cls(batch, None)
        rows = collate_sft(batch.critic_rows, 0)  # what padding holds is masked
        return cls(batch, rows.to(batch.input_ids.device))


class TwoModels:
    """An `Actor` and a `Critic`."""

    def __init__(self, policy: Policy, critic: Engine, settings: PPO):
        self.policy, self.critic, self.settings = policy, critic, settings

    def evaluate(self, batch, parts, k):
        """See `PolicyAndCritic`."""
        log_probs, rollout_kl = self.policy.log_probs(batch, parts, k)
        readings = [CriticReading.of(batch.rows(part)) for part in parts]
        outputs = self.critic.forward_all([self.critic_inputs(reading) for reading in readings])
        values = [self.values(*pair) for pair in zip(outputs, readings, strict=True)]
        return Evaluation(log_probs, in_batch_order(parts, values, batch.input_ids.shape), rollout_kl)

    def update(self, micro_batches, texts, k, rates):
        """See `PolicyAndCritic`. For `critic_warmup` iterations only the critic learns."""
        readings = [CriticReading.of(batch) for batch in micro_batches]
        for _ in range(self.settings.critic_updates):
            with self.critic.update(rates.critic) as update:
                update.add(
                    readings, self.critic_inputs, self.value_loss, lambda reading: response_tokens(reading.batch)
                )
        metrics = named_norm(update.metrics, "critic_grad_norm")
        if k < self.settings.critic_warmup:
            return metrics
        responses = responses_that_count(micro_batches, self.policy)
        with self.policy.engine.update(rates.policy) as update:
            update.add(micro_batches, self.policy_inputs, self.policy_loss(responses), response_tokens)
            if texts:
                update.add(texts, text_inputs, self.text_loss, text_tokens)
        return metrics | named_norm(update.metrics, "policy_grad_norm")

    def policy_inputs(self, batch: Experience):
        return self.policy.model.inputs(batch, with_entropy=True)

    def policy_loss(self, responses: float) -> Callable:
        """A micro-batch's part of the policy's loss.

        Args:
            responses: of the whole step.
        """

        def part(output, batch: Experience, denominator: float):
            return policy_term(self.policy.config, *output, batch, denominator, responses)

        return part

    def critic_inputs(self, reading: CriticReading):
        return model_inputs(reading.rows or reading.batch)

    def values(self, output: Tensor, reading: CriticReading) -> Tensor:
        """The critic's estimate before each of the policy's tokens, `[batch, seq]`."""
        values = values_before(self.settings, output)
        if reading.rows is None:
            return values
        # the same response tokens in the same order, at other places
        mask = reading.batch.response_mask
        own = values.new_zeros(mask.shape)
        own[mask] = values[reading.rows.loss_mask]
        return own

    def value_loss(self, output: Tensor, reading: CriticReading, denominator: float):
        return value_term(self.settings, self.values(output, reading), reading.batch, denominator)

    def text_loss(self, log_probs: Tensor, batch: SFTBatch, denominator: float):
        return text_term(self.settings, log_probs, batch, denominator)


class SharedTrunk:
    """An `ActorCritic`: one forward pass gives log-probs and values, one step moves both heads.

    Every weight gets a gradient from every term of the loss, if one of 0: DDP waits for all of them.
    """

    def __init__(self, policy: Policy, settings: PPO):
        self.policy, self.settings = policy, settings

    def evaluate(self, batch, parts, k):
        """See `PolicyAndCritic`."""
        model = self.policy.model
        outputs = self.policy.engine.forward_all([model.inputs(batch.rows(part)) for part in parts])
        log_probs = in_batch_order(parts, [output[0] for output in outputs], batch.input_ids.shape)
        values = [values_before(self.settings, output[1]) for output in outputs]
        values = in_batch_order(parts, values, batch.input_ids.shape)
        rollout_kl = self.policy.rollout_kl(batch, log_probs, batch.response_mask)
        return Evaluation(batch.sampling_log_probs if self.policy.bypass else log_probs, values, rollout_kl)

    def update(self, micro_batches, texts, k, rates):
        """See `PolicyAndCritic`. For `critic_warmup` iterations the value head learns and the trunk doesn't."""
        warming = k < self.settings.critic_warmup
        with self.policy.engine.update(rates.policy) as update:
            if warming:
                update.add(micro_batches, self.warmup_inputs, self.warmup_loss, response_tokens)
            else:
                responses = responses_that_count(micro_batches, self.policy)
                update.add(micro_batches, self.inputs, self.loss(responses), response_tokens)
                if texts:
                    update.add(texts, text_inputs, self.text_loss, text_tokens)
        return named_norm(update.metrics, "policy_grad_norm")

    def inputs(self, batch: Experience):
        return self.policy.model.inputs(batch, with_entropy=True)

    def warmup_inputs(self, batch: Experience):
        return self.policy.model.inputs(batch, value_only=True)

    def loss(self, responses: float) -> Callable:
        """A micro-batch's part of the policy's loss plus `value_coefficient` times the critic's.

        Args:
            responses: of the whole step.
        """

        def part(output, batch: Experience, denominator: float):
            log_probs, entropy, values = output
            loss, metrics = policy_term(self.policy.config, log_probs, entropy, batch, denominator, responses)
            values = values_before(self.settings, values)
            of_values, value_metrics = value_term(self.settings, values, batch, denominator)
            return loss + self.settings.value_coefficient * of_values, metrics | value_metrics

        return part

    def warmup_loss(self, output, batch: Experience, denominator: float):
        log_probs, values = output
        loss, metrics = value_term(self.settings, values_before(self.settings, values), batch, denominator)
        return self.settings.value_coefficient * loss + 0.0 * log_probs.sum(), metrics

    def text_loss(self, output, batch: SFTBatch, denominator: float):
        log_probs, values = output
        loss, metrics = text_term(self.settings, log_probs, batch, denominator)
        return loss + 0.0 * values.sum(), metrics


def responses_that_count(micro_batches: list[Experience], policy: Policy) -> float:
    """Of a step, for an aggregation that asks for them: to count them waits for the device."""
    if policy.config.algorithm.aggregation == "token":
        return 1.0
    return count_responses(micro_batches, policy.ranks)


def policy_term(
    config: PPOConfig, log_probs: Tensor, entropy: Tensor, batch: Experience, denominator: float, responses: float
):
    """A micro-batch's part of the policy's loss and of its metrics.

    Args:
        log_probs, entropy: `[batch, seq]`.
        denominator, responses: response tokens, and responses, of the whole step.
    """
    a, mask = config.algorithm, batch.response_mask
    how = dict(kind=a.policy_loss, clip_low=a.clip_low, clip_high=a.clip_high, dual_clip=a.dual_clip)
    longest = config.generation.max_new_tokens
    how["weights"] = aggregation_weights(mask, a.aggregation, denominator, responses, longest)
    loss, metrics = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, denominator, **how)
    return loss, metrics | {"entropy": masked(entropy.detach(), mask).sum() / denominator}


def value_term(settings: PPO, values: Tensor, batch: Experience, denominator: float):
    """A micro-batch's part of the critic's loss; `values` are those before each token, `[batch, seq]`."""
    mask, clip = batch.response_mask, settings.value_clip or None
    return value_loss(values, batch.values, batch.returns, mask, denominator, clip=clip)


def text_term(settings: PPO, log_probs: Tensor, batch: SFTBatch, denominator: float):
    """A micro-batch's part of the loss on the pre-training mix (InstructGPT, 2203.02155, eq. 2)."""
    loss, _ = cross_entropy(log_probs, response_targets(batch.loss_mask), denominator)
    return settings.ptx_coefficient * loss, {"ptx_loss": loss.detach()}


def text_inputs(batch: SFTBatch):
    return model_inputs(batch, response_targets(batch.loss_mask))


def text_tokens(batch: SFTBatch) -> Tensor:
    return response_targets(batch.loss_mask).sum()


def values_before(settings: PPO, outputs: Tensor) -> Tensor:
    """The critic's estimate before each token: what it says after the token to the left, `[batch, seq]`.

    Args:
        outputs: of the critic, after each token.
    """
    values = bounded_values(outputs, *settings.value_range) if settings.value_range else outputs
    return align(values)


def named_norm(metrics: dict[str, float], name: str) -> dict[str, float]:
    """Metrics of an update, the gradients' norm first and by a model's name."""
    rest = {key: value for key, value in metrics.items() if key != "grad_norm"}
    return {name: metrics["grad_norm"], **rest}
