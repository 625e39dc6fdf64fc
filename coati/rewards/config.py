"""What scores responses: a list of rewards, each of a type with settings of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from coati.config import ListOf, Settings, option, settings
from coati.errors import UserError
from coati.rewards.answers import Style

if TYPE_CHECKING:  # settings are read before torch is loaded
    import torch

    from coati.judges import Judge
    from coati.judges.local import LocalJudge
    from coati.rewards.base import Reward
    from coati.rewards.scorer import Scorer

PLAIN = "{prompt}{response}"
# settings of a judge at an endpoint
OF_ENDPOINT = ("endpoint", "api_key_variable", "max_tokens", "temperature")
OF_ENDPOINT += ("concurrency", "attempts", "timeout", "cache")


@settings
class RewardSettings(Settings):
    """What every reward has."""

    weight: float = option(1.0, "in the sum of rewards")
    name: str | None = option(None, "in metrics, if not that of its type")

    @property
    def model_paths(self) -> Sequence[str]:
        """Reward models of its own that use the policy's tokenizer."""
        return ()

    package: ClassVar[str | None] = None  # that it needs beside coati's own requirements
    extra: ClassVar[str] = "verify"  # of coati, which installs it

    def check_installed(self):
        """Raises a UserError for a package that this machine lacks."""
        if self.package and find_spec(self.package) is None:
            kind = self.__pydantic_fields__["type"].default
            raise UserError(f"the reward {kind} needs the package {self.package}: pip install 'coati[{self.extra}]'")

    def make(self, device: torch.device | str) -> Reward:
        """The reward; `device` is where a model of its own runs."""
        raise NotImplementedError


@settings
class ModelRewardSettings(RewardSettings):
    """A reward model that uses the policy's tokenizer."""

    type: Literal["model"] = option("model", "a reward model that uses the policy's tokenizer")
    path: str = option(..., "its folder, or its name on the hub", path="model")
    objectives: dict[str, float] | None = option(
        None, "of a model of several objectives, their weights in its score; 0 for one that is not named"
    )

    @property
    def model_paths(self):
        return (self.path,)

    def problems(self):
        if self.objectives == {}:
            yield "objectives names none: give the weights of those that count, or leave it out"

    def make_of(self, load_model: Callable[..., Reward]) -> Reward:
        """The reward, given what makes one of a reward model's folder and of these settings."""
        return load_model(self.path, self)


@settings
class EnsembleRewardSettings(RewardSettings):
    """Several reward models."""

    type: Literal["ensemble"] = option("ensemble", "several reward models that use the policy's tokenizer")
    paths: ListOf[str] = option(..., "their folders, or names on the hub", path="model")
    pessimism: float = option(
        1.0, "standard deviations of the models' scores that are taken off their mean, where they differ", ge=0
    )

    @property
    def model_paths(self):
        return self.paths

    def make_of(self, load_model: Callable[..., Reward]) -> Reward:
        from coati.rewards.ensemble import EnsembleReward

        if twice := [path for path in self.paths if self.paths.count(path) > 1]:
            raise UserError(f"the ensemble has {twice[0]} twice: name each reward model once")
        members = {f"model_{number}": load_model(path) for number, path in enumerate(self.paths, 1)}
        return EnsembleReward(members, self.pessimism)


@settings
class ProcessRewardSettings(RewardSettings):
    """A process reward model that uses the policy's tokenizer."""

    type: Literal["process"] = option("process", "a process reward model, which scores each step of a response")
    path: str = option(..., "its folder, or its name on the hub", path="model")
    reduce: Literal["min", "product", "last", "mean", "none"] = option(
        "min", "of the steps' probabilities, the response's score; none: each step's is the reward of its last token"
    )

    @property
    def model_paths(self):
        return (self.path,)

    def make_of(self, load_model: Callable[..., Reward]) -> Reward:
        return load_model(self.path, self)


@settings
class FunctionRewardSettings(RewardSettings):
    """A Python function."""

    type: Literal["function"] = option("function", "a Python function of prompts and responses")
    path: str = option(..., "FILE.py:function or module:function", path="function")

    def make(self, device):
        from coati.rewards.function import load_function

        return load_function(self.path)


@settings
class AnswerRewardSettings(RewardSettings):
    """What every reward has that compares with a right answer."""

    answer_column: str = option("answer", "the data's column with the right answer; a.b for the field b of an object a")


