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
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from coati.config import option
from coati.data import BatchSampler, collate_sft, cut
from coati.errors import UserError
from coati.losses import (
    adapt_kl_coefficient,
    clip_scores,
    cross_entropy,
    gae,
    kl_divergence,
    masked_sums,
    moments,
    penalise_missing_eos,
    policy_loss,
    response_targets,
    shape_rewards,
    value_loss,
    whiten,
)
from coati.losses.language import align
from coati.losses.masking import keep
from coati.models import Actor, ActorCritic, Critic, RewardModel
from coati.models.base import disable_dropout
from coati.models.lora import is_adapter, is_untrained_adapter
from coati.parallel import Engine, Runtime, make_engine
from coati.parallel.plugins import resolve_precision
from coati.rewards import ModelReward, RunningMoments, Scores, ScoringConfig, load_rewards
from coati.rollout import Experience, GenerationConfig, Rollout, generate
from coati.rollout.experience import MicroBatches
from coati.rollout.generate import has_keys_and_values
from coati.rollout.prompts import eos_ids
from coati.trainers.base import LossPart, Trainer
from coati.trainers.config import TrainerConfig


@dataclass
class PPOConfig(TrainerConfig, GenerationConfig, ScoringConfig):
    """Settings of a PPO run; `steps` are iterations and `batch_size` the prompts of one."""

    critic_model: str | None = option(None, "where the critic starts; the reward model, else --model, if not given")
    critic_learning_rate: float = option(1e-5, "AdamW's peak learning rate for the critic")
    critic_warmup: int = option(0, "iterations in which only the critic learns")
    kl_coefficient: float = option(0.05, "weight of the KL penalty to the reference; 0 needs no reference model")
    kl_target: float | None = option(None, "nats an answer that the KL coefficient adapts itself to hold")
    kl_horizon: float = option(10000, "answers over which an adaptive coefficient moves")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimate of the KL a token, see docs/ppo.md")
    kl_stop: float | None = option(None, "ends an iteration's updates when the policy has moved this far, nats a token")
    gamma: float = option(1.0, "discount a token")
    gae_lambda: float = option(0.95, "GAE's trade of bias and variance")
    whiten_advantages: bool = option(True, "advantages get mean 0 and standard deviation 1 over the global batch")
    ppo_epochs: int = option(2, "passes over an iteration's answers")
    minibatches: int = option(1, "optimiser steps a pass")
    clip_low: float = option(0.2, "the policy's ratio is clipped from below at 1 - this")
    clip_high: float = option(0.2, "and from above at 1 + this")
    dual_clip: float | None = option(None, "bound on the objective of bad actions, as a multiple of the advantage")
    shared_trunk: bool = option(False, "policy and critic are two heads of one model: one forward pass gives both")
    value_coefficient: float = option(0.1, "weight of the value loss beside the policy's, with shared_trunk")
    value_clip: float = option(0.2, "how far a value may move in an iteration before it stops learning; 0 for no limit")
    ptx_data: list[str] = option((), "SFT data mixed into the policy's loss, so that it keeps what it knew")
    ptx_coefficient: float = option(0.0, "weight of that loss")
    generation_batch_size: int = option(64, "answers drawn at a time on one process")
    max_rollout_kl: float = option(0.1, "stop when sampling and training disagree by more than this, nats a token")

    @property
    def longest_row(self) -> int:
        answered = self.max_prompt_length + self.max_new_tokens
        return max(answered, self.max_length) if self.ptx_data else answered

    def check(self, world_size: int):
        super().check(world_size)
        self.check_generation()
        unit = self.minibatches * world_size
        if self.batch_size % unit:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of {unit} "
                f"({self.minibatches} minibatches x {world_size} processes)"
            )
        if self.compile_generation and (self.plugin == "gemini" or self.model_parallel_size > 1):
            raise UserError("compile_generation is for models that are whole on every process: ddp, zero1 or zero2")
        if self.rollout_engine == "vllm" and (self.plugin == "gemini" or self.model_parallel_size > 1):
            raise UserError(
                "vLLM takes models that are whole on every process: ddp, zero1, zero2, or --rollout_engine coati"
            )
        if self.num_beams > 1:
            raise UserError("PPO learns from samples: leave num_beams at 1")
        if bool(self.ptx_data) != (self.ptx_coefficient > 0):
            raise UserError("ptx_data and ptx_coefficient go together: give both or neither")
        if self.shared_trunk and self.model_parallel_size > 1:
            raise UserError(
                "shared_trunk runs under ddp, zero1, zero2 and gemini: leave out tensor, pipeline and "
                "sequence parallelism, or shared_trunk"
            )
        if self.shared_trunk and self.learning_rate <= 0 < self.critic_learning_rate:
            raise UserError("shared_trunk needs a learning_rate above 0: the value head's is a multiple of it")
        if self.shared_trunk and self.critic_model:
            raise UserError("shared_trunk has no critic_model: the value head starts from --model if that has one")


