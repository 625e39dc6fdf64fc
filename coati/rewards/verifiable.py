r"""Rewards by rule: 1 for a response that is right, 0 for one that isn't, by the data's own columns.

Each scores a response by itself (`per_response`), so that it can work while others are still being generated. The rules
are in docs/rewards.md. Text in `<think>` tags is skipped, and of `<answer>` tags only the last is read.
"""

import inspect
import json
import math
import re
import string
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Any, ClassVar

from coati.errors import UserError
from coati.rewards.answers import Style, extract_letters, extract_number, plain, stated_answer
from coati.rewards.base import Reward
from coati.rewards.config import JSONRewardSettings, MathRewardSettings, ReasoningGymRewardSettings
from coati.rewards.sandbox import check_sandbox, run_tests
from coati.samples import Sample

SECONDS_OF_ALGEBRA = 5  # for reading an answer with math-verify, and as many for comparing it
PERCENT = re.compile(r"%|\bpercent")
# for `normalize`
DASHES = str.maketrans({"−": "-", "–": "-", "—": " "})
QUOTES = re.compile(r"[\"“”„«»‘’《》「」『』【】]|(?<=\w)'(?=\w)")
# a point or a comma in a number counts, a colon between digits, "!" in "5!" and "!="
PUNCTUATION = re.compile(r"\.(?!\w)|(?<!\d)[,:]|[,:](?!\d)|[;?。、]|(?<![\d)])!(?!=)")
ARTICLE = re.compile(r"(?<!\S)(?:the\s+(?=\w)|an?\s+(?=[^\W\d_]{2}))")


