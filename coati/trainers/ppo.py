"""Proximal policy optimization from a reward (Schulman et al., 1707.06347; for language: Ziegler et al., 1909.08593,
and InstructGPT, 2203.02155).

One iteration:
    1. the policy responds to a batch of prompts, and the rewards score each whole response
    2. the score falls on the response's last token, minus a KL penalty on every token
    3. the critic's values and the rewards give advantages (GAE), whitened over the global batch
    4. policy and critic take a few steps on their clipped losses

What value methods have learned since is there as settings: targets of the critic's own (VC-PPO, 2503.01491), a lambda
by the response's length (VAPO, 2504.05118), values within the range of the rewards and a critic that reads more than
the policy (BPCO, 2608.23566), several steps of the critic per step of the policy (SAO, 2607.07508).

Departures from the papers: the order of minibatches is drawn anew each epoch but their members stay, so that a run's
minibatches don't depend on the number of processes; dropout is off, so that a policy's ratio to itself is 1.
"""

import copy
import math
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn import Module

from coati.data import BatchSampler, TokenSequence, collate_sft
from coati.data.collate import SFTBatch
from coati.data.teaching import Teaching
from coati.errors import UserError
from coati.losses import (
    adapt_kl_coefficient,
    clip_scores,
    gae,
    kl_divergence,
    length_adaptive_lambda,
    masked_sums,
    penalize_missing_eos,
    shape_rewards,
    turn_gae,
    whiten,
)
from coati.models import Actor, ActorCritic, Critic
from coati.models.base import disable_dropout
from coati.models.lora import is_untrained_adapter
from coati.parallel import Runtime
from coati.rewards import RunningMoments
from coati.rollout import Experience
from coati.run_layout import ACTOR, CRITIC
from coati.samples import Sample
from coati.trainers.actor_critic import PolicyAndCritic, Rates, SharedTrunk, TwoModels
from coati.trainers.config import PPOConfig
from coati.trainers.iteration import Clock, global_moments, kl_metrics, learn
from coati.trainers.policy import LanguageModel, Policy
from coati.trainers.rollouts import RolloutTrainer, after_prompt


