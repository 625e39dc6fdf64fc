"""Proximal policy optimisation from a reward (Schulman et al., 1707.06347; for language: Ziegler et al., 1909.08593,
and InstructGPT, 2203.02155).

One iteration:
    1. the policy answers a batch of prompts
    2. the rewards score each whole answer; the score falls on its last token, minus a KL penalty on every token
    3. the critic's values and the rewards give advantages (GAE), whitened over the global batch
    4. policy and critic take a few steps on their clipped losses

Departures from the papers: the order of minibatches is drawn anew each epoch but their members stay, so that a run's
minibatches don't depend on the number of processes; dropout is off, so that a policy's ratio to itself is 1.
"""

import copy
import math
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import Module

from coati.data import BatchSampler, collate_sft
from coati.errors import UserError
from coati.losses import (
    adapt_kl_coefficient,
    clip_scores,
    cross_entropy,
    gae,
    kl_divergence,
    masked_sums,
    penalise_missing_eos,
    response_targets,
    shape_rewards,
    value_loss,
    whiten,
)
from coati.losses.language import align
from coati.models import Actor, ActorCritic, Critic
from coati.models.base import disable_dropout
from coati.models.lora import is_untrained_adapter
from coati.parallel import Engine, Runtime
from coati.rewards import RunningMoments
from coati.rollout import Experience, Rollout
from coati.rollout.experience import MicroBatches
from coati.trainers.base import LossPart
from coati.trainers.config import PPOConfig
from coati.trainers.rollouts import RolloutTrainer, count_response_tokens