@dataclass
class Verifier(Reward):
    """A rule; each defines `score_sample`.

    Args:
        answer_column: the data's column with the right answer, or a list of them.
    """

    answer_column: str = "answer"

    package: ClassVar[str | None] = None
    per_response: ClassVar[bool] = True

    def load(self):
        """Imports what the first answer would have to wait for."""
        if self.package:
            __import__(self.package)

    @property
    def worker_spec(self):
        return self

    def check(self, rows):
        column = self.column()
        if column is not None:
            for row in self.having(rows, column):
                refuse_objects(look_up(row, column), column)

    def score(self, samples):
        """One number per response, mostly 0 or 1.

        Raises:
            UserError: there is no such column, or it holds no texts.
            ValueError: a row has no right answer that can be read.
        """
        return [float(self.score_sample(sample)) for sample in samples]

    def score_sample(self, sample: Sample) -> float:
        raise NotImplementedError

    def column(self) -> str | None:
        """The column that it reads, if any."""
        return self.answer_column

    def accepted(self, row: dict[str, Any]) -> list[str]:
        """The right answers as texts."""
        column = self.column()
        if not has(row, column):
            raise self.no_column(row, column)
        value = look_up(row, column)
        if value is None:
            raise ValueError(f"the row has no {column!r}")
        if value == []:
            raise ValueError(f"the row has no {column}: the list is empty")
        refuse_objects(value, column)
        return [as_text(answer) for answer in (value if isinstance(value, list) else [value])]

    def having(self, rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
        """The rows that have a column; the samples of others, in data of several kinds, will count as failures.

        Raises:
            UserError: none has it.
        """
        rows_with = [row for row in rows if has(row, column)]
        if rows and not rows_with:
            raise self.no_column(rows[0], column)
        return rows_with

    def no_column(self, row: dict[str, Any], column: str) -> UserError:
        return UserError(
            f"the reward {self.name} reads the column {column!r}, which the prompts' rows don't have "
            f"(but {', '.join(sorted(row)) or 'none'}): add it, or name another (answer_column, tests_column)"
        )


@dataclass
class MathVerifier(Verifier):
    """The right number, or by math-verify something equal to what is no plain number: LaTeX, roots, sets, equations.

    If the right answer is a number, an expression such as "67 - 67" is wrong: else repeating the question would earn a
    reward. So is an expression that the prompt contains, unless it is written as the right answer is.

    Args:
        answer_style: what counts as an answer, see `coati.rewards.answers`.
    """

    answer_style: Style = "stated"

    name, package = "math", MathRewardSettings.package

    def score_sample(self, sample):
        text, truncated = final_part(sample)
        answer = stated_answer(text, self.answer_style, truncated)
        number = extract_number(text, self.answer_style, truncated)
        for right in self.accepted(sample.columns):
            right = stated_answer(right, "marked") or right.strip()
            if (wanted := right_number(right)) is not None:
                equal = number is not None and same_number(wanted, number, right, answer)
            else:
                expression = text if self.answer_style == "anywhere" and not answer else answer
                equal = self.same_expression(right, expression)
                equal = equal and not is_of_prompt(expression, sample.prompt, right)
            if equal:
                return True
        return False

    def same_expression(self, right: str, answer: str) -> bool:
        """Whether math-verify finds them equal."""
        from math_verify import verify
        from sympy import Number as SympyNumber

        wanted, parsed = self.parse(right), self.parse(answer) if answer else []
        if not wanted:
            raise ValueError(f"{right!r} can't be read as mathematics")
        if isinstance(wanted[0], SympyNumber) and not (parsed and isinstance(parsed[0], SympyNumber)):
            return False
        return verify(wanted, parsed, timeout_seconds=self.seconds())

    def parse(self, text: str) -> list:
        from math_verify import parse

        if whole := re.fullmatch(r"\$+([^$]+)(?<!\\)\$+|\\\((.+)\\\)|\\\[(.+)\\\]", text, re.DOTALL):
            text = whole[whole.lastindex]
        delimited = re.search(r"(?<!\\)\$.+(?<!\\)\$|\\\(|\\\[", text, re.DOTALL)
        return parse(text if delimited else rf"\boxed{{{text}}}", parsing_timeout=self.seconds())

    def seconds(self) -> int | None:
        """math-verify's time limit is a signal, which only a main thread gets."""
        return SECONDS_OF_ALGEBRA if threading.current_thread() is threading.main_thread() else None


@dataclass
class GSM8KVerifier(Verifier):
    """The same number, read as `extract_number` says.

    Args:
        answer_style: what counts as an answer, see `coati.rewards.answers`.
    """

    answer_style: Style = "stated"

    name = "gsm8k"

    def score_sample(self, sample):
        right = [right_number(text) for text in self.accepted(sample.columns)]
        if None in right:
            raise ValueError(f"no number in {look_up(sample.columns, self.answer_column)!r}")
        text, truncated = final_part(sample)
        return extract_number(text, self.answer_style, truncated) in right


@dataclass
class ChoiceVerifier(Verifier):
    """The same letter or letters, read as `extract_letters` says.

    Args:
        answer_style: what counts as an answer, see `coati.rewards.answers`.
    """

    answer_style: Style = "stated"

    name = "choice"

    def score_sample(self, sample):
        right = set()
        for text in self.accepted(sample.columns):
            labels = list(string.ascii_uppercase)
            letters = extract_letters(text, labels, "marked") or extract_letters(rf"\boxed{{{text}}}", labels, "boxed")
            if not letters:
                raise ValueError(f"no capital letter of a choice in {text!r}")
            right.update(letters)
        text, truncated = final_part(sample)
        labels = string.ascii_uppercase[: max(5, string.ascii_uppercase.index(max(right)) + 1)]
        return extract_letters(text, list(labels), self.answer_style, truncated) == sorted(right)


class ExactVerifier(Verifier):
    """The same text once both are normalized, see `normalize`; a text that was cut off is another one."""

    name = "exact"

    def score_sample(self, sample):
        text, truncated = final_part(sample)
        return not truncated and normalize(text) in {normalize(right) for right in self.accepted(sample.columns)}


@dataclass
class RegexVerifier(Verifier):
    """The pattern is found (a dot may be a newline). If it has groups, what the first group of the last find holds
    equals the right answer once both are normalized, and isn't where the response was cut off."""

    regex_pattern: str | None = None

    name = "regex"

    def __post_init__(self):
        if not self.regex_pattern:
            raise UserError("the reward regex needs a pattern")
        try:
            re.compile(self.regex_pattern)
        except re.error as error:
            raise UserError(f"the pattern {self.regex_pattern!r} is no regular expression: {error}") from error

    def column(self):
        return self.answer_column if re.compile(self.regex_pattern).groups else None

    def score_sample(self, sample):
        *_, last = None, *re.finditer(self.regex_pattern, sample.response, re.DOTALL)
        if last is None or not last.re.groups:
            return last is not None
        if sample.truncated and last.end(1) == len(sample.response):
            return False
        return normalize(last[1] or "") in {normalize(text) for text in self.accepted(sample.columns)}


@dataclass
class FormatVerifier(Verifier):
    """Each tag once, in order, none of them empty, and nothing but blanks around them. The prompt may have opened the
    first."""

    format_tags: Sequence[str] = ("think", "answer")

    name = "format"

    def __post_init__(self):
        if not self.format_tags:
            raise UserError("the reward format needs tags")

    def column(self):
        return None

    def score_sample(self, sample):
        opening = f"<{self.format_tags[0]}>"
        opened = sample.prompt.rstrip().endswith(opening)
        text = opening + sample.response if opened else sample.response
        form = r"\s*".join(f"<{re.escape(tag)}>(.*)</{re.escape(tag)}>" for tag in self.format_tags)
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in self.format_tags)
        found = re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL) if once else None
        return found is not None and all(part.strip() for part in found.groups())


