r"""Rewards by rule: 1 for an answer that is right, 0 for one that isn't, told from the data's own columns.

Each scores an answer by itself (`per_response`), so that it can work while others are still being generated. The rules
stand in docs/rewards.md. Where an answer has `<answer>` tags, what stands in the last of them is read.
"""

import inspect
import json
import re
import string
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from coati.errors import UserError
from coati.rewards.answers import extract_letters, extract_number
from coati.rewards.sandbox import check_sandbox, run_tests

SECONDS_OF_ALGEBRA = 5  # for reading an answer with math-verify, and as many for comparing it
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}。，、；：？！“”‘’（）《》…—–]")


@dataclass
class Verifier:
    """A rule; `verdict` is what each fills in. Its fields are those of `ScoringConfig` that it needs.

    Args:
        answer_column: the data's column with the right answer, or a list of them.
    """

    answer_column: str = "answer"

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    per_response: ClassVar[bool] = True

    def __post_init__(self):
        if self.package and find_spec(self.package) is None:
            raise UserError(f"the verifier {self.name} needs the package {self.package}: pip install 'coati[verify]'")

    def load(self):
        """Imports what the first answer would have to wait for."""
        if self.package:
            __import__(self.package)

    def score(self, prompts: Sequence[str], responses: Sequence[str], **columns) -> list[float]:
        """One number a response, mostly 0 or 1.

        Raises:
            UserError: there is no such column.
            ValueError: a row has no right answer that can be read.
        """
        scores = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            row = {name: values[i] for name, values in columns.items()}
            scores.append(float(self.verdict(prompt, response, row)))
        return scores

    def verdict(self, prompt: str, response: str, row: dict[str, Any]) -> float:
        raise NotImplementedError

    def given(self, row: dict[str, Any], column: str | None = None):
        """What the row has in a column, by default that of the right answer."""
        column = column or self.answer_column
        if column not in row:
            raise UserError(
                f"the verifier {self.name} reads the column {column!r}, which the prompts' rows don't have "
                f"(but {', '.join(sorted(row)) or 'none'}): add it, or name another (--answer_column, --tests_column)"
            )
        if row[column] is None:
            raise ValueError(f"the row has no {column!r}")
        return row[column]

    def accepted(self, row: dict[str, Any], column: str | None = None) -> list[str]:
        """The right answers as texts."""
        given = self.given(row, column)
        return [str(answer) for answer in (given if isinstance(given, list) else [given])]


class MathVerifier(Verifier):
    """Equal as mathematics, by math-verify: LaTeX, fractions, units, sets, in \\boxed{} or not."""

    name, package = "math", "math_verify"

    def verdict(self, prompt, response, row):
        from math_verify import parse, verify

        # its time limit is a signal, which only a main thread gets
        seconds = SECONDS_OF_ALGEBRA if threading.current_thread() is threading.main_thread() else None
        answer = parse(in_answer_tags(response), parsing_timeout=seconds)
        for text in self.accepted(row):
            text = text.rpartition("####")[2].strip()
            marked = re.search(r"\$|\\boxed|\\\(|\\\[", text)
            if not (right := parse(text if marked else f"${text}$", parsing_timeout=seconds)):
                raise ValueError(f"{text!r} can't be read as mathematics")
            if verify(right, answer, timeout_seconds=seconds):
                return True
        return False


class GSM8KVerifier(Verifier):
    """The same number, read as `extract_number` says."""

    name = "gsm8k"

    def verdict(self, prompt, response, row):
        right = [extract_number(text) for text in self.accepted(row)]
        if None in right:
            raise ValueError(f"no number in {self.given(row)!r}")
        return extract_number(in_answer_tags(response)) in right


class ChoiceVerifier(Verifier):
    """The same letter or letters, read as `extract_letters` says."""

    name = "choice"

    def verdict(self, prompt, response, row):
        right = sorted(set(re.findall("[A-Z]", "".join(self.accepted(row)))))
        if not right:
            raise ValueError(f"no capital letter in {self.given(row)!r}")
        labels = [chr(code) for code in range(ord("A"), max(ord("E"), ord(right[-1])) + 1)]
        return extract_letters(in_answer_tags(response), labels) == right


class ExactVerifier(Verifier):
    """The same text once both are normalised, see `normalise`."""

    name = "exact"

    def verdict(self, prompt, response, row):
        return normalise(in_answer_tags(response)) in {normalise(text) for text in self.accepted(row)}


@dataclass
class RegexVerifier(Verifier):
    """The pattern is found (a dot may be a newline). If it has groups, what the first group of the last find holds
    equals the right answer once both are normalised."""

    regex_pattern: str | None = None

    name = "regex"

    def __post_init__(self):
        if not self.regex_pattern:
            raise UserError("the verifier regex needs --regex_pattern")
        try:
            re.compile(self.regex_pattern)
        except re.error as error:
            raise UserError(f"--regex_pattern {self.regex_pattern!r} is no regular expression: {error}") from error

    def verdict(self, prompt, response, row):
        *_, last = None, *re.finditer(self.regex_pattern, response, re.DOTALL)
        if last is None or not last.re.groups:
            return last is not None
        return normalise(last[1] or "") in {normalise(text) for text in self.accepted(row)}


