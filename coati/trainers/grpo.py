"""Group relative policy optimisation (DeepSeekMath, 2402.03300) and its relatives: Dr. GRPO (2503.20783), RLOO
(2402.14740), REINFORCE++ (2501.03262), ReMax (2310.10505), DAPO (2503.14476), GSPO (2507.18071), CISPO (2506.13585).

One iteration:
    1. the policy answers each of a batch of prompts several times; with dynamic sampling, prompts whose answers all
       earn the same are replaced by further ones
    2. an answer's advantage is what it earned beyond the others of its group: no critic
    3. the policy takes a few steps on a clipped loss

Which options make which algorithm is in docs/grpo.md. Departures from the papers: what dynamic sampling can't replace
within `max_refills` tries stays in the batch, where it adds to the counts but not to the gradient; minibatches and
dropout are as in PPO.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from coati.data.collate import SFTBatch
from coati.errors import UserError
from coati.losses import (
    aggregation_weights,
    clip_scores,
    group_advantages,
    importance_weights,
    kl_divergence,
    penalise_missing_eos,
    punish_overlong,
    returns_to_go,
    shape_rewards,
    whiten,
)
from coati.losses.masking import keep
from coati.models import Actor
from coati.models.base import disable_dropout
from coati.parallel import Engine
from coati.rewards import Scores
from coati.rollout import Experience, Rollout
from coati.rollout.experience import MicroBatches, join_rows, take_rows
from coati.trainers.base import LossPart
from coati.trainers.config import GRPOConfig
from coati.trainers.rollouts import RolloutTrainer, count_response_tokens


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """Answers and what they earned, the rows of a group one after the other.

    Attributes:
        rewards: float32 `[batch]`, as the rewards gave them.
        scores: float32 `[batch]`, as the policy will see them; without the rewards of tokens.
        token_rewards: float32 `[batch, seq]`, 0 outside the response.
        baseline: float32 `[batch]`, for remax the score of the prompt's greedy answer; else 0.
    """

    rewards: Tensor
    scores: Tensor
    token_rewards: Tensor
    baseline: Tensor


class GRPOTrainer(RolloutTrainer):
    """Trains an `Actor`.

    Attributes:
        position: rows of the data, epoch after epoch, that have been drawn.
    """

    config: GRPOConfig
    algorithm = "grpo"

    def train_step(self, step: int) -> tuple[dict[str, float], int]:
        """One iteration."""
        self.times = {}
        self.set_temperature(step)
        rollout, reward_metrics = self.collect(step)
        with self.timed("evaluate"):
            experience, experience_metrics = self.experience(rollout)
        with self.timed("learn"):
            update_metrics = self.learn(experience, step)
        if self.config.refresh_reference and (step + 1) % self.config.refresh_reference == 0:
            self.refresh_reference()
        tokens = self.communicator.sum(int(rollout.attention_mask.sum()))
        return reward_metrics | experience_metrics | update_metrics | self.times, int(tokens)

    # --- 1. the policy answers, the rewards score

    def set_temperature(self, step: int):
        c = self.config
        share = step / max(self.total_steps - 1, 1)
        end = c.temperature if c.final_temperature is None else c.final_temperature
        self.temperature = c.temperature + share * (end - c.temperature)

    def collect(self, step: int) -> tuple[ScoredRollout, dict[str, float]]:
        """This rank's groups, minibatch after minibatch, and what all that were drawn earned."""
        c = self.config
        if c.dynamic_sampling:
            return self.collect_unequal(step)
        self.position = self.batches.position(step)
        rollout, judged = self.answer_and_score(step, self.mine(self.draw([], c.batch_size)))
        equal = self.communicator.sum(self.equal(rollout).sum()).item()
        metrics = self.reward_metrics([(*judged, len(rollout.scores))])
        return rollout, metrics | {"equal_groups": equal / c.batch_size}

    def collect_unequal(self, step: int) -> tuple[ScoredRollout, dict[str, float]]:
        """`collect` with dynamic sampling. All ranks see all groups and choose alike."""
        c, world, rank = self.config, self.communicator.world_size, self.communicator.rank
        kept, spare, drawn, rounds = [], [], [], []
        while len(kept) < c.batch_size and len(rounds) <= c.max_refills:
            drawn += (new := self.draw(drawn, c.batch_size - len(kept)))
            # ranks answer equally many prompts; the copies that fill up are left out
            filled = new + new[:1] * (-len(new) % world)
            rollout, judged = self.answer_and_score(step, filled[rank::world])
            rounds.append((*judged, len(new[rank::world]) * c.group_size))
            dealt = zip(*self.communicator.gather(self.groups(rollout)), strict=True)
            for group in [group for turn in dealt for group in turn][: len(new)]:
                (spare if self.equal(group).item() else kept).append(group)
        chosen = join_rows(self.mine((kept + spare)[: c.batch_size]), self.pad_id, self.runtime.device)
        metrics = {"equal_groups": len(spare) / len(drawn), "refills": len(rounds) - 1}
        return chosen, self.reward_metrics(rounds) | metrics

    def draw(self, before: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        """The next rows of the data, each with how often the iteration has drawn it before."""
        rows = [row for row, _ in before]
        rows += [self.batches.row(self.position + i) for i in range(count)]
        self.position += count
        return [(row, rows[:place].count(row)) for place, row in enumerate(rows)][len(before) :]

    def answer_and_score(self, step: int, drawn: list[tuple[int, int]]) -> tuple[ScoredRollout, tuple[Scores, Rollout]]:
        """A group of answers to each of these rows."""
        c, n = self.config, self.config.group_size
        prompts = [self.data[row] for row, _ in drawn for _ in range(n)]
        seeds = [[c.seed, step, row, repeat * n + i] for row, repeat in drawn for i in range(n)]
        with self.timed("generate"):
            rollout = self.answer(prompts, seeds, replace(c, temperature=self.temperature))
        with self.timed("score"):
            scored, _ = self.judge(prompts, rollout)
            scores = self.shape(scored, rollout)
            baseline = torch.zeros_like(scores)
            if c.advantage == "remax":
                baseline = self.greedy_scores(prompts[::n]).repeat_interleave(n)
        on_tokens = torch.zeros(rollout.input_ids.shape) if scored.per_token is None else scored.per_token
        earned = (scored.total.to(scores), scores, on_tokens.to(scores), baseline)
        return ScoredRollout(*vars(rollout).values(), *earned), (scored, rollout)

    def shape(self, scored: Scores, rollout: Rollout) -> Tensor:
        """The scores of whole answers as the policy will see them, `[batch]`."""
        c, lengths = self.config, rollout.response_mask.sum(1)
        scores = clip_scores(scored.sequence.to(self.runtime.device), c.reward_clip)
        scores = penalise_missing_eos(scores, rollout.finished, c.missing_eos_penalty)
        return punish_overlong(scores, lengths, c.max_new_tokens, c.overlong_buffer, c.overlong_penalty)

    def greedy_scores(self, prompts: list) -> Tensor:
        """What the policy's likeliest answers earn, `[prompts]`."""
        greedy = replace(self.config, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        rollout = self.answer(prompts, [0] * len(prompts), greedy)
        scored, _ = self.judge(prompts, rollout)
        on_tokens = 0 if scored.per_token is None else scored.per_token.sum(1).to(self.runtime.device)
        return self.shape(scored, rollout) + on_tokens

    def equal(self, rollout: ScoredRollout) -> Tensor:
        """Which groups earned the same with all answers, bool `[groups]`: they have nothing to compare."""
        groups = rollout.rewards.reshape(-1, self.config.group_size)
        return (groups == groups[:, :1]).all(1)

    def groups(self, rollout: ScoredRollout) -> list[ScoredRollout]:
        """The groups by themselves, on the CPU."""
        n, whole = self.config.group_size, rollout.to("cpu")
        return [take_rows(whole, list(range(i, i + n))) for i in range(0, len(whole.scores), n)]

    # --- 2. advantages

    @torch.no_grad()
    def experience(self, rollout: ScoredRollout) -> tuple[Experience, dict[str, float]]:
        """Log-probs, rewards and advantages of every response token."""
        c, mask = self.config, rollout.response_mask
        batches = MicroBatches(rollout, self.of_like_length(rollout.attention_mask, self.members), self.members)
        log_probs, _ = self.policy_passes(rollout, batches)
        reference = self.reference_log_probs(batches, log_probs)
        kl = kl_divergence(log_probs, reference, mask, c.kl_estimator)
        in_reward = c.kl_coefficient if c.kl_in == "reward" else 0.0
        rewards = keep(shape_rewards(rollout.scores, kl, mask, in_reward) + rollout.token_rewards, mask)
        advantages = self.advantages(rewards, rollout.baseline, mask)
        _, spread = self.global_moments(advantages, mask)
        corrected = importance_weights(log_probs, rollout.log_probs, mask, c.importance_correction, c.importance_cap)
        counted = mask & rollout.finished[:, None] if c.mask_truncated else mask
        advantages = advantages * corrected  # weights that are not negative may as well stand here
        tokens = (rollout.input_ids, rollout.attention_mask, counted, log_probs, reference, rewards, advantages)
        experience = Experience(*tokens, rollout.scores)
        metrics = {"advantage_std": spread, "temperature": self.temperature}
        if c.importance_correction != "none":
            metrics["importance_weight"], _ = self.global_moments(corrected, mask)
        return experience, metrics | self.kl_metrics(rollout, log_probs, reference)

    def advantages(self, rewards: Tensor, baseline: Tensor, mask: Tensor) -> Tensor:
        """`[batch, seq]`, 0 outside the response."""
        c = self.config
        if c.advantage == "reinforce++":
            advantages = returns_to_go(rewards, mask, 1.0)
        else:
            options = dict(baseline=baseline, min_std=c.advantage_std_floor)
            of_answers = group_advantages(rewards.sum(1), c.group_size, c.advantage, **options)
            advantages = of_answers[:, None] * mask
        if c.advantage.startswith("reinforce++"):
            advantages = whiten(advantages, mask, *self.global_moments(advantages, mask))
        return advantages

    # --- 3. the policy learns

    def update(self, batches: list[Experience], step: int) -> dict[str, float]:
        c = self.config
        answers = self.communicator.sum(float(sum(batch.response_mask.any(1).sum() for batch in batches))).item()
        share = partial(self.loss_share, answers=max(answers, 1.0))
        options = {"temperature": self.temperature, "with_entropy": "trained" if c.entropy_coefficient else True}
        part = LossPart(batches, count_response_tokens, share, options, targets=lambda b: b.response_mask)
        metrics = self.optimise(self.actor, [part], self.learning_rate(c.learning_rate))
        return {"policy_grad_norm": metrics.pop("grad_norm"), **metrics}

    def loss_share(self, output, batch: Experience, denominator: float, answers: float):
        """The policy's loss, the KL penalty and the bonus for entropy; `answers` are those of the whole step."""
        c, mask, (log_probs, entropy) = self.config, batch.response_mask, output
        weights = aggregation_weights(mask, c.aggregation, denominator, answers, c.max_new_tokens)
        loss, metrics = self.policy_share(output, batch, denominator, kind=c.policy_loss, weights=weights)
        if c.kl_coefficient and c.kl_in == "loss":
            kl = kl_divergence(log_probs, batch.reference_log_probs, mask, c.kl_estimator)
            loss = loss + c.kl_coefficient * (weights * kl).sum() / denominator
        if c.entropy_coefficient:
            loss = loss - c.entropy_coefficient * keep(entropy, mask).sum() / denominator
        return loss, metrics

    def refresh_reference(self):
        with self.actor.full() as policy:
            self.reference.module.load_state_dict(policy.state_dict())

    # --- state and models

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]
        self.batches.start = (self.step, self.position)

    def build(self):
        c, self.position = self.config, 0
        if c.model is None:
            raise UserError("GRPO starts from a policy that can answer: give --model FOLDER (train_sft.py makes one)")
        super().build()
        if c.refresh_reference:
            self.frozen = {"reference": self.reference}
        self.members = c.members
        if c.share_prompts:
            self.check_packing(self.actor, *self.longest_group())

    def longest_group(self) -> tuple[SFTBatch, Tensor]:
        """The longest prompt with answers of the greatest length, and which tokens these are."""
        prompt, last = list(self.data[int(self.data.lengths.argmax())].input_ids), self.config.max_new_tokens
        rows = [prompt + [(i + k) % len(self.tokenizer) for i in range(last)] for k in range(self.members)]
        ids = torch.tensor(rows, device=self.runtime.device)
        answers = (torch.arange(ids.shape[1], device=ids.device) >= len(prompt)).expand_as(ids)
        return SFTBatch(ids, torch.ones_like(answers), answers), answers

    def load_models(self) -> dict[str, Engine]:
        actor = self.model(Actor, self.source("actor") or self.config.model, lora=self.config.lora)
        disable_dropout(actor)
        return {"actor": self.engine(actor, accumulates=self.accumulates, generates=True)}

    def load_reference(self, start) -> Engine | None:
        refreshed = self.source("reference") if self.config.refresh_reference else None
        return super().load_reference(refreshed if refreshed and refreshed.is_dir() else start)