@dataclass
class JSONVerifier(Verifier):
    """JSON, in a fenced block or bare, that the schema in a file allows."""

    json_schema: str | None = None

    name, package = "json", JSONRewardSettings.package

    def __post_init__(self):
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        if not self.json_schema:
            raise UserError("the reward json needs json_schema, a file")
        try:
            self.rules = json.loads(Path(self.json_schema).read_text(encoding="utf-8"))
            validator_for(self.rules).check_schema(self.rules)
        except (OSError, ValueError, SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"json_schema {self.json_schema} can't be read as a JSON schema: {reason}") from error

    def column(self):
        return None

    def score_sample(self, sample):
        from jsonschema.validators import validator_for
        from referencing import Registry

        try:
            value = json.loads(fenced(final_part(sample)[0], is_json, "json"))
        except (ValueError, RecursionError):
            return False
        return validator_for(self.rules)(self.rules, registry=Registry()).is_valid(value)  # fetches no other schema


@dataclass
class ReasoningGymVerifier(Verifier):
    """What the scorer of the row's reasoning-gym task gives, from 0 to 1; 0 for a text that was cut off.

    Args:
        allow_code_execution: allows tasks whose scorer evaluates the answer as Python.
    """

    allow_code_execution: bool = False

    name, package = "reasoning_gym", ReasoningGymRewardSettings.package

    def score_sample(self, sample):
        about, answer = sample.columns.get("metadata"), sample.columns.get(self.answer_column)
        # some tasks have many answers, and give none
        entry = {"question": sample.prompt, "answer": answer, "metadata": about}
        text, truncated = final_part(sample)
        return 0.0 if truncated else self.scorer(about)(text.strip(), entry)

    def check(self, rows):
        for row in self.having(rows, "metadata"):
            self.scorer(row["metadata"])

    def scorer(self, about: Any) -> Callable[[str, dict], float]:
        """That of the task which a row's metadata name.

        Raises:
            UserError: they name none, or one that may not be scored.
        """
        task = about.get("source_dataset") if isinstance(about, dict) else None
        if task is None:
            raise UserError(
                "the verifier reasoning_gym reads the field `source_dataset` of the column 'metadata', which a row "
                "doesn't have"
            )
        scorer, evaluates = scorer_of(task)
        if evaluates and not self.allow_code_execution:
            raise UserError(
                f"reasoning-gym scores {task} by evaluating the answer as Python, in no sandbox: leave the task out, "
                "or give allow_code_execution: true"
            )
        return scorer


@dataclass
class PythonVerifier(Verifier):
    """The response's program passes the tests of its row in the sandbox.

    Of several fenced blocks the program is the last one that defines a name which the tests use. What stands in a
    thought is none.
    """

    tests_column: str = "tests"
    python_timeout: float = 10.0
    allow_code_execution: bool = False

    name = "python"

    def __post_init__(self):
        if not self.allow_code_execution:
            raise UserError("the reward python runs what the model writes: give allow_code_execution: true as well")
        check_sandbox()

    def column(self):
        return self.tests_column

    def score_sample(self, sample):
        tests = "\n".join(self.accepted(sample.columns))
        if not tests.strip():
            raise ValueError("the row has no tests")
        names = {*re.findall(r"[^\W\d]\w*", tests)} - defined(tests)
        text = after_thought(sample)
        if tagged := re.fullmatch(r"\s*<answer>(.*)</answer>\s*", text, re.DOTALL):
            text = tagged[1]
        program = fenced(text, lambda block: names & defined(block), "python", "python3", "py", "py3")
        return run_tests(textwrap.dedent(program), tests, self.python_timeout).passed


@cache
def scorer_of(task: str) -> tuple[Callable[[str, dict], float], bool]:
    """A reasoning-gym task's scorer, and whether its module evaluates texts as Python."""
    from reasoning_gym import get_score_answer_fn

    scorer = get_score_answer_fn(task)
    module = inspect.getsource(sys.modules[type(scorer.__self__).__module__])
    return scorer, re.search(r"\b(eval|exec|parse_expr|sympify)\(", module) is not None


def final_part(sample: Sample) -> tuple[str, bool]:
    """What stands in the last `<answer>` tags, else all that the response says once it has thought; and whether that
    was cut off."""
    text = after_thought(sample)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start == -1:
        return text, sample.truncated
    start += len("<answer>")
    return text[start : text.find("</answer>", start)], False


def after_thought(sample: Sample) -> str:
    """What follows `</think>`, nothing if the thought has no end. The prompt may have opened it."""
    if sample.prompt.rstrip().endswith("<think>") and "</think>" not in sample.response:
        return ""
    return sample.response.rpartition("</think>")[2].partition("<think>")[0]


