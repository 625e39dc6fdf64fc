"""Distillation: a student learns a teacher's distributions over the vocabulary, not only tokens drawn from them (GKD,
Agarwal et al., 2306.13649).

One iteration:
    1. the student responds to a share of a batch's prompts (on-policy, at its own mistakes); for the other rows the
       data's responses are taken
    2. the teacher reads all responses
    3. one optimizer step on the mean, over all response tokens, of the divergence of the two distributions that the
       token could have been drawn from

With a share of 1 and `reverse` that is on-policy distillation by the reverse KL per token; with a share of 0 and
`forward`, classic distillation on given responses. As in the paper, no gradient goes through the sampling. Departures:
the share is taken of every batch, by position, where the paper decides by chance for a whole batch; dropout is off, so
that the trainer's log-probs are the sampler's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.data import collate_sft
from coati.data.collate import SFTBatch
from coati.errors import UserError
from coati.losses import distillation_loss, response_targets
from coati.losses.distillation import Divergence
from coati.models.adapters import vocabulary
from coati.models.base import disable_dropout
from coati.models.distillation import Student, Teacher
from coati.rewards import Scorer
from coati.rollout import RolloutBatch
from coati.run_layout import ACTOR
from coati.trainers.batching import in_batch_order, model_inputs
from coati.trainers.config import DistillConfig
from coati.trainers.iteration import Clock
from coati.trainers.policy import Policy
from coati.trainers.rollouts import RolloutTrainer


@dataclass(frozen=True)
class Lesson:
    """A micro-batch of responses, and what the teacher says of them.

    Attributes:
        input_ids, attention_mask: `[batch, seq]`, padded on the right.
        targets: bool `[batch, seq]`, the tokens that the student learns.
        teacher_states: `[tokens, width]`, of which the teacher's output layer makes the targets' distributions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    teacher_states: Tensor


