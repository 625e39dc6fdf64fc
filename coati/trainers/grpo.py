"""Group relative policy optimization (DeepSeekMath, 2402.03300) and its relatives: Dr. GRPO (2503.20783), RLOO
(2402.14740), REINFORCE++ (2501.03262), ReMax (2310.10505), DAPO (2503.14476), GSPO (2507.18071), CISPO (2506.13585),
SAPO (2511.20347), DPPO (2602.04879), MaxRL (2602.02710), LUSPO (2602.05261), VESPO (2602.10693), GDPO (2601.05242),
ECHO (2605.24517).

One iteration:
    1. the policy responds to each of a batch of prompts several times, and the rewards score; with dynamic sampling,
       prompts whose responses all earn the same are replaced by further ones
    2. a response's advantage is what it earned beyond the others of its group: no critic
    3. the policy takes a few steps on a clipped loss

Which options make which algorithm is in docs/grpo.md. Departures from the papers: what dynamic sampling can't replace
within `max_refills` tries stays in the batch, where it adds to the counts but not to the gradient; minibatches and
dropout are as in PPO.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coati.data.collate import SFTBatch
from coati.errors import UserError
from coati.losses import (
    aggregation_weights,
    clip_scores,
    decoupled_advantages,
    expected_scores,
    group_advantages,
    importance_weights,
    is_accepted,
    is_near_policy,
    kl_divergence,
    mismatch_metrics,
    mismatch_sums,
    observation_loss,
    penalize_missing_eos,
    policy_loss,
    punish_overlong,
    returns_to_go,
    shape_rewards,
    turn_advantages,
    whiten,
)
from coati.losses.masking import masked
from coati.models import Actor
from coati.models.adapters import vocabulary
from coati.models.base import disable_dropout
from coati.models.packed import check_packing
from coati.parallel import resolve_precision
from coati.rollout import Experience, Prompt, RolloutBatch, head_ids, head_log_probs
from coati.run_layout import ACTOR, REFERENCE
from coati.samples import Sample
from coati.trainers.actor_critic import named_norm
from coati.trainers.batching import model_inputs
from coati.trainers.config import GRPOConfig
from coati.trainers.iteration import Clock, count_responses, global_moments, kl_metrics, learn, response_tokens
from coati.trainers.policy import LanguageModel, Policy
from coati.trainers.rollouts import RolloutTrainer
from coati.transfer import upload


class GRPOTrainer(RolloutTrainer):
    """Trains an `Actor`.

    Attributes:
        policy: what is asked of it.
    """

    config: GRPOConfig
    algorithm = "grpo"

    def step(self, k):
        """One iteration."""
        c, clock = self.config, Clock()
        a, correction = c.algorithm, c.correction
        batch, metrics = self.rollouts.next(k)
        mask, parts = batch.response_mask, self.batching.split(batch.lengths, c.shared_prefix_group)

        with clock("evaluate"):
            log_probs, rollout_kl = self.policy.log_probs(batch, parts, k)
            reference = self.reference.log_probs(batch, parts) if self.reference else log_probs
            baseline = self.greedy_scores(batch.samples, k) if a.advantage == "remax" else None

        kl = kl_divergence(log_probs, reference, mask, a.kl_estimator)
        in_reward = a.kl_coefficient if a.kl_in == "reward" else 0.0
        rewards = shape_rewards(self.shape(batch), kl, mask, in_reward)
        advantages = self.advantages(masked(rewards + batch.token_rewards, mask), batch.samples, baseline, mask)
        compared = (log_probs, batch.sampling_log_probs, mask)
        weights = importance_weights(*compared, correction.weights, correction.cap)
        accepted = is_accepted(*compared, correction.reject, correction.reject_below, correction.reject_above)
        learned = mask & batch.finished[:, None] if a.mask_truncated else mask
        # weights that are not negative may as well stand in the advantages
        experience = Experience.from_batch(batch, learned, log_probs, reference, advantages * weights * accepted)
        if a.observation_coefficient:
            experience = replace(experience, observed=batch.observed)

        rate = self.learning_rate(k, c.optimizer.learning_rate)
        with clock("learn"):
            metrics |= learn(
                experience, self.batching, c, k, lambda micro: self.update(micro, rate), c.shared_prefix_group
            )
        if a.refresh_reference and (k + 1) % a.refresh_reference == 0:
            self.refresh_reference()

        metrics |= kl_metrics(batch, log_probs, reference, c, self.ranks)
        metrics |= {"rollout_kl": rollout_kl, "learning_rate": rate, "temperature": batch.temperature}
        metrics["advantage_std"] = global_moments(advantages, mask, self.ranks)[1]
        if correction.recomputes:
            mismatch = mismatch_metrics(self.ranks.sum(mismatch_sums(*compared, weights, accepted)))
            metrics |= {f"mismatch/{name}": value for name, value in mismatch.items()}
        return metrics | clock.seconds | {"tokens": self.ranks.sum(sum(batch.lengths)).item()}

    # --- advantages

    def shape(self, batch: RolloutBatch) -> Tensor:
        """The scores of whole responses as the policy will see them, `[batch]`."""
        c, lengths = self.config, batch.response_mask.sum(1)
        scores = clip_scores(batch.scores, c.scoring.reward_clip)
        scores = penalize_missing_eos(scores, batch.finished, c.scoring.missing_eos_penalty)
        buffer, penalty = c.algorithm.overlong_buffer, c.algorithm.overlong_penalty
        return punish_overlong(scores, lengths, c.generation.max_new_tokens, buffer, penalty)

    def advantages(self, rewards: Tensor, samples: list[Sample], baseline: Tensor | None, mask: Tensor) -> Tensor:
        """`[batch, seq]`, 0 outside the response.

        Args:
            rewards: `[batch, seq]`.
            samples: with the separate rewards, for gdpo.
            baseline: `[batch]`, for remax.
        """
        a = self.config.algorithm
        if a.advantage == "reinforce++":
            advantages = returns_to_go(rewards, mask, 1.0)
        elif a.advantage == "gdpo":
            of_responses = decoupled_advantages(*self.separate_rewards(samples), a.group_size)
            every = torch.ones_like(of_responses, dtype=torch.bool)
            of_responses = whiten(of_responses, every, *global_moments(of_responses, every, self.ranks))
            advantages = of_responses[:, None] * mask
        elif a.advantage == "turns":
            advantages = turn_advantages(rewards, mask, a.group_size, a.turn_discount)
        else:
            options = dict(baseline=baseline, min_std=a.advantage_std_floor)
            of_responses = group_advantages(rewards.sum(1), a.group_size, a.advantage, **options)
            advantages = of_responses[:, None] * mask
        if a.advantage.startswith("reinforce++"):
            advantages = whiten(advantages, mask, *global_moments(advantages, mask, self.ranks))
        return advantages

    def separate_rewards(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """What each reward gave each sample, `[samples, rewards]`, NaN where it skipped it; and their weights."""
        of_names = self.generation.scorer.rewards
        given = [[sample.rewards[name] for name in of_names] for sample in samples]
        rows = [[math.nan if reward is None else reward for reward in row] for row in given]
        weights = [weight for _, weight in of_names.values()]
        return upload(rows, self.runtime.device, torch.float32), upload(weights, self.runtime.device, torch.float32)

    def greedy_scores(self, samples: list[Sample], k: int) -> Tensor:
        """What the policy's greedy responses to the samples' prompts earn, `[samples]`."""
        n = self.config.algorithm.group_size
        prompts = [Prompt.from_sample(sample) for sample in samples[::n]]
        found = self.generation.sample(prompts, self.config.generation.at_temperature(0.0), version=k).samples
        batch = RolloutBatch.from_samples(found, self.factory.pad_id, 1.0, self.runtime.device)
        return (self.shape(batch) + batch.token_rewards.sum(1)).repeat_interleave(n)

    # --- the policy learns

    def update(self, micro_batches: list[Experience], rate: float) -> dict[str, float]:
        """One optimizer step, on this rank's micro-batches of a minibatch."""
        responses = count_responses(micro_batches, self.ranks)
        episodes = 1.0
        if self.config.algorithm.observation_coefficient:
            episodes = self.ranks.sum(float(sum(len(batch) for batch in micro_batches))).item()
        with self.policy.engine.update(rate) as update:
            update.add(micro_batches, self.inputs, self.loss(responses, episodes), response_tokens)
        return named_norm(update.metrics, "policy_grad_norm")

    def inputs(self, batch: Experience):
        options: dict[str, Any] = {"with_entropy": "trained" if self.config.algorithm.entropy_coefficient else True}
        targets = batch.response_mask if batch.observed is None else batch.response_mask | batch.observed
        if batch.heads is not None:
            options["head_ids"] = head_ids(batch.heads, batch.response_mask)
        return self.policy.model.inputs(batch, targets, **options)

    def loss(self, responses: float, episodes: float) -> Callable:
        """A micro-batch's part of the policy's loss, the KL penalty, the bonus for entropy, the loss on observations.

        Args:
            responses: of the whole step that count; episodes: all of the step.
        """
        a, longest = self.config.algorithm, self.config.generation.max_new_tokens
        bound = a.correction.off_policy_bound

        def part(output, batch: Experience, denominator: float):
            mask, (log_probs, entropy, *heads) = batch.response_mask, output
            weights = aggregation_weights(mask, a.aggregation, denominator, responses, longest)
            how = dict(clip_low=a.clip_low, clip_high=a.clip_high, dual_clip=a.dual_clip)
            how |= dict(kind=a.policy_loss, gates=(a.gate_positive, a.gate_negative))
            how |= dict(powers=(a.power_positive, a.power_negative), decays=(a.decay_positive, a.decay_negative))
            near = mask
            if bound is not None:
                near = is_near_policy(log_probs, batch.sampling_log_probs, batch.advantages, mask, bound)
            how["weights"] = weights * near
            old_log_probs = batch.log_probs
            if a.correction.score_centering:
                old_log_probs, sampling_heads = batch.sampling_log_probs, head_log_probs(batch.heads, mask)
                bounds = dict(clip_low=a.clip_low, clip_high=a.clip_high)
                how["centering"] = expected_scores(*heads, sampling_heads, mask, **bounds)
            loss, metrics = policy_loss(log_probs, old_log_probs, batch.advantages, mask, denominator, **how)
            if bound is not None:
                metrics["off_policy_masked"] = (mask & ~near).sum() / denominator
            if a.correction.score_centering:
                metrics["head_mass"] = masked(sampling_heads.exp().sum(-1), mask).sum() / denominator
            if a.kl_coefficient and a.kl_in == "loss":
                kl = kl_divergence(log_probs, batch.reference_log_probs, mask, a.kl_estimator)
                loss = loss + a.kl_coefficient * (weights * kl).sum() / denominator
            mean_entropy = masked(entropy, mask).sum() / denominator
            if a.entropy_coefficient:
                loss = loss - a.entropy_coefficient * mean_entropy
            if batch.observed is not None:
                of_environment, told = observation_loss(log_probs, batch.observed, episodes)
                loss, metrics = loss + a.observation_coefficient * of_environment, metrics | told
            return loss, metrics | {"entropy": mean_entropy.detach()}

        return part

    def refresh_reference(self):
        """The reference becomes the current policy."""
        with self.actor.full() as policy:
            self.reference.engine.module.load_state_dict(policy.state_dict())

    def sampling(self, k):
        """The temperature goes from `temperature` to `final_temperature`."""
        first, last = self.config.generation, self.config.algorithm.final_temperature
        if last is None:
            return first
        share = k / max(self.total_steps - 1, 1)
        return first.at_temperature(first.temperature + share * (last - first.temperature))

    # --- building

    def build(self):
        c, a = self.config, self.config.algorithm
        if c.model.path is None:
            raise UserError("GRPO starts from a policy that can respond: give --model FOLDER (train_sft.py makes one)")
        super().build()
        if a.correction.score_centering:  # which is for whole models: a pipeline's stage may have no embeddings
            known = vocabulary(self.actor.module.transformer)
            if a.correction.score_centering > known:
                raise UserError(
                    f"score_centering is {a.correction.score_centering}, but the policy knows {known} tokens"
                )
        self.policy = Policy(
            self.actor,
            c,
            self.ranks,
            group=c.shared_prefix_group,
            recomputes=c.correction.recomputes,
            bypass=a.correction.bypass,
        )
        if a.refresh_reference:
            self.frozen = {REFERENCE: self.reference.engine}
        if a.share_prompts:
            batch, targets = self.longest_group()
            inputs = model_inputs(batch, targets, shared_prefix_group=c.shared_prefix_group)
            check_packing(self.actor.module, self.actor.forward_all, [inputs], resolve_precision(c.parallel) == "fp32")

    def build_models(self):
        start = self.folder.model_in_checkpoint(ACTOR) or self.config.model.path
        actor = self.factory.model(Actor, start, lora=self.config.model.lora)
        disable_dropout(actor)
        return {ACTOR: self.factory.trained(actor, accumulates=self.accumulates(), generates=True)}

    def build_reference(self):
        if not self.config.algorithm.refresh_reference:
            return super().build_reference()
        refreshed = self.folder.model_in_checkpoint(REFERENCE)
        start = refreshed if refreshed is not None and refreshed.is_dir() else self.config.model.path
        frozen = self.factory.frozen(self.factory.model(Actor, start), changes=True)
        return LanguageModel(frozen, group=self.config.shared_prefix_group)

    def longest_group(self) -> tuple[SFTBatch, Tensor]:
        """The longest prompt with responses of the greatest length, and which tokens these are."""
        c = self.config
        prompt, last = list(self.data[int(self.data.lengths.argmax())].input_ids), c.generation.max_new_tokens
        rows = [prompt + [(i + n) % len(self.tokenizer) for i in range(last)] for n in range(c.shared_prefix_group)]
        ids = torch.tensor(rows, device=self.runtime.device)
        responses = (torch.arange(ids.shape[1], device=ids.device) >= len(prompt)).expand_as(ids)
        return SFTBatch(ids, torch.ones_like(responses), responses), responses
