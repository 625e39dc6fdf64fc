"""What PPO and GRPO share: prompts are answered, the answers scored, and a policy takes a few steps on them."""

import math
import time
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.data import cut
from coati.errors import UserError
from coati.losses import kl_divergence, masked_sums, moments, policy_loss
from coati.losses.masking import keep
from coati.models import RewardModel
from coati.parallel import Engine, make_engine
from coati.parallel.config import resolve_precision
from coati.rewards import ModelReward, PendingScores, Scores, load_rewards
from coati.rollout import Completion, Experience, GenerationConfig, Rollout, generate
from coati.rollout.experience import MicroBatches
from coati.rollout.generate import has_keys_and_values
from coati.rollout.prompts import eos_ids, response_texts
from coati.trainers.base import Trainer
from coati.trainers.config import RolloutConfig


class RolloutTrainer(Trainer):
    """Trains an `Actor` on its own answers. An algorithm fills in `train_step`, `load_models` and `update`.

    Attributes:
        actor: the policy; reference: what its KL is measured to, None if there is no penalty or where the actor without
            its adapter is that policy.
        temperature: of the distribution that is sampled from and trained.
        times: seconds that the iteration's phases took.
        pending: the scores of the answers that were given last.
    """

    config: Any  # of a class derived from RolloutConfig
    headline = ("reward", True)
    learns_responses = False  # those of its data
    pending: PendingScores | None = None

    def __init__(self, config: RolloutConfig, runtime, *, rewards=()):
        self.given_rewards = rewards
        super().__init__(config, runtime)

    # --- the policy answers

    def mine(self, batch: list) -> list:
        """This rank's part of a global batch, minibatch after minibatch."""
        world, rank, c = self.communicator.world_size, self.communicator.rank, self.config
        return [x for m in range(c.minibatches) for x in batch[m :: c.minibatches][rank::world]]

    def answer(self, prompts: list, seeds: list | None = None, sampling: GenerationConfig | None = None) -> Rollout:
        """One answer a prompt, drawn with all weights at hand, as `sampling` says (the run's settings if not given).

        Rewards that work in processes of their own begin with an answer as soon as it has ended.
        """
        columns, self.pending = columns_of(prompts) if self.rewards.pooled else {}, self.rewards.start()

        def score(i: int, completion: Completion):
            [text] = self.texts([completion.ids])
            self.pending.submit(i, prompts[i].text, text, {name: values[i] for name, values in columns.items()})

        with self.actor.full() as model:
            return generate(
                model,
                [prompt.input_ids for prompt in prompts],
                sampling or self.config,
                eos_ids=eos_ids(self.tokenizer, model),
                pad_id=self.pad_id,
                seeds=seeds,
                tokenizer=self.tokenizer,
                batch_size=self.config.generation_batch_size,
                on_done=score if self.rewards.pooled else None,
            )

    def texts(self, responses: list[list[int]]) -> list[str]:
        """What rewards and reports read of sampled ids."""
        ends = eos_ids(self.tokenizer, self.actor.module)
        return [text.strip() for text in response_texts(self.tokenizer, responses, ends)]

    # --- the rewards score

    def judge(self, prompts: list, rollout: Rollout) -> tuple[Scores, list[str]]:
        """What all rewards give, and the answers' texts."""
        responses = self.texts(rollout.response_ids())
        columns = columns_of(prompts)
        for name in ("input_ids", "attention_mask", "response_mask"):
            columns[name] = getattr(rollout, name)
        pending = self.pending or self.rewards.start()
        self.pending = None
        return pending.finish([p.text for p in prompts], responses, **columns), responses

    def reward_metrics(self, judged: list[tuple[Scores, Rollout, int]]) -> dict[str, float]:
        """Of what was answered and scored in an iteration.

        Args:
            judged: scores, answers, and how many of these count, the first ones.
        """
        shares, sums, seconds = [], torch.zeros(3, dtype=torch.float64), dict.fromkeys(judged[0][0].seconds, 0.0)
        for scored, rollout, n in judged:
            total, ended = scored.total[:n], rollout.finished[:n]
            sums += masked_sums(total, torch.ones_like(total, dtype=torch.bool))
            share = {f"reward/{name}": part[:n].sum() for name, part in scored.parts.items()}
            share |= {"response_length": rollout.response_mask[:n].sum()}
            shares.append(share | {"finished": ended.sum(), "truncated": (~ended).sum()})
            seconds = {name: before + scored.seconds[name] for name, before in seconds.items()}
        sums = self.communicator.sum(sums)
        mean, std = moments(sums)
        metrics = {name: value / sums[0].item() for name, value in self.communicator.sum_metrics(shares).items()}
        metrics |= {f"seconds/reward/{name}": value for name, value in seconds.items()}
        return {"reward": mean, "reward_std": std, **metrics}

    # --- what the models say of the answers

    def policy_passes(self, rollout: Rollout, batches: MicroBatches) -> tuple[Tensor, list]:
        """Log-probs of the policy that sampled, `[batch, seq]`, and all that it gave for the micro-batches.

        In fp32 they are those noted at sampling, up to rounding: a few rows are computed again to show it. In lower
        precision, on a sharded model and in vLLM they round differently, and all are.
        """
        same = self.sampling_is_training()
        checked = batches.sample(self.step) if same else batches
        options = {"temperature": self.temperature}
        outputs = self.actor.forward_all([self.inputs(b, b.response_mask) | options for b in checked])
        log_probs = checked.restore([first(output) for output in outputs])
        self.rollout_kl = self.compare(rollout, log_probs, rollout.response_mask & checked.mask()[:, None])
        return (rollout.log_probs if same else log_probs), outputs

    def sampling_is_training(self) -> bool:
        """Whether log-probs at sampling are those of training but for rounding."""
        c = self.config
        return resolve_precision(c) == "fp32" and c.model_parallel_size == 1 and c.rollout_engine == "coati"

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
        """Those of the reference, `[batch, seq]`; the policy's own where there is no penalty."""
        if not self.config.needs_reference:
            return log_probs
        options = {"temperature": self.temperature} | ({} if self.reference else {"adapter": False})
        inputs = [self.inputs(b, b.response_mask) | options for b in batches]
        return batches.restore([first(output) for output in (self.reference or self.actor).forward_all(inputs)])

    def kl_metrics(self, rollout: Rollout, log_probs: Tensor, reference: Tensor) -> dict[str, float]:
        """Estimates of the KL to the reference."""
        mask, answers = rollout.response_mask, self.config.answers
        tokens = self.communicator.sum(mask.sum()).item()
        shares = {}
        for name in ("k1", "k3"):
            shares[f"kl/{name}"] = kl_divergence(log_probs, reference, mask, name).sum() / answers
        penalised = kl_divergence(log_probs, reference, mask, self.config.kl_estimator).sum()
        shares |= {"kl": penalised / answers, "kl_per_token": penalised / tokens}
        return {"rollout_kl": self.rollout_kl} | self.communicator.sum_metrics([shares])

    def global_moments(self, x: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and standard deviation over all ranks' response tokens."""
        return moments(self.communicator.sum(masked_sums(x, mask)))

    # --- the policy learns

    def learn(self, experience: Experience, step: int) -> dict[str, float]:
        """`ppo_epochs` passes of `minibatches` steps; stops early when the policy has moved `kl_stop` nats a token."""
        c, updates = self.config, []
        for epoch in range(c.ppo_epochs):
            for m in np.random.default_rng([c.seed, step, epoch]).permutation(c.minibatches):
                updates.append(self.update(self.minibatch(experience, m), step))
            if c.kl_stop is not None and updates[-1].get("approximate_kl", 0.0) > c.kl_stop:
                break
        names = updates[-1].keys()
        metrics = {name: finite_mean([update[name] for update in updates]) for name in names}
        return metrics | {"updates": len(updates), "learning_rate": self.learning_rate(c.learning_rate)}

    def update(self, batches: list[Experience], step: int) -> dict[str, float]:
        """One optimiser step of every model, on this rank's micro-batches of a minibatch."""
        raise NotImplementedError

    def minibatch(self, experience: Experience, m: int) -> list[Experience]:
        """This rank's micro-batches of minibatch `m`, rows of like length together."""
        size = len(experience) // self.config.minibatches
        start = m * size
        parts = self.of_like_length(experience.attention_mask[start : start + size], self.members)
        return [experience.rows([start + i for i in part]) for part in parts]

    def of_like_length(self, masks: Tensor, members: int = 1) -> list[list[int]]:
        """Micro-batches of this rank's rows, the longest first; the same number on every rank. As many rows as a group
        has `members` stay together: a micro-batch has the first ones of its groups, the second ones and so on."""
        c, lengths = self.config, masks.sum(1).view(-1, members).sum(1).tolist()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        widths = [lengths[i] for i in order]
        if c.max_tokens_per_batch is not None:
            widths = [max(ranks) for ranks in zip(*self.communicator.gather(widths), strict=True)]
        parts = [order[part] for part in cut(widths, c.micro_batch_size // members, c.max_tokens_per_batch)]
        return [[i * members + k for k in range(members) for i in part] for part in parts]

    def policy_share(self, output, batch: Experience, denominator: float, **how):
        """The share of the policy's loss, and of the entropy, nats a token."""
        c, mask, (log_probs, entropy) = self.config, batch.response_mask, output
        how |= dict(clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip)
        loss, metrics = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, denominator, **how)
        return loss, metrics | {"entropy": keep(entropy.detach(), mask).sum() / denominator}

    # --- evaluation

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

    @contextmanager
    def timed(self, name: str):
        started = time.monotonic()
        yield
        self.times[f"seconds/{name}"] = self.times.get(f"seconds/{name}", 0.0) + time.monotonic() - started

    # --- data and models

    def longest_sequence(self):
        """A prompt and its answer."""
        prompts = [int(data.lengths.max()) for data in (self.data, self.eval_data) if data is not None]
        return max(prompts) + self.config.max_new_tokens

    def build(self):
        c, kind = self.config, self.algorithm.upper()
        self.data = self.dataset(c.train_data, "prompt", c.train_weights)
        self.eval_data = self.dataset(c.eval_data, "prompt")
        self.batches = self.sampler(self.data)
        self.temperature = c.temperature if c.temperature > 0 else 1.0
        self.times: dict[str, float] = {}
        self.engines = self.load_models()
        self.actor = self.engines["actor"]
        if not has_keys_and_values(self.actor.module):
            model = self.actor.module.config.model_type
            raise UserError(f"{kind} needs a policy whose layers all keep keys and values; {model} has others")
        self.reference = self.load_reference(c.model)
        model_reward = self.load_reward_model() if c.reward_model else None
        self.rewards = load_rewards(c, model_reward, self.runtime.device, self.given_rewards)

    def load_models(self) -> dict[str, Engine]:
        """The trained models by name, with `actor` first."""
        raise NotImplementedError

    @property
    def accumulates(self) -> bool:
        """Whether a minibatch may take several micro-batches."""
        c = self.config
        return c.answers // c.minibatches // self.communicator.world_size > c.micro_batch_size

    def load_reference(self, start) -> Engine | None:
        return self.frozen_copy(start) if self.config.needs_reference else None

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


def columns_of(prompts: list) -> dict[str, list]:
    """The data's other fields of each prompt's row, None where a row lacks one."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def first(output):
    """The log-probs, of what an actor or one with a value head gives."""
    return output[0] if isinstance(output, tuple) else output


def finite_mean(values: list[float]) -> float:
    """The mean of what is finite, so that a skipped update leaves the figures of the others; NaN if nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def count_response_tokens(batch: Experience) -> Tensor:
    return batch.response_mask.sum()