@settings
class StyledRewardSettings(AnswerRewardSettings):
    """What every reward has that looks for an answer in the response."""

    answer_style: Style = option(
        "stated",
        "what counts as an answer: boxed (a box alone), marked (also what follows `The answer is` or ####), stated "
        "(also a last line that is the answer), anywhere (also the last number)",
    )


@settings
class MathRewardSettings(StyledRewardSettings):
    """The right number or expression."""

    type: Literal["math"] = option("math", "the right number or expression, compared by math-verify")

    package = "math_verify"

    def make(self, device):
        from coati.rewards.verifiable import MathVerifier

        return MathVerifier(self.answer_column, self.answer_style)


@settings
class GSM8KRewardSettings(StyledRewardSettings):
    """The right number."""

    type: Literal["gsm8k"] = option("gsm8k", "the right number, as GSM8K writes it")

    def make(self, device):
        from coati.rewards.verifiable import GSM8KVerifier

        return GSM8KVerifier(self.answer_column, self.answer_style)


@settings
class ChoiceRewardSettings(StyledRewardSettings):
    """The right letters."""

    type: Literal["choice"] = option("choice", "the right letter, or letters")

    def make(self, device):
        from coati.rewards.verifiable import ChoiceVerifier

        return ChoiceVerifier(self.answer_column, self.answer_style)


@settings
class ExactRewardSettings(AnswerRewardSettings):
    """The right text."""

    type: Literal["exact"] = option("exact", "the right text, once both are normalized")

    def make(self, device):
        from coati.rewards.verifiable import ExactVerifier

        return ExactVerifier(self.answer_column)


@settings
class RegexRewardSettings(AnswerRewardSettings):
    """A pattern."""

    type: Literal["regex"] = option("regex", "a pattern is found")
    pattern: str = option(..., "what is looked for; its first group, if any, must equal the right answer")

    def make(self, device):
        from coati.rewards.verifiable import RegexVerifier

        return RegexVerifier(self.answer_column, self.pattern)


@settings
class FormatRewardSettings(RewardSettings):
    """Tags."""

    type: Literal["format"] = option("format", "the response is made of tagged parts")
    tags: ListOf[str] = option(("think", "answer"), "the tags, in this order")

    def make(self, device):
        from coati.rewards.verifiable import FormatVerifier

        return FormatVerifier(format_tags=self.tags)


@settings
class JSONRewardSettings(RewardSettings):
    """JSON of a schema."""

    type: Literal["json"] = option("json", "JSON that a schema allows")
    json_schema: str = option(..., "file with the schema", path="file")

    package = "jsonschema"

    def make(self, device):
        from coati.rewards.verifiable import JSONVerifier

        return JSONVerifier(json_schema=self.json_schema)


@settings
class ReasoningGymRewardSettings(AnswerRewardSettings):
    """The scorer of a reasoning-gym task."""

    type: Literal["reasoning_gym"] = option("reasoning_gym", "the scorer of the row's reasoning-gym task")
    allow_code_execution: bool = option(False, "allows tasks whose scorer evaluates the answer as Python")

    package = "reasoning_gym"

    def make(self, device):
        from coati.rewards.verifiable import ReasoningGymVerifier

        return ReasoningGymVerifier(self.answer_column, self.allow_code_execution)


@settings
class PythonRewardSettings(RewardSettings):
    """Unit tests."""

    type: Literal["python"] = option("python", "the response's program passes the row's unit tests, in a sandbox")
    tests_column: str = option("tests", "the data's column with the unit tests")
    timeout: float = option(10.0, "seconds that a program with its tests may take", gt=0)
    allow_code_execution: bool = option(False, "responses may be run")

    def make(self, device):
        from coati.rewards.verifiable import PythonVerifier

        return PythonVerifier(
            tests_column=self.tests_column,
            python_timeout=self.timeout,
            allow_code_execution=self.allow_code_execution,
        )