class PPOTrainer(RolloutTrainer):
    """Trains an `Actor` and a `Critic`, or with `shared_trunk` an `ActorCritic`.

    Args:
        policy: an `AutoModelForCausalLMWithValueHead` to train instead of `config.model`, with `shared_trunk`.
        **options: those of `RolloutTrainer`.

    Attributes:
        models: policy and critic.
        kl_coefficient: of now; with `kl_target` it adapts itself.
        score_moments: of all scores so far, for `normalize_reward`.
    """

    config: PPOConfig
    algorithm = "ppo"
    models: PolicyAndCritic

    def __init__(self, config: PPOConfig, runtime: Runtime, *, policy: Module | None = None, **options):
        if policy is not None and not config.algorithm.shared_trunk:
            raise UserError("a value-head model is policy and critic at once: set shared_trunk")
        self.given_policy = policy
        super().__init__(config, runtime, **options)

    def step(self, k):
        """One iteration."""
        c, clock = self.config, Clock()
        a = c.algorithm
        batch, metrics = self.rollouts.next(k)
        if a.critic_prompt is not None:
            batch = replace(batch, critic_rows=self.read_by_critic(batch.samples))
        mask, parts = batch.response_mask, self.batching.split(batch.lengths)

        with clock("evaluate"):
            log_probs, values, rollout_kl = self.models.evaluate(batch, parts, k)
            reference = self.reference.log_probs(batch, parts) if self.reference else log_probs

        scores = self.normalize(batch.scores) if c.scoring.normalize_reward else batch.scores
        scores = clip_scores(scores, c.scoring.reward_clip)
        scores = penalize_missing_eos(scores, batch.finished, c.scoring.missing_eos_penalty)
        kl = kl_divergence(log_probs, reference, mask, a.kl_estimator)
        rewards = shape_rewards(scores, kl, mask, self.kl_coefficient) + batch.token_rewards
        lam = length_adaptive_lambda(mask, a.length_adaptive_alpha) if a.length_adaptive_alpha else a.gae_lambda
        estimate = turn_gae if a.gae_level == "turn" else gae
        advantages, returns = estimate(values, rewards, mask, a.gamma, lam)
        if a.critic_lambda is not None:
            _, returns = estimate(values, rewards, mask, a.gamma, a.critic_lambda)
        if a.whiten_advantages:
            advantages = whiten(advantages, mask, *global_moments(advantages, mask, self.ranks))

        experience = Experience.from_batch(batch, mask, log_probs, reference, advantages, values, returns)
        rates = Rates(self.learning_rate(k, c.optimizer.learning_rate), self.learning_rate(k, a.critic_learning_rate))
        texts = self.texts(k)
        with clock("learn"):
            metrics |= learn(experience, self.batching, c, k, lambda micro: self.models.update(micro, texts, k, rates))

        metrics |= kl_metrics(batch, log_probs, reference, c, self.ranks)
        metrics |= value_metrics(values, returns, mask, self.ranks)
        metrics |= {"rollout_kl": rollout_kl, "kl_coefficient": self.kl_coefficient}
        metrics |= {"learning_rate": rates.policy, "critic_learning_rate": rates.critic}
        if a.kl_target is not None and math.isfinite(metrics["kl"]):
            adapted = (metrics["kl"], a.kl_target, a.kl_horizon, c.batch_size)
            self.kl_coefficient = adapt_kl_coefficient(self.kl_coefficient, *adapted)
        return metrics | clock.seconds | {"tokens": self.ranks.sum(sum(batch.lengths)).item()}

    def read_by_critic(self, samples: list[Sample]) -> list[TokenSequence]:
        """The responses after the critic's own prompts."""
        return [after_prompt(self.data[sample.row].teacher_ids, sample) for sample in samples]

    def normalize(self, scores: Tensor) -> Tensor:
        """By the mean and standard deviation of all scores so far, these included."""
        everything = torch.ones_like(scores, dtype=torch.bool)
        self.score_moments.update(self.ranks.sum(masked_sums(scores, everything)))
        return self.score_moments.normalize(scores)

    def texts(self, k: int) -> list[SFTBatch]:
        """This rank's micro-batches of the pre-training mix: as many rows as a minibatch has responses."""
        if self.text_data is None:
            return []
        parts = self.batching.shard(self.text_order.batch(k), self.text_data.lengths)
        batches = [collate_sft([self.text_data[row] for row in part], self.factory.pad_id) for part in parts]
        return [batch.to(self.runtime.device) for batch in batches]

    # --- state

    def state(self):
        of_texts = {} if self.text_data is None else {"ptx_rows": self.text_order.position(self.steps_done)}
        of_algorithm = {"kl_coefficient": self.kl_coefficient, "score_moments": asdict(self.score_moments)}
        return super().state() | of_algorithm | of_texts

    def load_state(self, state):
        super().load_state(state)
        if self.config.algorithm.kl_target is not None:  # else it is what the settings say
            self.kl_coefficient = state["kl_coefficient"]
        self.score_moments = RunningMoments(**state["score_moments"])
        if self.text_data is not None and "ptx_rows" in state:
            self.text_order.start = (self.steps_done, state["ptx_rows"])

    # --- building

    def build(self):
        c, a = self.config, self.config.algorithm
        if c.model.path is None and self.given_policy is None:
            raise UserError("PPO starts from a policy that can respond: give --model FOLDER (train_sft.py makes one)")
        self.text_data = self.factory.dataset(a.ptx_data, "sft")
        if self.text_data is not None:
            self.text_order = BatchSampler(len(self.text_data), c.batch_size // a.minibatches, c.seed)
        self.kl_coefficient, self.score_moments = a.kl_coefficient, RunningMoments()
        super().build()
        # a ratio to the sampler's policy is what PPO's clipping is about
        policy = Policy(self.actor, c, self.ranks, bypass=c.generators.max_staleness > 0)
        self.models = SharedTrunk(policy, a) if a.shared_trunk else TwoModels(policy, self.engines[CRITIC], a)

    def prompts(self, sources, weights=None):
        critic_prompt = self.config.algorithm.critic_prompt
        if critic_prompt is None:
            return super().prompts(sources, weights)
        return self.factory.dataset(sources, "prompt", weights, Teaching(critic_prompt, setting="critic_prompt"))

    def build_models(self):
        c, a, in_checkpoint = self.config, self.config.algorithm, self.folder.model_in_checkpoint
        several = self.accumulates()
        if a.shared_trunk:
            actor = self.factory.model(
                ActorCritic, in_checkpoint(ACTOR) or self.given_policy or c.model.path, lora=c.model.lora
            )
            for parameter in actor.v_head.parameters():
                parameter.lr_factor = a.critic_learning_rate / (c.optimizer.learning_rate or 1.0)
        else:
            actor = self.factory.model(Actor, in_checkpoint(ACTOR) or c.model.path, lora=c.model.lora)
        models = {ACTOR: actor}
        if not a.shared_trunk:
            start = in_checkpoint(CRITIC) or a.critic_model or c.reward_model or c.model.path
            how = dict(lora=c.model.lora, weights=c.objectives_of(start))
            models[CRITIC] = self.factory.model(Critic, start, **how)
        for model in models.values():
            disable_dropout(model)
        engines = {}
        for name, model in models.items():
            is_actor = name == ACTOR
            accumulates = several or (is_actor and self.text_data is not None)
            engines[name] = self.factory.trained(model, accumulates=accumulates, generates=is_actor)
        return engines

    def build_reference(self):
        given = self.given_policy
        if given is None or not self.config.algorithm.needs_reference:
            return super().build_reference()
        if is_untrained_adapter(given.pretrained_model):
            return LanguageModel(self.actor, adapter=False)
        return LanguageModel(self.factory.frozen(self.factory.model(Actor, copy.deepcopy(given.pretrained_model))))

    def longest_sequence(self):
        text = 0 if self.text_data is None else int(self.text_data.lengths.max())
        return max(super().longest_sequence(), text)


def value_metrics(values: Tensor, returns: Tensor, mask: Tensor, ranks) -> dict[str, float]:
    """The mean return, and the share of the returns' variance that the critic foretold."""
    _, error = global_moments(returns - values, mask, ranks)
    mean, spread = global_moments(returns, mask, ranks)
    return {"return": mean, "explained_variance": 1 - (error / spread) ** 2 if spread > 0 else 0.0}
