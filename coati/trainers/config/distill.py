"""Settings of distillation."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from coati.config import Settings, inherited, option, section, settings
from coati.data.teaching import fields_of
from coati.trainers.config.rollout import RolloutAlgorithm, RolloutConfig

SELF = "self"  # the teacher that is the model which the run starts from
SUCCESS = """{prompt}

Correct solution:

{success}

Correctly solve the original question."""


@settings
class Distillation(Settings):
    """Distillation from a teacher's distributions (GKD, 2306.13649)."""

    # what other methods that sample can set
    group_size: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False

    type: Literal["distill"] = option("distill", "the method")
    teacher: str | None = option(
        None,
        "folder or name of the teacher, whose tokenizer must be the student's; self: a copy of --model",
        path="model",
        common=True,
    )
    teachers: dict[str, str] | None = option(
        None,
        "several instead: of each value that --teacher_column has, the folder or name, such as {math: A, code: B}",
        path="model",
    )
    teacher_column: str | None = option(None, "the field of the data that names a row's teacher")
    teacher_prompt: str | None = option(
        None,
        "what the teacher reads as the last message of the prompt, with names of fields in braces: {prompt} is what "
        "stands there, {response} the row's response",
    )
    teacher_ema: float = option(
        0.0,
        "of teacher self: after each iteration this share of its weights comes from the student; 0 leaves it as it is, "
        "1 makes it the current student",
        ge=0,
        le=1,
    )
    skip_tokens: int = option(0, "first tokens of each response that are not learned", ge=0)
    on_policy_share: float = option(
        1.0,
        "share of an iteration's rows that the student responds to itself; of the others it learns the data's "
        "responses (GKD's lambda)",
        ge=0,
        le=1,
        common=True,
    )
    divergence: Literal["forward", "reverse", "jsd"] = option(
        "reverse", "KL(teacher || student), KL(student || teacher), or what lies between them", common=True
    )
    beta: float = option(
        0.5, "of jsd: the teacher's weight in the mixture; near 0 it is like forward, near 1 like reverse", gt=0, lt=1
    )
    distill_temperature: float = option(1.0, "temperature of both distributions that are compared", gt=0)
    max_rollout_kl: float = inherited(RolloutAlgorithm, "max_rollout_kl", 0.1)

    @property
    def named_teachers(self) -> dict[str | None, str]:
        """Folder or name of each teacher, by what the rows call it; an only teacher has no name there."""
        if self.teachers is not None:
            return dict(self.teachers)
        return {} if self.teacher is None else {None: self.teacher}

    def problems(self) -> Iterator[str]:
        if self.beta != 0.5 and self.divergence != "jsd":
            yield f"beta belongs to divergence jsd: leave it out with {self.divergence}"
        if self.teacher is not None and self.teachers is not None:
            yield "teacher is of all rows, and teachers of some each: give one of the two"
        if (self.teachers is None) != (self.teacher_column is None):
            yield "teachers and teacher_column go together: give both or neither"
        if self.teachers is not None and (not self.teachers or SELF in self.teachers.values()):
            yield "teachers are folders or names, one at least: a copy of the student is --teacher self alone"
        if self.teacher_ema and self.teacher != SELF:
            yield "teacher_ema moves a copy of the student: give teacher self, or leave it out"
        if self.teacher_prompt is not None:
            if self.on_policy_share < 1:
                yield "teacher_prompt is for the student's own responses: leave on_policy_share at 1"
            try:
                fields_of(self.teacher_prompt)
            except ValueError as error:
                yield str(error)


@settings
class SDPO(Distillation):
    """Self-distillation from successful responses of one's own (SDPO, 2601.20802)."""

    type: Literal["sdpo"] = option("sdpo", "the method")
    group_size: int = option(8, "responses per prompt", ge=2, common=True)
    success_reward: float = option(
        1.0, "the least reward of a response that others of its group are taught with", common=True
    )
    teacher: str | None = inherited(Distillation, "teacher", SELF)
    teacher_ema: float = inherited(Distillation, "teacher_ema", 0.05)
    teacher_prompt: str | None = inherited(Distillation, "teacher_prompt", SUCCESS)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.teacher_prompt is None or self.teacher_prompt.count("{success}") != 1:
            yield "teacher_prompt of sdpo has {success} once, where a successful response of the group is to stand"


@settings
class DistillConfig(RolloutConfig):
    """Settings of a distillation; `steps` are iterations and `batch_size` the rows of one."""

    algorithm: Annotated[Distillation | SDPO, Field(discriminator="type")] = section(
        Distillation, "how the student learns from its teacher, see docs/distillation.md"
    )

    @property
    def responses(self) -> int:
        return self.batch_size * self.algorithm.group_size

    @property
    def prompts(self) -> int:
        return round(self.algorithm.on_policy_share * self.batch_size)

    @property
    def models(self) -> list[str]:
        return super().models + [teacher for teacher in self.algorithm.named_teachers.values() if teacher != SELF]

    @property
    def longest_row(self) -> int:
        longest = super().longest_row if self.algorithm.on_policy_share > 0 else 0
        if self.algorithm.teacher_prompt is not None:
            # with a response of another in the prompt, where that is sampled
            responses = 2 if isinstance(self.algorithm, SDPO) else 1
            longest = max(longest, self.data.max_length + responses * self.generation.max_new_tokens)
        return max(longest, self.data.max_length) if self.algorithm.on_policy_share < 1 else longest

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        scoring = self.scoring
        if self.algorithm.group_size > 1 and self.generation.temperature == 0:
            yield "the responses of a group must differ: temperature must be above 0"
        if self.environment.path:
            yield "distillation responds to prompts, in one turn: leave environment out"
        if self.algorithm.teacher_ema and not self.parallel.holds_whole_models:
            yield "teacher_ema is for models that are replicated: ddp, zero1, zero2"
        if self.algorithm.teacher_prompt is not None and self.parallel.splits_sequences:
            yield (
                "teacher_prompt makes rows of other lengths for the teacher, so processes would hold other tokens: "
                "leave out sequence_parallel and split_sequence"
            )
        if scoring.normalize_reward or scoring.reward_clip is not None or scoring.missing_eos_penalty is not None:
            yield (
                "rewards stand in no loss here, the teacher is what is learned from: leave out normalize_reward, "
                "reward_clip and missing_eos_penalty"
            )

    def size_problems(self, world_size: int) -> Iterator[str]:
        yield from super().size_problems(world_size)
        share, rows = self.algorithm.on_policy_share, self.batch_size
        if abs(share * rows - self.prompts) > 1e-6 * rows or self.prompts % world_size:
            step = world_size / rows
            yield (
                f"on_policy_share {share} of batch_size {rows} is {share * rows:g} prompts, not a multiple of the "
                f"{world_size} processes: use a multiple of {step:g}"
            )