@settings
class ClassifierRewardSettings(RewardSettings):
    """A sequence classifier with a tokenizer of its own."""

    type: Literal["classifier"] = option("classifier", "a sequence classifier with a tokenizer of its own")
    path: str = option(..., "its folder, or its name on the hub", path="model")
    tokenizer: str | None = option(None, "its tokenizer, if it isn't in its folder", path="model")
    label: str | None = option(None, "name or index of the label whose logit is the reward")
    output: Literal["logit", "log_prob", "probability"] = option("logit", "what is read of it")
    template: str = option(
        PLAIN, "the text that is scored; chat for the tokenizer's chat template, pair for a pair of texts"
    )
    max_length: int | None = option(None, "of that text, in tokens; all that the model reads if not given", ge=1)
    truncation_side: Literal["left", "right"] = option("left", "the side that longer texts lose")
    padding_side: Literal["left", "right"] | None = option(
        None, "the side that is padded; right for decoders, the tokenizer's own for encoders, if not given"
    )
    pad_token: str | None = option(None, "what fills rows; the tokenizer's pad token, else EOS, if not given")
    batch_size: int = option(16, "responses per forward pass", ge=1)

    def make(self, device):
        from coati.rewards.classifier import SequenceClassifierReward

        names = ("tokenizer", "label", "output", "template", "max_length", "batch_size")
        names += ("truncation_side", "padding_side", "pad_token")
        return SequenceClassifierReward(self.path, device=device, **{name: getattr(self, name) for name in names})


@settings
class HTTPRewardSettings(RewardSettings):
    """An HTTP endpoint."""

    type: Literal["http"] = option("http", "an HTTP endpoint that scores responses")
    url: str = option(..., "where it is")
    more_urls: ListOf[str] = option(
        (), "others that give the same: requests go to all in turn, and past one that fails"
    )
    token_variable: str = option("COATI_TOKEN", "the environment variable with the token that is sent, if there is one")
    send_ids: bool = option(False, "requests have token ids too, as `coati serve-reward` wants them for reward models")
    timeout: float = option(60.0, "seconds that it may take for a batch", gt=0)
    retries: int = option(3, "further tries where it fails, after 1, 2, 4, ... seconds", ge=0)
    batch_size: int = option(16, "responses per request", ge=1)

    def make(self, device):
        from coati.rewards.http import HTTPReward

        token = os.environ.get(self.token_variable)
        return HTTPReward(
            [self.url, *self.more_urls],
            timeout=self.timeout,
            retries=self.retries,
            batch_size=self.batch_size,
            headers={"Authorization": f"Bearer {token}"} if token else None,
            send_ids=self.send_ids,
        )


@settings
class JudgedRewardSettings(RewardSettings):
    """What every reward has that asks an LLM judge."""

    model: str | None = option(None, "the judge's name at the endpoint")
    path: str | None = option(
        None,
        "instead of model, the folder of one that judges in this process, in one forward pass per question",
        path="model",
    )
    batch_size: int = option(16, "of such a one, questions per forward pass", ge=1)
    endpoint: str | None = option(
        None, "URL of the OpenAI-compatible API, such as http://localhost:8000/v1; else OPENAI_BASE_URL"
    )
    api_key_variable: str = option("OPENAI_API_KEY", "the environment variable that holds the key")
    prompt: str | None = option(
        None, "what the judge is asked: a file, or a text with {response} and the like; ours if not given"
    )
    max_tokens: int = option(1024, "longest reply of the judge, in tokens", ge=1)
    temperature: float = option(0.0, "of the judge", ge=0)
    concurrency: int = option(16, "requests of each process at the same time", ge=1)
    attempts: int = option(4, "how often a verdict is asked for before it counts as failed", ge=1)
    timeout: float = option(120.0, "seconds that one reply may take", gt=0)
    cache: str | None = option(
        None, "folder of the verdicts, which are never asked for again; verdicts/ in output_dir if not given"
    )

    package = "openai"
    extra = "judge"

    def check_installed(self):
        if self.path is None:
            super().check_installed()

    def problems(self):
        if (self.model is None) == (self.path is None):
            yield "give either model, a judge at an endpoint, or path, the folder of one"
        fields = self.__pydantic_fields__
        names, whose = (("batch_size",), "of a path") if self.path is None else (OF_ENDPOINT, "at an endpoint")
        for name in (name for name in names if getattr(self, name) != fields[name].default):
            yield f"{name} is for a judge {whose}: leave it out"

    def make_judge(
        self,
        cache: Path | None,
        device: torch.device | str,
        load_local: Callable[[str, int], LocalJudge] | None = None,
    ) -> Judge | LocalJudge:
        """Who is asked.

        Args:
            cache: the folder of an endpoint's verdicts if the settings name none; None to keep none.
            device: where a judge in this process runs.
            load_local: makes one of its folder and the questions per forward pass; if not given, it is whole here.
        """
        if self.path is not None:
            from coati.judges.local import load_judge

            if load_local is not None:
                return load_local(self.path, self.batch_size)
            return load_judge(self.path, device, self.batch_size)
        from coati.judges import Judge, VerdictCache

        folder = cache if self.cache is None else Path(self.cache).expanduser()
        return Judge(
            self.model,
            endpoint=self.endpoint,
            api_key_variable=self.api_key_variable,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            concurrency=self.concurrency,
            attempts=self.attempts,
            timeout=self.timeout,
            cache=None if folder is None else VerdictCache(folder),
        )

    def make_judged(self, judge: Judge | LocalJudge, group_size: int) -> Reward:
        """The reward of a run.

        Args:
            judge: of `make_judge`.
            group_size: responses per prompt.
        """
        raise NotImplementedError

    def make(self, device):
        return self.make_judged(self.make_judge(None, device), 1)