@dataclass
class FormatVerifier(Verifier):
    """Each tag once, in order, and nothing but blanks around them. The prompt may have opened the first."""

    format_tags: Sequence[str] = ("think", "answer")

    name = "format"

    def __post_init__(self):
        if not self.format_tags:
            raise UserError("the verifier format needs --format_tags")

    def verdict(self, prompt, response, row):
        opening = f"<{self.format_tags[0]}>"
        text = opening + response if prompt.rstrip().endswith(opening) else response
        form = r"\s*".join(f"<{re.escape(tag)}>(.*)</{re.escape(tag)}>" for tag in self.format_tags)
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in self.format_tags)
        return once and re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL) is not None


@dataclass
class JSONVerifier(Verifier):
    """JSON, in a fenced block or bare, that the schema in a file allows."""

    json_schema: str | None = None

    name, package = "json", "jsonschema"

    def __post_init__(self):
        super().__post_init__()
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        if not self.json_schema:
            raise UserError("the verifier json needs --json_schema FILE")
        try:
            self.rules = json.loads(Path(self.json_schema).read_text(encoding="utf-8"))
            validator_for(self.rules).check_schema(self.rules)
        except (OSError, ValueError, SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--json_schema {self.json_schema} can't be read as a JSON schema: {reason}") from error

    def verdict(self, prompt, response, row):
        from jsonschema.validators import validator_for
        from referencing import Registry

        try:
            value = json.loads(fenced(in_answer_tags(response), "json"))
        except (ValueError, RecursionError):
            return False
        return validator_for(self.rules)(self.rules, registry=Registry()).is_valid(value)  # fetches no other schema


@dataclass
class ReasoningGymVerifier(Verifier):
    """What the scorer of the row's reasoning-gym task gives, from 0 to 1.

    Args:
        allow_code_execution: allows tasks whose scorer evaluates the answer as Python.
    """

    allow_code_execution: bool = False

    name, package = "reasoning_gym", "reasoning_gym"

    def verdict(self, prompt, response, row):
        about = self.given(row, "metadata")
        scorer, evaluates = scorer_of(about["source_dataset"])
        if evaluates and not self.allow_code_execution:
            raise UserError(
                f"reasoning-gym scores {about['source_dataset']} by evaluating the answer as Python, in no sandbox: "
                "leave the task out, or give --allow_code_execution true"
            )
        # some tasks have many answers, and give none
        entry = {"question": prompt, "answer": row.get(self.answer_column), "metadata": about}
        return scorer(in_answer_tags(response).strip(), entry)


@dataclass
class PythonVerifier(Verifier):
    """The answer's last fenced block, or all of it, passes the tests of its row in the sandbox."""

    tests_column: str = "tests"
    python_timeout: float = 10.0
    allow_code_execution: bool = False

    name = "python"

    def __post_init__(self):
        if not self.allow_code_execution:
            raise UserError("the verifier python runs what the model writes: give --allow_code_execution true as well")
        check_sandbox()

    def verdict(self, prompt, response, row):
        tests = "\n".join(self.accepted(row, self.tests_column))
        if not tests.strip():
            raise ValueError("the row has no tests")
        return run_tests(fenced(response, "python", "py"), tests, self.python_timeout).passed


@cache
def scorer_of(task: str) -> tuple[Callable[[str, dict], float], bool]:
    """A reasoning-gym task's scorer, and whether its module evaluates texts as Python."""
    from reasoning_gym import get_score_answer_fn

    scorer = get_score_answer_fn(task)
    module = inspect.getsource(sys.modules[type(scorer.__self__).__module__])
    return scorer, re.search(r"\b(eval|exec|parse_expr|sympify)\(", module) is not None


def in_answer_tags(response: str) -> str:
    """What stands in the last `<answer>` tags; all of it without them."""
    found = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return found[-1] if found else response


def fenced(text: str, *languages: str) -> str:
    """The last fenced block of the text that is in one of the languages or says none; all of it without one."""
    blocks = re.findall(r"^[ \t]*```([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", text, re.DOTALL | re.MULTILINE)
    found = [block for language, block in blocks if language.lower() in ("", *languages)]
    return found[-1] if found else text


def normalise(text: str) -> str:
    """One case and one form of each character, no punctuation, no a/an/the, single blanks. A text of which nothing is
    left by that keeps its punctuation and articles, or every such text would equal an empty one."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    bare = re.sub(r"\b(a|an|the)\b", " ", PUNCTUATION.sub("", plain))
    return " ".join((bare if bare.strip() else plain).split())


def make_verifier(name: str, config) -> Verifier:
    """The verifier of a name.

    Args:
        config: a `ScoringConfig`.

    Raises:
        UserError: there is none, it lacks a setting or a package, or it isn't allowed.
    """
    kinds = {kind.name: kind for kind in Verifier.__subclasses__()}
    if name not in kinds:
        raise UserError(f"there is no verifier {name!r}: choose from {', '.join(kinds)}")
    if name == "math" and config.reward_workers < 1:
        raise UserError("the verifier math can hang, and only a process of its own can be ended: --reward_workers 1")
    return kinds[name](**{field.name: getattr(config, field.name) for field in fields(kinds[name])})