class PPOTrainer(RolloutTrainer):
    """Trains an `Actor` and a `Critic`, or with `shared_trunk` an `ActorCritic`.

    Args:
        policy: a model to train instead of `config.model`: an `AutoModelForCausalLMWithValueHead`, with `shared_trunk`.
        rewards: rewards of weight 1 beside those that `config` names.
    """

    algorithm = "ppo"

    def __init__(self, config: PPOConfig, runtime: Runtime, *, policy: Module | None = None, rewards=()):
        if policy is not None and not config.shared_trunk:
            raise UserError("a value-head model is policy and critic at once: set shared_trunk")
        self.policy = policy
        super().__init__(config, runtime, rewards=rewards)

    def train_step(self, step: int) -> tuple[dict[str, float], int]:
        """One iteration."""
        self.times = {}
        prompts = self.take_prompts(step)
        with self.timed("generate"):
            rollout = self.answer(prompts, self.seeds(step))
        with self.timed("score"):
            scores, token_rewards, reward_metrics = self.score(prompts, rollout)
        with self.timed("evaluate"):
            experience, experience_metrics = self.experience(rollout, scores, token_rewards)
        with self.timed("learn"):
            update_metrics = self.learn(experience, step)
        metrics = reward_metrics | experience_metrics | update_metrics | self.times
        if self.config.kl_target is not None and math.isfinite(metrics["kl"]):
            self.kl_coefficient = adapt_kl_coefficient(
                self.kl_coefficient,
                metrics["kl"],
                self.config.kl_target,
                self.config.kl_horizon,
                self.config.batch_size,
            )
        tokens = self.communicator.sum(int(rollout.attention_mask.sum()))
        return metrics, int(tokens)

    # --- 1. the policy answers

    def take_prompts(self, step: int) -> list:
        """This rank's prompts, minibatch after minibatch."""
        return [self.data[row] for row, _ in self.rows(step)]

    def seeds(self, step: int) -> list[list[int]]:
        """Seeds of the answers: of the run, the iteration and the prompt, whatever the number of processes."""
        return [[self.config.seed, step, row, repeat] for row, repeat in self.rows(step)]

    def rows(self, step: int) -> list[tuple[int, int]]:
        """This rank's rows of the data, each with how often the batch held it before."""
        batch = self.batches.batch(step)
        return self.mine([(row, batch[:place].count(row)) for place, row in enumerate(batch)])

    # --- 2. the rewards score

    def score(self, prompts: list, rollout: Rollout) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """Scores of whole answers `[batch]` as the policy will see them, rewards of tokens `[batch, seq]` if there are
        any, and what they were made of."""
        c = self.config
        scored, _ = self.judge(prompts, rollout)
        scores, everything = scored.sequence, torch.ones_like(scored.sequence, dtype=torch.bool)
        if c.normalise_reward:
            self.score_moments.update(self.communicator.sum(masked_sums(scores, everything)))
            scores = self.score_moments.normalise(scores)
        scores = clip_scores(scores.to(self.runtime.device), c.reward_clip)
        scores = penalise_missing_eos(scores, rollout.finished, c.missing_eos_penalty)
        token_rewards = None if scored.per_token is None else scored.per_token.to(self.runtime.device)
        return scores, token_rewards, self.reward_metrics([(scored, rollout, len(scores))])

    # --- 3. advantages

    @torch.no_grad()
    def experience(
        self, rollout: Rollout, scores: Tensor, token_rewards: Tensor | None = None
    ) -> tuple[Experience, dict[str, float]]:
        """Log-probs, values, rewards, advantages and returns of every response token."""
        c, mask = self.config, rollout.response_mask
        log_probs, reference, values = self.forward_passes(rollout)
        kl = kl_divergence(log_probs, reference, mask, c.kl_estimator)
        rewards = shape_rewards(scores, kl, mask, self.kl_coefficient)
        rewards = rewards if token_rewards is None else rewards + token_rewards
        advantages, returns = gae(values, rewards, mask, c.gamma, c.gae_lambda)
        metrics = self.diagnose(rollout, log_probs, reference, values, returns)
        if c.whiten_advantages:
            advantages = whiten(advantages, mask, *self.global_moments(advantages, mask))
        named = dict(advantages=advantages, values=values, rewards=rewards, returns=returns, scores=scores)
        tokens = (rollout.input_ids, rollout.attention_mask, mask)
        return Experience(*tokens, log_probs, reference, **named), metrics

    def forward_passes(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the policy and the reference, and values before each token, all `[batch, seq]`."""
        batches = MicroBatches(rollout, self.of_like_length(rollout.attention_mask))
        log_probs, outputs = self.policy_passes(rollout, batches)
        if self.config.shared_trunk:
            values = [values for _, values in outputs]
        else:
            values = self.critic.forward_all([self.inputs(b) for b in batches])
        values = batches.restore([before_token(v) for v in values])
        return log_probs, self.reference_log_probs(batches, log_probs), values

    def sampling_is_training(self) -> bool:
        return super().sampling_is_training() and not self.config.shared_trunk

    def diagnose(self, rollout: Rollout, log_probs, reference, values, returns) -> dict[str, float]:
        """Metrics of an iteration's answers."""
        mask = rollout.response_mask
        metrics = self.kl_metrics(rollout, log_probs, reference)
        _, error = self.global_moments(returns - values, mask)
        mean, spread = self.global_moments(returns, mask)
        explained = 1 - (error / spread) ** 2 if spread > 0 else 0.0
        return metrics | {"return": mean, "explained_variance": explained, "kl_coefficient": self.kl_coefficient}

    # --- 4. policy and critic learn

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        rate = self.learning_rate(self.config.critic_learning_rate)
        return super().learn(experience, step) | {"critic_learning_rate": rate}

    def update(self, batches: list[Experience], step: int) -> dict[str, float]:
        c = self.config
        metrics = {} if c.shared_trunk else self.update_critic(batches)
        if step >= c.critic_warmup or c.shared_trunk:
            metrics |= self.update_policy(batches, step)
        return metrics

    def update_policy(self, batches: list[Experience], step: int) -> dict[str, float]:
        """One step of the policy, and of the value head if they share a trunk."""
        options = {"temperature": self.temperature, "with_entropy": True}
        warming = step < self.config.critic_warmup
        if self.config.shared_trunk:
            options["value_only"] = warming
        share = self.warmup_share if warming else self.shared_share if self.config.shared_trunk else self.policy_share
        parts = [LossPart(batches, count_response_tokens, share, options, targets=lambda b: b.response_mask)]
        if self.ptx_data is not None and not warming:
            of_text = LossPart(self.ptx_batches(step), count_targets, self.ptx_share, targets=text_targets)
            parts.append(of_text)
        metrics = self.optimise(self.actor, parts, self.learning_rate(self.config.learning_rate))
        return {"policy_grad_norm": metrics.pop("grad_norm"), **metrics}

    def update_critic(self, batches: list[Experience]) -> dict[str, float]:
        rate = self.learning_rate(self.config.critic_learning_rate)
        metrics = self.optimise(self.critic, [LossPart(batches, count_response_tokens, self.value_share)], rate)
        return {"critic_grad_norm": metrics.pop("grad_norm"), **metrics}

    def shared_share(self, output, batch: Experience, denominator: float):
        """The policy's loss plus `value_coefficient` times the critic's."""
        *of_policy, values = output
        loss, metrics = self.policy_share(of_policy, batch, denominator)
        value_loss_share, value_metrics = self.value_share(values, batch, denominator)
        return loss + self.config.value_coefficient * value_loss_share, metrics | value_metrics

    def warmup_share(self, output, batch: Experience, denominator: float):
        """The critic's loss alone. Every weight gets a gradient, if of 0: DDP waits for all of them."""
        log_probs, _, values = output
        loss, metrics = self.value_share(values, batch, denominator)
        return self.config.value_coefficient * loss + 0.0 * log_probs.sum(), metrics

    def value_share(self, output, batch: Experience, denominator: float):
        old, returns, mask = batch.values, batch.returns, batch.response_mask
        return value_loss(before_token(output), old, returns, mask, denominator, clip=self.config.value_clip or None)

    def ptx_share(self, output, batch, denominator: float):
        log_probs, *values = output if self.config.shared_trunk else (output,)
        loss, _ = cross_entropy(log_probs, text_targets(batch), denominator)
        unused = sum(0.0 * v.sum() for v in values)  # DDP waits for every weight's gradient
        return self.config.ptx_coefficient * loss + unused, {"ptx_loss": loss.detach()}

    def ptx_batches(self, step: int) -> list:
        """This rank's micro-batches of the pre-training mix: as many rows as a minibatch has answers."""
        data, dealt = self.ptx_data, self.deal(self.ptx_sampler.batch(step), self.ptx_data.lengths)
        return [collate_sft([data[i] for i in index], self.pad_id).to(self.runtime.device) for index in dealt]

    # --- state

    def state(self):
        state = {"kl_coefficient": self.kl_coefficient, "score_moments": asdict(self.score_moments)}
        return state | ({} if self.ptx_data is None else {"ptx_rows": self.ptx_sampler.position(self.step)})

    def load_state(self, state):
        if self.config.kl_target is not None:  # else it is what the settings say
            self.kl_coefficient = state["kl_coefficient"]
        self.score_moments = RunningMoments(**state["score_moments"])
        if self.ptx_data is not None and "ptx_rows" in state:
            self.ptx_sampler.start = (self.step, state["ptx_rows"])

    # --- the four models

    def longest_sequence(self):
        text = 0 if self.ptx_data is None else int(self.ptx_data.lengths.max())
        return max(super().longest_sequence(), text)

    def build(self):
        c = self.config
        if c.model is None and self.policy is None:
            raise UserError("PPO starts from a policy that can answer: give --model FOLDER (train_sft.py makes one)")
        self.ptx_data = self.dataset(c.ptx_data, "sft")
        if self.ptx_data is not None:
            self.ptx_sampler = BatchSampler(len(self.ptx_data), c.batch_size // c.minibatches, c.seed)
        self.kl_coefficient, self.score_moments = c.kl_coefficient, RunningMoments()
        super().build()
        self.critic = self.engines.get("critic")

    def load_models(self) -> dict[str, Engine]:
        c = self.config
        if c.shared_trunk:
            models = dict(actor=self.model(ActorCritic, self.source("actor") or self.policy or c.model, lora=c.lora))
            for parameter in models["actor"].v_head.parameters():
                parameter.lr_factor = c.critic_learning_rate / (c.learning_rate or 1.0)
        else:
            critic_start = c.critic_model or c.reward_model or c.model
            models = dict(actor=self.model(Actor, self.source("actor") or c.model, lora=c.lora))
            models["critic"] = self.model(Critic, self.source("critic") or critic_start, lora=c.lora)
        for model in models.values():
            disable_dropout(model)
        accumulates = dict(actor=self.accumulates or self.ptx_data is not None, critic=self.accumulates)
        return {
            name: self.engine(model, accumulates=accumulates[name], generates=name == "actor")
            for name, model in models.items()
        }

    def load_reference(self, start) -> Engine | None:
        if self.policy is None or not self.config.needs_reference:
            return super().load_reference(start)
        if is_untrained_adapter(self.policy.pretrained_model):
            return None
        return super().load_reference(copy.deepcopy(self.policy.pretrained_model))


def before_token(values: Tensor) -> Tensor:
    """The critic's estimate before each token: what it says after the token to the left, `[batch, seq]`."""
    return align(values)


def text_targets(batch) -> Tensor:
    return response_targets(batch.loss_mask)


def count_targets(batch) -> Tensor:
    return text_targets(batch).sum()
