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

The teacher may read another prompt than the student, such as one with a demonstration, and it may be the student's own
start, or an average of its weights (self-distillation: SDFT, Shenfeld et al., 2601.19897). Both models see the same
response, at other positions, and only its tokens are compared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.data import TokenSequence, collate_sft
from coati.data.collate import SFTBatch
from coati.data.teaching import Teaching
from coati.errors import UserError
from coati.losses import distillation_loss, response_targets, without_first
from coati.losses.distillation import Divergence
from coati.models.adapters import vocabulary
from coati.models.base import disable_dropout
from coati.models.distillation import Student, Teacher
from coati.rewards import Scorer
from coati.rollout import RolloutBatch
from coati.run_layout import ACTOR, TEACHER
from coati.samples import Sample
from coati.trainers.batching import in_batch_order, model_inputs
from coati.trainers.config import SELF, DistillConfig
from coati.trainers.iteration import Clock
from coati.trainers.policy import Policy
from coati.trainers.rollouts import RolloutTrainer


@dataclass(frozen=True)
class Reading:
    """A micro-batch of responses as each model reads them: row for row the same response, after a prompt of its own."""

    student: SFTBatch
    teacher: SFTBatch


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
        readings, metrics = self.own_responses(k)
        readings += self.demonstrated(k)
        with clock("teach"):
            lessons = self.teach(readings)
        with clock("learn"), self.actor.update(rate) as update:
            update.add(lessons, self.inputs, self.loss, lambda lesson: lesson.targets.sum())
        if self.config.algorithm.teacher_ema:
            with clock("average"), self.actor.full() as student:
                self.teacher.average_in(student, self.config.algorithm.teacher_ema)
        return metrics | update.metrics | clock.seconds | {"learning_rate": rate, "tokens": update.tokens}

    def own_responses(self, k: int) -> tuple[list[Reading], dict[str, float]]:
        """This rank's micro-batches of the student's responses in iteration k, and metrics of them."""
        if self.config.prompts == 0:
            return [], {}
        batch, metrics = self.rollouts.next(k)
        of_teacher = self.read_by_teacher(batch.samples, self.data)
        parts = self.split(batch, of_teacher)
        metrics["rollout_kl"] = self.policy.rollout_kl_of_some(batch, parts, k)
        return self.readings(batch, of_teacher, parts), metrics

    def read_by_teacher(self, samples: list[Sample], data) -> list[TokenSequence] | None:
        """What the teacher reads of responses to these prompts; None where it is what the student reads."""
        if self.config.algorithm.teacher_prompt is None:
            return None
        return [after_prompt(data[sample.row].teacher_ids, sample) for sample in samples]

    def split(self, batch: RolloutBatch, of_teacher: list[TokenSequence] | None) -> list[list[int]]:
        """This rank's micro-batches, rows of a batch, for both models."""
        if of_teacher is None:
            return self.batching.split(batch.lengths)
        longer = [max(length, len(other)) for length, other in zip(batch.lengths, of_teacher, strict=True)]
        return self.batching.split(longer)

    def readings(
        self, batch: RolloutBatch, of_teacher: list[TokenSequence] | None, parts: list[list[int]]
    ) -> list[Reading]:
        """The micro-batches as both models read them."""
        students = [to_learn(batch.rows(part)) for part in parts]
        if of_teacher is None:
            return [Reading(student, student) for student in students]
        teachers = [collate_sft([of_teacher[row] for row in part], self.factory.pad_id) for part in parts]
        device = self.runtime.device
        return [Reading(student, teacher.to(device)) for student, teacher in zip(students, teachers, strict=True)]

    def demonstrated(self, k: int) -> list[Reading]:
        """This rank's micro-batches of the data's responses in iteration k."""
        if self.demonstrations is None:
            return []
        rows = self.demonstration_order.batch(k)[self.config.prompts :]
        parts = self.batching.shard(rows, self.demonstrations.lengths)
        batches = [collate_sft([self.demonstrations[row] for row in part], self.factory.pad_id) for part in parts]
        batches = [batch.to(self.runtime.device) for batch in batches]
        return [Reading(batch, batch) for batch in batches]

    def teach(self, readings: list[Reading]) -> list[Lesson]:
        """The responses with what the teacher says of them."""
        skipped = self.config.algorithm.skip_tokens
        found = self.teacher.forward_all(
            [model_inputs(reading.teacher, learned_tokens(reading.teacher, skipped)) for reading in readings]
        )
        return [
            Lesson(batch.input_ids, batch.attention_mask, learned_tokens(batch, skipped), states)
            for batch, states in zip((reading.student for reading in readings), found, strict=True)
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
        """With the divergence at the student's own responses, in nats per token that is learned: of each row its mean,
        None where it has no such token."""
        batch = RolloutBatch.from_samples(samples, self.factory.pad_id, 1.0, self.runtime.device)
        of_teacher = self.read_by_teacher(samples, self.eval_data)
        parts = self.split(batch, of_teacher)
        lessons = self.teach(self.readings(batch, of_teacher, parts))
        found = in_batch_order(
            parts, self.actor.forward_all([self.inputs(lesson) for lesson in lessons]), batch.input_ids.shape
        )
        counts = learned_tokens(to_learn(batch), self.config.algorithm.skip_tokens).sum(1).tolist()
        means = [total / n if n else None for total, n in zip(found.sum(1).tolist(), counts, strict=True)]
        rows = super().sample_rows(samples)
        return [row | {"divergence": mean} for row, mean in zip(rows, means, strict=True)]

    # --- building

    def build(self):
        c, a = self.config, self.config.algorithm
        if a.teacher is None:
            raise UserError("distillation needs a teacher: give --teacher FOLDER")
        if a.teacher != SELF:
            self.factory.check_teacher_vocabulary(a.teacher)
        self.demonstrations = None
        if self.learns_responses:
            self.demonstrations = self.factory.dataset(c.data.train_data, "sft", c.data.train_weights)
            self.demonstration_order, _ = self.factory.order(self.demonstrations, self.start)
        super().build()
        self.policy = Policy(self.actor, c, self.ranks)
        self.divergence = Divergence(a.divergence, a.beta, a.distill_temperature)
        if a.teacher_ema:
            self.frozen = {TEACHER: self.teacher}

    def prompts(self, sources, weights=None):
        template = self.config.algorithm.teacher_prompt
        return self.factory.dataset(sources, "prompt", weights, None if template is None else Teaching(template))

    def build_models(self):
        c, a = self.config, self.config.algorithm
        start = self.folder.model_in_checkpoint(ACTOR) or c.model.path
        student = self.factory.model(Student, start, lora=c.model.lora)
        disable_dropout(student)
        teacher = self.load_teacher(student)
        rows = [vocabulary(model.transformer) for model in (student, teacher)]
        if c.parallel.splits_vocabulary and rows[0] != rows[1]:
            raise UserError(
                f"the student's output layer has {rows[0]} rows and the teacher's {rows[1]}, so processes would hold "
                "other ranges of the vocabulary: leave out tensor_parallel"
            )
        if a.teacher_ema:
            self.teacher = self.factory.averaged_teacher(teacher, student)
        else:
            self.teacher = self.factory.frozen_teacher(teacher)
        return {ACTOR: self.factory.trained(student, accumulates=self.accumulates(), generates=True)}

    def load_teacher(self, student: Student) -> Teacher:
        """The teacher as this run begins with it; an average's weights are in float32."""
        c, a = self.config, self.config.algorithm
        if a.teacher != SELF:
            return self.factory.model(Teacher, a.teacher, own_config=True)
        if not a.teacher_ema:
            return self.factory.model(Teacher, c.model.path)
        stored = self.folder.model_in_checkpoint(TEACHER)
        start = stored if stored is not None and stored.is_dir() else c.model.path
        teacher = self.factory.model(Teacher, start, lora=c.model.lora, dtype=torch.float32)
        if start == c.model.path and c.model.lora is not None:  # new adapters, which are drawn at random
            adapters = {name: p.data for name, p in student.named_parameters() if p.requires_grad}
            teacher.load_state_dict(adapters, strict=False)
        return teacher

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


def after_prompt(prompt: list[int], sample: Sample) -> TokenSequence:
    """A sample's response after another prompt."""
    start = sample.response_mask.index(True)
    mask = [False] * len(prompt) + sample.response_mask[start:]
    return TokenSequence(prompt + sample.tokens[start:], mask)


def learned_tokens(batch: SFTBatch, skipped: int) -> Tensor:
    """The responses' tokens without the first ones, bool `[batch, seq]`."""
    return without_first(response_targets(batch.loss_mask), skipped)