@settings
class JudgeRewardSettings(JudgedRewardSettings):
    """An LLM judge."""

    type: Literal["judge"] = option("judge", "an LLM judge at an OpenAI-compatible endpoint")
    mode: Literal["score", "pairwise"] = option(
        "score",
        "score: each response by itself; pairwise: its share of wins against the prompt's other responses, or against "
        "reference_column",
    )
    lowest_score: float = option(1.0, "the scale's lower end, which becomes a reward of 0")
    highest_score: float | None = option(
        None, "its upper end, which becomes 1; if not given 10, or 9 with path, where a score is one token"
    )
    reference_column: str | None = option(
        None, "the data's column with a reference response, which the judge is told, or compares with"
    )
    comparisons: int | None = option(
        None, "of pairwise, how many of a prompt's other responses each is compared with; all if not given", ge=1
    )

    @property
    def is_tournament(self) -> bool:
        """Whether the responses to a prompt are compared with each other."""
        return self.mode == "pairwise" and self.reference_column is None

    @property
    def highest(self) -> float:
        """The scale's upper end."""
        if self.highest_score is not None:
            return self.highest_score
        return 10.0 if self.path is None else 9.0

    def problems(self):
        yield from super().problems()
        if self.lowest_score >= self.highest:
            yield "lowest_score must be below highest_score"
        if self.comparisons is not None and not self.is_tournament:
            yield "comparisons is for mode pairwise without reference_column"

    def make_judged(self, judge, group_size):
        from coati.judges.questions import pairwise_template, read_template, score_template
        from coati.rewards.judge import JudgeReward, ReferenceComparisonReward, TournamentReward

        reasons = self.path is None
        if self.mode == "score":
            template = score_template(self.reference_column is not None, reasons)
            if self.prompt is not None:
                names = ("response",) if self.reference_column is None else ("response", "reference")
                template = read_template(self.prompt, names)
            return JudgeReward(judge, template, self.lowest_score, self.highest, self.reference_column)
        template = pairwise_template(reasons)
        if self.prompt is not None:
            template = read_template(self.prompt, ("response_a", "response_b"))
        if self.reference_column is not None:
            return ReferenceComparisonReward(judge, template, self.reference_column)
        return TournamentReward(judge, template, group_size, self.comparisons)


@settings
class RubricRewardSettings(JudgedRewardSettings):
    """Weighted criteria."""

    type: Literal["rubric"] = option("rubric", "weighted criteria, which an LLM judge looks at one by one")
    rubric: str | None = option(None, "YAML or JSON file with the criteria of all responses", path="file")
    rubric_column: str | None = option(None, "the data's column with the criteria of each row")

    def problems(self):
        yield from super().problems()
        if (self.rubric is None) == (self.rubric_column is None):
            yield "criteria are in a file or in the data: give either rubric or rubric_column"

    def make_judged(self, judge, group_size):
        from coati.judges.questions import criterion_template, read_template
        from coati.rewards.rubric import RubricReward, read_rubric

        template = criterion_template(reasons=self.path is None)
        if self.prompt is not None:
            template = read_template(self.prompt, ("criterion", "response"))
        criteria = None if self.rubric is None else read_rubric(self.rubric)
        return RubricReward(judge, template, criteria, self.rubric_column)


