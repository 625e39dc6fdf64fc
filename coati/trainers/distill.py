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

from dataclasses import dataclass, replace
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
from coati.parallel import Engine
from coati.rewards import Scorer
from coati.rollout import RolloutBatch
from coati.run_layout import ACTOR, TEACHER
from coati.samples import Sample
from coati.trainers.batching import Part, in_batch_order, model_inputs
from coati.trainers.config import SDPO, SELF, DistillConfig
from coati.trainers.iteration import Clock
from coati.trainers.policy import Policy
from coati.trainers.rollouts import RolloutTrainer, after_prompt


def distill_trainer(config: DistillConfig, runtime, **options) -> "DistillTrainer":
    """The trainer of `config.algorithm`."""
    from coati.trainers.sdpo import SDPOTrainer

    kind = SDPOTrainer if isinstance(config.algorithm, SDPO) else DistillTrainer
    return kind(config, runtime, **options)


@dataclass(frozen=True)
class Reading:
    """A micro-batch of responses as each model reads them: row for row the same response, after a prompt of its own.

    Attributes:
        name: of the rows' teacher; None where there is only one.
        is_real: False for rows that fill up (`Part`), of which the loss masks have nothing.
    """

    student: SFTBatch
    teacher: SFTBatch
    name: str | None
    is_real: bool