def look_up(row: dict[str, Any], column: str):
    """What a row has in a column. `a.b` is the field `b` of the object `a`, or of each object in the list `a`.

    Raises:
        KeyError or TypeError: it has no such column.
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = [one[name] for one in value] if isinstance(value, list) else value[name]
    return value


def has(row: dict[str, Any], column: str) -> bool:
    """Whether `look_up` finds it."""
    try:
        look_up(row, column)
    except (KeyError, TypeError):
        return False
    return True


def refuse_objects(answer, column: str):
    """Raises a `UserError` unless it is a text, a number, a list of these, or None."""
    values = answer if isinstance(answer, list) else [answer]
    if answer is None or all(as_text(value) is not None for value in values):
        return
    fields = dict.fromkeys(name for value in values if isinstance(value, dict) for name in value)
    remedy = f"; name one of its fields: {', '.join(f'{column}.{name}' for name in fields)}" if fields else ""
    raise UserError(
        f"the column {column!r} holds {str(answer)[:80]}, which is no text, number or list of these{remedy}"
    )


def as_text(answer) -> str | None:
    """A right answer as a text, None if it is none: an object, a list, nothing."""
    if isinstance(answer, float) and math.isfinite(answer):
        return f"{Decimal(str(answer)):f}"  # not 1e-05
    return str(answer) if isinstance(answer, (str, Number)) else None


def right_number(text: str) -> Fraction | None:
    """The number that a right answer is; one that is written as an object or a list, in JSON or LaTeX, is none."""
    return None if text.lstrip().startswith(("{", "[")) else extract_number(text, "stated")


def same_number(right: Fraction, answer: Fraction, right_text: str, answer_text: str) -> bool:
    """Equal, up to rounding where the right one isn't whole. 50 % is 50 or a half, as math-verify has it."""
    scaled = [answer]
    if bool(PERCENT.search(right_text)) != bool(PERCENT.search(answer_text)):
        scaled.append(answer / 100 if PERCENT.search(answer_text) else answer * 100)
    return right in scaled or (right.denominator > 1 and any(math.isclose(right, x, rel_tol=2e-6) for x in scaled))


def is_of_prompt(answer: str, prompt: str, right: str) -> bool:
    """Whether an expression stands in the prompt, and is another than the right one."""
    answer, prompt, right = ("".join(plain(text).split()) for text in (answer, prompt, right))
    return answer != right and answer in prompt


def fenced(text: str, fits: Callable[[str], Any], *languages: str) -> str:
    """The last fenced block that fits, of those in one of the languages, else of those that name none; without one that
    fits the last in one of the languages, else all of the text. A fence may lack its other end."""
    blocks = between_fences(text)
    named = [block for language, block in blocks if language in languages]
    unnamed = [block for language, block in blocks if not language]
    for block in reversed([*unnamed, *named]):
        if fits(block):
            return block
    return named[-1] if named else text


def between_fences(text: str) -> list[tuple[str, str]]:
    """What stands before, between and after fences, each with the language that the fence before it names, or "".

    Which fences open and which close isn't told apart, as one may lack its other end. But a block in a language goes on
    over fences that can't end it: with fewer marks, or indented by four columns more, as in a docstring.
    """
    fence = r"^([ \t]*)(```+|~~~+)[ \t]*\{?\.?([\w+-]*)[^\n`]*\n?|()(```+)([\w+-]*)[ \t]*$"
    blocks, start, language, indent, marks = [], 0, "", "", ""
    for fence_match in re.finditer(fence, text, re.MULTILINE):
        new_indent, new_marks, new_language = fence_match.groups()[:3] if fence_match[2] else fence_match.groups()[3:]
        if language and (len(new_marks) < len(marks) or len(new_indent) > len(indent) + 3):
            continue
        blocks.append((language, text[start : fence_match.start()]))
        start, language, indent, marks = fence_match.end(), new_language.lower(), new_indent, new_marks
    return [*blocks, (language, text[start:])]


def defined(program: str) -> set[str]:
    """The names that a Python program defines at its outermost level, or that of an indented block."""
    found = re.findall(
        r"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", program, re.M
    )
    return {name for pair in found for name in pair if name}


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def normalize(text: str) -> str:
    """One case and one form of each character, single blanks, no a/an/the before a word, no quotes, no emphasis around
    the whole, and no punctuation but what counts: signs, operators, brackets, points and colons in numbers.

    A text of which nothing is left by that keeps its punctuation, or every such text would equal an empty one.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(DASHES).split())
    bare = plain
    while len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "\"'*_`$":
        bare = bare[1:-1].strip()
    bare = re.sub(r"^[(\[](\w+)[)\]]$", r"\1", bare)
    bare = QUOTES.sub("", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare))
    bare = " ".join(ARTICLE.sub("", PUNCTUATION.sub(" ", bare)).split())
    return bare or plain