AnyReward = Annotated[
    ModelRewardSettings
    | EnsembleRewardSettings
    | ProcessRewardSettings
    | FunctionRewardSettings
    | MathRewardSettings
    | GSM8KRewardSettings
    | ChoiceRewardSettings
    | ExactRewardSettings
    | RegexRewardSettings
    | FormatRewardSettings
    | JSONRewardSettings
    | ReasoningGymRewardSettings
    | PythonRewardSettings
    | ClassifierRewardSettings
    | HTTPRewardSettings
    | JudgeRewardSettings
    | RubricRewardSettings,
    Field(discriminator="type"),
]


@settings
class ScoringConfig(Settings):
    """What becomes of what the rewards say."""

    reward_clip: float | None = option(None, "scores are clamped to +- this", gt=0)
    normalize_reward: bool = option(False, "scores are normalized by their running mean and standard deviation")
    missing_eos_penalty: float | None = option(
        None, "subtracted from the score of a response that does not end by itself", ge=0
    )
    reward_workers: int = option(
        1, "processes that score responses by rule while others are generated; 0 for none", ge=0
    )
    reward_timeout: float = option(60.0, "seconds that such a process may take for a response", gt=0)
    reward_failure_score: float = option(0.0, "the score of a response that such a reward fails for")


def reward_problems(
    rewards: Sequence[RewardSettings],
    scoring: ScoringConfig,
    group_size: int,
    splits_models: bool,
    learns_token_rewards: bool = True,
) -> Iterator[str]:
    """What rewards contradict in scoring and in the rest of a run's settings.

    Args:
        group_size: responses per prompt.
        splits_models: several processes share a model.
        learns_token_rewards: where in a response a reward falls matters to what is learned.
    """
    for reward in rewards:
        if isinstance(reward, ProcessRewardSettings) and reward.reduce == "none" and not learns_token_rewards:
            yield (
                "the reward process with reduce none rewards steps, and this method learns of whole responses: give it "
                "reduce min, or choose ppo or reinforce++"
            )
        if reward.type == "python" and scoring.reward_timeout <= reward.timeout:
            yield "reward_timeout ends whatever scores a response: it must be above the timeout of the reward python"
        if reward.type == "math" and scoring.reward_workers < 1:
            yield "the reward math can hang, and only a process of its own can be ended: reward_workers 1"
        if isinstance(reward, JudgeRewardSettings) and reward.is_tournament and group_size < 2:
            yield (
                "the reward judge in mode pairwise compares the responses to a prompt, and this method draws one: give "
                "it a reference_column to compare with, or mode score"
            )
        if isinstance(reward, JudgedRewardSettings) and reward.path is None and splits_models:
            yield (
                f"processes that share a model would each ask the judge of the reward {reward.type}, and may hear "
                "other verdicts: leave out tensor_parallel, pipeline_parallel and sequence_parallel, or give it a path"
            )


def load_rewards(
    rewards: Sequence[RewardSettings],
    scoring: ScoringConfig,
    load_model: Callable[..., Reward] | None = None,
    device: torch.device | str = "cpu",
    given: Sequence[Reward] = (),
    *,
    load_local: Callable[[str, int], LocalJudge] | None = None,
    verdicts: Path | None = None,
    group_size: int = 1,
) -> Scorer:
    """The rewards of a run.

    Args:
        load_model: makes a reward of the folder of a reward model and, but for the members of an ensemble, of the
            settings of the reward.
        device: where classifiers and judges of one's own run.
        given: further rewards, of weight 1.
        load_local: makes a judge in this process of its folder and the questions per forward pass; if not given, it is
            whole here.
        verdicts: the folder where judges' verdicts are kept if their settings name none; None to keep none.
        group_size: responses per prompt.

    Raises:
        UserError: no reward at all; one can't be loaded.
    """
    from coati.rewards.scorer import Scorer

    if not rewards and not given:
        raise UserError("no reward: give `rewards`, such as [{type: math}], or --rewards math")
    loaded = [(reward, 1.0) for reward in given]
    for entry in rewards:
        entry.check_installed()
        if isinstance(entry, ModelRewardSettings | EnsembleRewardSettings | ProcessRewardSettings):
            reward = entry.make_of(load_model)
        elif isinstance(entry, JudgedRewardSettings):
            reward = entry.make_judged(entry.make_judge(verdicts, device, load_local), group_size)
        else:
            reward = entry.make(device)
        if entry.name is not None:
            reward.name = entry.name
        loaded.append((reward, entry.weight))
    return Scorer(
        loaded,
        workers=scoring.reward_workers,
        timeout=scoring.reward_timeout,
        failure_score=scoring.reward_failure_score,
    )