@dataclass(frozen=True)
class Lesson:
    """A micro-batch of responses, and what the teacher says of them.

    Attributes:
        input_ids, attention_mask: `[batch, seq]`, padded on the right.
        targets: bool `[batch, seq]`, the tokens that the student learns.
        teacher_states: `[tokens, width]`, of which the teacher's output layer makes the targets' distributions.
        name: of the teacher.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    teacher_states: Tensor
    name: str | None


class DistillTrainer(RolloutTrainer):
    """Trains a `Student`.

    Attributes:
        data: the prompts; demonstrations: the same data with its responses, None where all are the student's own.
        demonstration_order: the rows of each iteration, of which the last ones are learned with their responses. It is
            that of the prompts, where both are made of the same rows (none is too long for one of them).
        teachers: their engines, by the names that rows have for them; vocabularies: rows of their embeddings.
        policy: what is asked of the student.
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
                self.teachers[None].average_in(student, self.config.algorithm.teacher_ema)
        tokens = sum(reading.student.attention_mask.sum() for reading in readings if reading.is_real)
        metrics |= update.metrics | clock.seconds
        return metrics | {"learning_rate": rate, "tokens": self.ranks.sum(float(tokens)).item()}

    def own_responses(self, k: int) -> tuple[list[Reading], dict[str, float]]:
        """This rank's micro-batches of the student's responses in iteration k, and metrics of them."""
        if self.config.prompts == 0:
            return [], {}
        batch, metrics = self.rollouts.next(k)
        of_teacher = self.read_by_teacher(batch.samples, self.data)
        parts = self.split(batch, of_teacher, self.data)
        metrics["rollout_kl"] = self.policy.rollout_kl_of_some(batch, [part.rows for part in parts], k)
        return self.readings(batch, of_teacher, parts), metrics

    def read_by_teacher(self, samples: list[Sample], data) -> list[TokenSequence] | None:
        """What the teacher reads of responses to these prompts; None where it is what the student reads."""
        if self.config.algorithm.teacher_prompt is None:
            return None
        return [after_prompt(data[sample.row].teacher_ids, sample) for sample in samples]

    def split(self, batch: RolloutBatch, of_teacher: list[TokenSequence] | None, data) -> list[Part]:
        """This rank's micro-batches, rows of a batch, for both models."""
        lengths = batch.lengths
        if of_teacher is not None:
            lengths = [max(length, len(other)) for length, other in zip(lengths, of_teacher, strict=True)]
        if len(self.teachers) == 1:
            [name] = self.teachers
            return [Part(rows, name) for rows in self.batching.split(lengths)]
        return self.batching.split_by_teacher(lengths, data.teachers_of([sample.row for sample in batch.samples]))

    def readings(self, batch: RolloutBatch, of_teacher: list[TokenSequence] | None, parts: list[Part]) -> list[Reading]:
        """The micro-batches as both models read them."""
        found = []
        for part in parts:
            student = teacher = to_learn(batch.rows(part.rows))
            if of_teacher is not None:
                rows = [of_teacher[row] for row in part.rows]
                teacher = collate_sft(rows, self.factory.pad_id).to(self.runtime.device)
            found.append(reading_of(part, student, teacher))
        return found

    def demonstrated(self, k: int) -> list[Reading]:
        """This rank's micro-batches of the data's responses in iteration k."""
        if self.demonstrations is None:
            return []
        rows = self.demonstration_order.batch(k)[self.config.prompts :]
        lengths = self.demonstrations.lengths
        shard = self.batching.shard(rows, lengths)
        if len(self.teachers) == 1:
            [name] = self.teachers
            parts = [Part(rows, name) for rows in shard]
        else:
            own = [row for rows in shard for row in rows]
            names = self.demonstrations.teachers_of(own)
            places = self.batching.split_by_teacher([int(lengths[row]) for row in own], names)
            parts = [replace(part, rows=[own[place] for place in part.rows]) for part in places]
        found = []
        for part in parts:
            batch = collate_sft([self.demonstrations[row] for row in part.rows], self.factory.pad_id)
            batch = batch.to(self.runtime.device)
            found.append(reading_of(part, batch, batch))
        return found

    def teach(self, readings: list[Reading]) -> list[Lesson]:
        """The responses with what their teachers say of them."""
        skipped = self.config.algorithm.skip_tokens
        states: dict[int, Tensor] = {}
        for name, teacher in self.teachers.items():
            own = [place for place, reading in enumerate(readings) if reading.name == name]
            if own:  # on all ranks, or on none
                batches = [readings[place].teacher for place in own]
                inputs = [model_inputs(self.known_to(name, batch), learned_tokens(batch, skipped)) for batch in batches]
                states |= zip(own, teacher.forward_all(inputs), strict=True)
        lessons = []
        for place, reading in enumerate(readings):
            batch, targets = reading.student, learned_tokens(reading.student, skipped)
            lessons.append(Lesson(batch.input_ids, batch.attention_mask, targets, states[place], reading.name))
        return lessons

    def known_to(self, name: str | None, batch: SFTBatch) -> SFTBatch:
        """The batch without the ids that a teacher has no embedding of: those of no token, which a student with a
        larger output layer may sample."""
        known = batch.input_ids < self.vocabularies[name]
        return replace(batch, input_ids=batch.input_ids.where(known, self.factory.pad_id))

    def inputs(self, lesson: Lesson) -> dict[str, Any]:
        """What the student is called with."""
        of_teacher = dict(teacher=self.teachers[lesson.name].module, teacher_states=lesson.teacher_states)
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
        parts = self.split(batch, of_teacher, self.eval_data)
        lessons = self.teach(self.readings(batch, of_teacher, parts))
        outputs = self.actor.forward_all([self.inputs(lesson) for lesson in lessons])
        real = [(part.rows, output) for part, output in zip(parts, outputs, strict=True) if part.is_real]
        found = in_batch_order(*zip(*real, strict=True), batch.input_ids.shape)
        counts = learned_tokens(to_learn(batch), self.config.algorithm.skip_tokens).sum(1).tolist()
        means = [total / n if n else None for total, n in zip(found.sum(1).tolist(), counts, strict=True)]
        rows = super().sample_rows(samples)
        return [row | {"divergence": mean} for row, mean in zip(rows, means, strict=True)]

    # --- building

    def build(self):
        c, a = self.config, self.config.algorithm
        if not a.named_teachers:
            raise UserError("distillation needs a teacher: give --teacher FOLDER")
        if a.teacher == SELF and c.model.path is None:
            raise UserError("teacher self is a copy of the student: give --model FOLDER")
        for source in a.named_teachers.values():
            if source != SELF:
                self.factory.check_teacher_vocabulary(source)
        self.demonstrations = None
        if self.learns_responses:
            self.demonstrations = self.factory.dataset(c.data.train_data, "sft", c.data.train_weights, self.teaching())
            self.demonstration_order, _ = self.factory.order(self.demonstrations, self.start)
        super().build()
        if a.teachers is not None:
            idle = sorted(set(a.teachers) - set(self.data.teachers_of(range(len(self.data)))))
            if idle:
                raise UserError(
                    f"no row of train_data has the {a.teacher_column} {idle[0]!r}: leave this teacher out, or correct "
                    "the rows"
                )
        self.policy = Policy(self.actor, c, self.ranks)
        self.divergence = Divergence(a.divergence, a.beta, a.distill_temperature)
        if a.teacher_ema:
            self.frozen = {TEACHER: self.teachers[None]}

    def prompts(self, sources, weights=None):
        return self.factory.dataset(sources, "prompt", weights, self.teaching())

    def teaching(self) -> Teaching | None:
        """What rows say of teachers, if anything."""
        a = self.config.algorithm
        if a.teacher_prompt is None and a.teachers is None:
            return None
        return Teaching(a.teacher_prompt, a.teacher_column, tuple(a.teachers or ()))

    def build_models(self):
        c, a = self.config, self.config.algorithm
        start = self.folder.model_in_checkpoint(ACTOR) or c.model.path
        student = self.factory.model(Student, start, lora=c.model.lora)
        disable_dropout(student)
        self.teachers: dict[str | None, Engine] = {}
        self.vocabularies: dict[str | None, int] = {}
        for name, source in a.named_teachers.items():
            teacher = self.load_teacher(source, student)
            self.vocabularies[name] = vocabulary(teacher.transformer)
            self.teachers[name] = self.teacher_engine(teacher, student)
        return {ACTOR: self.factory.trained(student, accumulates=self.accumulates(), generates=True)}

    def teacher_engine(self, teacher: Teacher, student: Student) -> Engine:
        c, a = self.config, self.config.algorithm
        rows = [vocabulary(model.transformer) for model in (student, teacher)]
        if c.parallel.splits_vocabulary and rows[0] != rows[1]:
            raise UserError(
                f"the student's output layer has {rows[0]} rows and the teacher's {rows[1]}, so processes would hold "
                "other ranges of the vocabulary: leave out tensor_parallel"
            )
        if a.teacher_ema:
            return self.factory.averaged_teacher(teacher, student)
        return self.factory.frozen_teacher(teacher)

    def load_teacher(self, source: str, student: Student) -> Teacher:
        """A teacher as this run begins with it; an average's weights are in float32."""
        c, a = self.config, self.config.algorithm
        if source != SELF:
            return self.factory.model(Teacher, source, own_config=True)
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
        several = len(self.config.algorithm.named_teachers) > 1
        return several or self.demonstrations is not None or super().accumulates()

    def build_scorer(self):
        return super().build_scorer() if self.config.rewards or self.given_rewards else Scorer([])

    def longest_sequence(self):
        demonstrated = 0 if self.demonstrations is None else int(self.demonstrations.lengths.max())
        return max(super().longest_sequence(), demonstrated)


def reading_of(part: Part, student: SFTBatch, teacher: SFTBatch) -> Reading:
    """A micro-batch as both models read it; of one that fills up, nothing is learned."""
    if not part.is_real:
        student, teacher = (replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in (student, teacher))
    return Reading(student, teacher, part.teacher, part.is_real)


def to_learn(batch: RolloutBatch) -> SFTBatch:
    """Sampled responses as if they were demonstrated."""
    return SFTBatch(batch.input_ids, batch.attention_mask, batch.response_mask)


def learned_tokens(batch: SFTBatch, skipped: int) -> Tensor:
    """The responses' tokens without the first ones, bool `[batch, seq]`."""
    return without_first(response_targets(batch.loss_mask), skipped)