class DistillTrainer(RolloutTrainer):
    """Trains a `Student`.

    Attributes:
        data: the prompts; demonstrations: the same data with its responses, None where all are the student's own.
        demonstration_order: the rows of each iteration, of which the last ones are learned with their responses. It is
            that of the prompts, where both are made of the same rows (none is too long for one of them).
        teacher: its engine; policy: what is asked of the student.
    """

    config: DistillConfig
    algorithm = "distill"
    best_metric = ("divergence", False)

    @property
    def learns_responses(self):
        return self.config.algorithm.on_policy_share < 1

    def step(self, k):
        """One iteration."""
        clock, rate = Clock(), self.learning_rate(k, self.config.optimizer.learning_rate)
        responses, metrics = self.own_responses(k)
        responses += self.demonstrated(k)
        with clock("teach"):
            lessons = self.teach(responses)
        with clock("learn"), self.actor.update(rate) as update:
            update.add(lessons, self.inputs, self.loss, lambda lesson: lesson.targets.sum())
        return metrics | update.metrics | clock.seconds | {"learning_rate": rate, "tokens": update.tokens}

    def own_responses(self, k: int) -> tuple[list[SFTBatch], dict[str, float]]:
        """This rank's micro-batches of the student's responses in iteration k, and metrics of them."""
        if self.config.prompts == 0:
            return [], {}
        batch, metrics = self.rollouts.next(k)
        parts = self.batching.split(batch.lengths)
        metrics["rollout_kl"] = self.policy.rollout_kl_of_some(batch, parts, k)
        return [to_learn(batch.rows(part)) for part in parts], metrics

    def demonstrated(self, k: int) -> list[SFTBatch]:
        """This rank's micro-batches of the data's responses in iteration k."""
        if self.demonstrations is None:
            return []
        rows = self.demonstration_order.batch(k)[self.config.prompts :]
        parts = self.batching.shard(rows, self.demonstrations.lengths)
        batches = [collate_sft([self.demonstrations[row] for row in part], self.factory.pad_id) for part in parts]
        return [batch.to(self.runtime.device) for batch in batches]

    def teach(self, batches: list[SFTBatch]) -> list[Lesson]:
        """The batches with what the teacher says of their responses."""
        targets = [response_targets(batch.loss_mask) for batch in batches]
        found = self.teacher.forward_all([model_inputs(*pair) for pair in zip(batches, targets, strict=True)])
        return [
            Lesson(batch.input_ids, batch.attention_mask, target, states)
            for batch, target, states in zip(batches, targets, found, strict=True)
        ]

    def inputs(self, lesson: Lesson) -> dict[str, Any]:
        """What the student is called with."""
        of_teacher = dict(teacher=self.teacher.module, teacher_states=lesson.teacher_states)
        return model_inputs(lesson, lesson.targets, divergence=self.divergence, **of_teacher)

    def loss(self, divergences: Tensor, lesson: Lesson, denominator: float):
        return distillation_loss(divergences, lesson.targets, denominator)

    # --- state

    def state(self):
        return {}  # the rows of an iteration follow from its number and those before it

    def load_state(self, state):
        """There is nothing to load."""

    # --- evaluation

    @torch.no_grad()
    def sample_rows(self, samples):
        """With the divergence at the student's own responses, in nats per token: of each row its mean."""
        batch = RolloutBatch.from_samples(samples, self.factory.pad_id, 1.0, self.runtime.device)
        parts = self.batching.split(batch.lengths)
        lessons = self.teach([to_learn(batch.rows(part)) for part in parts])
        found = in_batch_order(
            parts, self.actor.forward_all([self.inputs(lesson) for lesson in lessons]), batch.input_ids.shape
        )
        means = (found.sum(1) / batch.response_mask.sum(1)).tolist()
        rows = super().sample_rows(samples)
        return [row | {"divergence": mean} for row, mean in zip(rows, means, strict=True)]

    # --- building

    def build(self):
        c, a = self.config, self.config.algorithm
        if a.teacher is None:
            raise UserError("distillation needs a teacher: give --teacher FOLDER")
        self.factory.check_teacher_vocabulary(a.teacher)
        self.demonstrations = None
        if self.learns_responses:
            self.demonstrations = self.factory.dataset(c.data.train_data, "sft", c.data.train_weights)
            self.demonstration_order, _ = self.factory.order(self.demonstrations, self.start)
        super().build()
        self.policy = Policy(self.actor, c, self.ranks)
        self.divergence = Divergence(a.divergence, a.beta, a.distill_temperature)

    def build_models(self):
        c, a = self.config, self.config.algorithm
        start = self.folder.model_in_checkpoint(ACTOR) or c.model.path
        student = self.factory.model(Student, start, lora=c.model.lora)
        disable_dropout(student)
        teacher = self.factory.model(Teacher, a.teacher, own_config=True)
        rows = [vocabulary(model.transformer) for model in (student, teacher)]
        if c.parallel.splits_vocabulary and rows[0] != rows[1]:
            raise UserError(
                f"the student's output layer has {rows[0]} rows and the teacher's {rows[1]}, so processes would hold "
                "other ranges of the vocabulary: leave out tensor_parallel"
            )
        self.teacher = self.factory.frozen_teacher(teacher)
        return {ACTOR: self.factory.trained(student, accumulates=self.accumulates(), generates=True)}

    def accumulates(self):
        return self.demonstrations is not None or super().accumulates()

    def build_scorer(self):
        return super().build_scorer() if self.config.rewards or self.given_rewards else Scorer([])

    def longest_sequence(self):
        demonstrated = 0 if self.demonstrations is None else int(self.demonstrations.lengths.max())
        return max(super().longest_sequence(), demonstrated)


def to_learn(batch: RolloutBatch) -> SFTBatch:
    """Sampled responses as if they were demonstrated."""
    return SFTBatch(batch.input_ids, batch.attention_mask, batch.response_mask)