class PPOTrainer(Trainer):
    """Trains an `Actor` and a `Critic`, or with `shared_trunk` an `ActorCritic`.

    Args:
        policy: a model to train instead of `config.model`: an `AutoModelForCausalLMWithValueHead`, with `shared_trunk`.
        rewards: rewards of weight 1 beside those that `config` names.
    """

    algorithm = "ppo"
    headline = ("reward", True)

    def __init__(self, config: PPOConfig, runtime: Runtime, *, policy: Module | None = None, rewards=()):
        if policy is not None and not config.shared_trunk:
            raise UserError("a value-head model is policy and critic at once: set shared_trunk")
        self.policy, self.given_rewards = policy, rewards
        super().__init__(config, runtime)

    def train_step(self, step: int) -> tuple[dict[str, float], int]:
        """One iteration."""
        self.times: dict[str, float] = {}
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
        world, rank, c = self.communicator.world_size, self.communicator.rank, self.config
        batch = self.batches.batch(step)
        rows = [(row, batch[:place].count(row)) for place, row in enumerate(batch)]
        return [row for m in range(c.minibatches) for row in rows[m :: c.minibatches][rank::world]]

    def answer(self, prompts: list, seeds: list | None = None) -> Rollout:
        """One answer a prompt, drawn with all weights at hand."""
        with self.actor.full() as model:
            return generate(
                model,
                [prompt.input_ids for prompt in prompts],
                self.config,
                eos_ids=eos_ids(self.tokenizer, model),
                pad_id=self.pad_id,
                seeds=seeds,
                tokenizer=self.tokenizer,
                batch_size=self.config.generation_batch_size,
            )

    # --- 2. the rewards score

    def score(self, prompts: list, rollout: Rollout) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """Scores of whole answers `[batch]` as the policy will see them, rewards of tokens `[batch, seq]` if there are
        any, and what they were made of."""
        c, world = self.config, self.communicator.world_size
        scored, _ = self.judge(prompts, rollout)
        scores, everything = scored.sequence, torch.ones_like(scored.sequence, dtype=torch.bool)
        if c.normalise_reward:
            self.score_moments.update(self.communicator.sum(masked_sums(scores, everything)))
            scores = self.score_moments.normalise(scores)
        scores = clip_scores(scores.to(self.runtime.device), c.reward_clip)
        scores = penalise_missing_eos(scores, rollout.finished, c.missing_eos_penalty)
        token_rewards = None if scored.per_token is None else scored.per_token.to(self.runtime.device)
        mean, std = moments(self.communicator.sum(masked_sums(scored.total, everything)))
        shares = {f"reward/{name}": part.mean() / world for name, part in scored.parts.items()}
        shares["response_length"] = rollout.response_mask.sum() / c.batch_size
        shares["finished"] = rollout.finished.sum() / c.batch_size
        shares["truncated"] = (~rollout.finished).sum() / c.batch_size
        metrics = {"reward": mean, "reward_std": std, **self.communicator.sum_metrics([shares])}
        metrics |= {f"seconds/reward/{name}": seconds for name, seconds in scored.seconds.items()}
        return scores, token_rewards, metrics

    def judge(self, prompts: list, rollout: Rollout) -> tuple[Scores, list[str]]:
        """What all rewards give, and the answers' texts."""
        responses = self.tokenizer.batch_decode(rollout.response_ids(), skip_special_tokens=True)
        responses = [text.strip() for text in responses]
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        for name in ("input_ids", "attention_mask", "response_mask"):
            columns[name] = getattr(rollout, name)
        return self.rewards.score([p.text for p in prompts], responses, **columns), responses

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
        experience = Experience(
            rollout.input_ids,
            rollout.attention_mask,
            mask,
            log_probs,
            reference,
            values,
            rewards,
            advantages,
            returns,
            scores,
        )
        return experience, metrics

    def forward_passes(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the policy and the reference, and values before each token, all `[batch, seq]`.

        In fp32 the policy's log-probs are those at sampling, up to rounding: a few rows are computed again to show
        it. In lower precision, on a sharded model and in vLLM they round differently, and all are.
        """
        c = self.config
        batches = MicroBatches(rollout, self.of_like_length(rollout.attention_mask))
        same = resolve_precision(c) == "fp32" and c.model_parallel_size == 1 and not c.shared_trunk
        same = same and c.rollout_engine == "coati"
        checked = batches.sample(self.step) if same else batches
        options = {"temperature": self.temperature}
        outputs = self.actor.forward_all([self.inputs(b, b.response_mask) | options for b in checked])
        if c.shared_trunk:
            outputs, values = zip(*outputs, strict=True)
        else:
            values = self.critic.forward_all([self.inputs(b) for b in batches])
        log_probs = checked.restore(outputs)
        self.rollout_kl = self.compare(rollout, log_probs, rollout.response_mask & checked.mask()[:, None])
        log_probs = rollout.log_probs if same else log_probs
        values = batches.restore([before_token(v) for v in values])
        return log_probs, self.reference_log_probs(batches, log_probs), values

    def compare(self, rollout: Rollout, log_probs: Tensor, mask: Tensor) -> float:
        """The KL of sampling from training, nats a token; stops a run where they disagree."""
        difference = kl_divergence(rollout.log_probs, log_probs, mask, "k3").sum()
        total, tokens = self.communicator.sum(torch.stack([difference, mask.sum()])).tolist()
        if total / max(tokens, 1) > self.config.max_rollout_kl:
            raise UserError(
                f"the log-probs at sampling and in training differ by {total / tokens:.3g} nats a token (limit "
                f"{self.config.max_rollout_kl}, --max_rollout_kl): weights not handed over, another temperature, or a "
                "precision too low"
            )
        return total / max(tokens, 1)

    def reference_log_probs(self, batches: MicroBatches, log_probs: Tensor) -> Tensor:
        if self.kl_coefficient == 0 and self.config.kl_target is None:
            return log_probs
        options = {"temperature": self.temperature} | ({} if self.reference else {"adapter": False})
        inputs = [self.inputs(b, b.response_mask) | options for b in batches]
        outputs = (self.reference or self.actor).forward_all(inputs)
        return batches.restore([output[0] if isinstance(output, tuple) else output for output in outputs])

    def diagnose(self, rollout: Rollout, log_probs, reference, values, returns) -> dict[str, float]:
        """Metrics of an iteration's answers."""
        mask, answers = rollout.response_mask, self.config.batch_size
        tokens = self.communicator.sum(mask.sum()).item()
        shares = {}
        for name in ("k1", "k3"):
            shares[f"kl/{name}"] = kl_divergence(log_probs, reference, mask, name).sum() / answers
        penalised = kl_divergence(log_probs, reference, mask, self.config.kl_estimator).sum()
        shares |= {"kl": penalised / answers, "kl_per_token": penalised / tokens}
        metrics = self.communicator.sum_metrics([shares])
        _, error = self.global_moments(returns - values, mask)
        mean, spread = self.global_moments(returns, mask)
        explained = 1 - (error / spread) ** 2 if spread > 0 else 0.0
        metrics |= {"return": mean, "explained_variance": explained, "kl_coefficient": self.kl_coefficient}
        return {"rollout_kl": self.rollout_kl} | metrics

    def global_moments(self, x: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and standard deviation over all ranks' response tokens."""
        return moments(self.communicator.sum(masked_sums(x, mask)))

    # --- 4. policy and critic learn

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """`ppo_epochs` passes of `minibatches` steps; stops early when the policy has moved `kl_stop` nats a token."""
        c, updates = self.config, []
        policy_rate, critic_rate = self.learning_rate(c.learning_rate), self.learning_rate(c.critic_learning_rate)
        for epoch in range(c.ppo_epochs):
            for m in np.random.default_rng([c.seed, step, epoch]).permutation(c.minibatches):
                batches = self.minibatch(experience, m)
                update = {} if c.shared_trunk else self.update_critic(batches, critic_rate)
                if step >= c.critic_warmup or c.shared_trunk:
                    update |= self.update_policy(batches, policy_rate, step)
                updates.append(update)
            if c.kl_stop is not None and updates[-1].get("approximate_kl", 0.0) > c.kl_stop:
                break
        names = updates[-1].keys()
        metrics = {name: finite_mean([update[name] for update in updates]) for name in names}
        return metrics | {"updates": len(updates), "learning_rate": policy_rate, "critic_learning_rate": critic_rate}

    def minibatch(self, experience: Experience, m: int) -> list[Experience]:
        """This rank's micro-batches of minibatch `m`, rows of like length together."""
        size = len(experience) // self.config.minibatches
        start = m * size
        parts = self.of_like_length(experience.attention_mask[start : start + size])
        return [experience.rows([start + i for i in part]) for part in parts]

    def of_like_length(self, masks: Tensor) -> list[list[int]]:
        """Micro-batches of this rank's rows, the longest first; the same number on every rank."""
        c, lengths = self.config, masks.sum(1).tolist()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        widths = [lengths[i] for i in order]
        if c.max_tokens_per_batch is not None:
            widths = [max(ranks) for ranks in zip(*self.communicator.gather(widths), strict=True)]
        return [order[part] for part in cut(widths, c.micro_batch_size, c.max_tokens_per_batch)]

    def update_policy(self, batches: list[Experience], rate: float, step: int) -> dict[str, float]:
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
        metrics = self.optimise(self.actor, parts, rate)
        return {"policy_grad_norm": metrics.pop("grad_norm"), **metrics}

    def update_critic(self, batches: list[Experience], rate: float) -> dict[str, float]:
        metrics = self.optimise(self.critic, [LossPart(batches, count_response_tokens, self.value_share)], rate)
        return {"critic_grad_norm": metrics.pop("grad_norm"), **metrics}

    def policy_share(self, output, batch: Experience, denominator: float):
        c, mask, (log_probs, entropy) = self.config, batch.response_mask, output
        clips = dict(clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip)
        loss, metrics = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, denominator, **clips)
        return loss, metrics | {"entropy": keep(entropy, mask).sum() / denominator}

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

    # --- evaluation and state

    @torch.no_grad()
    def evaluate(self):
        """Mean reward, length and share of finished answers on the evaluation prompts, and the texts."""
        if self.eval_data is None:
            return {}, []
        # every rank answers equally many prompts; the copies that fill up are left out
        filled = list(range(len(self.eval_data))) + [0] * (-len(self.eval_data) % self.communicator.world_size)
        mine = list(enumerate(filled))[self.communicator.rank :: self.communicator.world_size]
        prompts = [self.eval_data[i] for _, i in mine]
        rollout = self.answer(prompts, [[self.config.seed, place] for place, _ in mine])  # at every evaluation
        scored, responses = self.judge(prompts, rollout)
        lengths, finished = rollout.response_mask.sum(1).tolist(), rollout.finished.tolist()
        rows = []
        for i, (place, _) in enumerate(mine):
            row = {"prompt": prompts[i].text, "response": responses[i], "reward": scored.total[i].item()}
            row |= {f"reward/{name}": part[i].item() for name, part in scored.parts.items()}
            rows.append(row | {"response_length": lengths[i], "finished": float(finished[i]), "place": place})
        rows = sorted((r for part in self.communicator.gather(rows) for r in part), key=lambda r: r.pop("place"))
        rows = rows[: len(self.eval_data)]
        names = [name for name in rows[0] if name not in ("prompt", "response")]
        metrics = {name: sum(row[name] for row in rows) / len(rows) for name in names}
        return metrics, rows[: self.config.samples]

    def state(self):
        return {"kl_coefficient": self.kl_coefficient, "score_moments": asdict(self.score_moments)}

    def load_state(self, state):
        self.kl_coefficient = state["kl_coefficient"]
        self.score_moments = RunningMoments(**state["score_moments"])

    @contextmanager
    def timed(self, name: str):
        started = time.monotonic()
        yield
        self.times[f"seconds/{name}"] = time.monotonic() - started

    # --- the four models

    def build(self):
        c = self.config
        if c.model is None and self.policy is None:
            raise UserError("PPO starts from a policy that can answer: give --model FOLDER (train_sft.py makes one)")
        self.data = self.dataset(c.train_data, "prompt", c.train_weights)
        self.eval_data = self.dataset(c.eval_data, "prompt")
        self.batches = self.sampler(self.data)
        self.ptx_data = self.dataset(c.ptx_data, "sft")
        if self.ptx_data is not None:
            self.ptx_sampler = BatchSampler(self.ptx_data.lengths, c.batch_size // c.minibatches, c.seed)
        self.kl_coefficient, self.score_moments = c.kl_coefficient, RunningMoments()
        self.temperature = c.temperature if c.temperature > 0 else 1.0

        self.engines = self.load_policy_and_critic()
        self.actor, self.critic = self.engines["actor"], self.engines.get("critic")
        if not has_keys_and_values(self.actor.module):
            kind = self.actor.module.config.model_type
            raise UserError(f"PPO needs a policy whose layers all keep keys and values; {kind} has others")
        self.reference = self.load_reference()
        model_reward = self.load_reward_model() if c.reward_model else None
        self.rewards = load_rewards(c, model_reward, self.runtime.device, self.given_rewards)

    def load_policy_and_critic(self) -> dict[str, Engine]:
        c = self.config
        rows = c.batch_size // c.minibatches // self.communicator.world_size
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
        accumulates = dict(actor=rows > c.micro_batch_size or self.ptx_data is not None)
        accumulates["critic"] = rows > c.micro_batch_size
        return {
            name: self.engine(model, accumulates=accumulates[name], generates=name == "actor")
            for name, model in models.items()
        }

    def load_reference(self) -> Engine | None:
        """A frozen copy of the policy that the run started from; None if there is no KL penalty, or where the actor
        without its adapter is that policy."""
        c = self.config
        if c.kl_coefficient == 0 and c.kl_target is None:
            return None
        if c.lora is not None and not (c.model and is_adapter(c.model)):
            return None
        if self.policy is not None and is_untrained_adapter(self.policy.pretrained_model):
            return None
        start = c.model if self.policy is None else copy.deepcopy(self.policy.pretrained_model)
        return make_engine(self.model(Actor, start), c, self.runtime)

    def load_reward_model(self) -> ModelReward:
        from transformers import AutoTokenizer

        c = self.config
        try:
            theirs = AutoTokenizer.from_pretrained(c.reward_model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the reward model in {c.reward_model} has no tokenizer beside it: copy the policy's there, or give "
                f"the model as --reward_classifiers with --reward_classifier_tokenizer ({str(error).splitlines()[0]})"
            ) from error
        if theirs.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"the reward model in {c.reward_model} has another vocabulary than the policy: train it with the "
                "policy's tokenizer, or give it as --reward_classifiers, which reads texts by its own"
            )
        engine = make_engine(self.model(RewardModel, c.reward_model), c, self.runtime)
        return ModelReward(engine.forward_all, self.runtime.device, self.of_like_length)


def finite_mean(values: list[float]) -> float:
    """The mean of what is finite, so that a skipped update leaves the figures of the others; NaN if nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def before_token(values: Tensor) -> Tensor:
    """The critic's estimate before each token: what it says after the token to the left, `[batch, seq]`."""
    return align(values)


def count_response_tokens(batch: Experience) -> Tensor:
    return batch.response_mask.sum()


def text_targets(batch) -> Tensor:
    return response_targets(batch.loss_mask)


def count_targets(batch) -> Tensor:
    return text_targets(batch).sum()
