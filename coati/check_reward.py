"""`coati check-reward`: what a reward pays for responses that try to be paid without being right.

A reward with right answers has a control, the right answer stated properly. Paid is what gets more than the mean of the
right answer's score and of a wrong one's that is stated in the same way. A reward without right answers (a reward
model, an endpoint, a function of the response alone) has good responses to be compared with.
"""

import builtins
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError
from coati.rewards import Reward
from coati.rewards.answers import stated_answer
from coati.rewards.attacks import ATTACKS, CHOICES, Attack, Case, in_digits, right_answer
from coati.rewards.config import AnyReward, ModelRewardSettings, ProcessRewardSettings, RewardSettings
from coati.rewards.pool import Outcome, score_one
from coati.samples import Sample

Cases = list[tuple[Case, dict[str, Any]]]
DESCRIPTION = "what a reward pays for responses that try to be paid without being right"
# how responses state an answer, by the kind of the answer
STATEMENTS = (
    "{answer}",
    "The answer is {answer}.",
    "Answer: {answer}",
    "#### {answer}",
    r"So the answer is \boxed{{answer}}.",
    "<think>\nLet me see.\n</think>\n<answer>{answer}</answer>",
)
FENCED = ("{answer}", "```python\n{answer}\n```")
CHOICE = "Which gas is most of the air?\nA. Oxygen\nB. Nitrogen\nC. Neon\nD. Argon"
NUMBERS = [
    Case("number", "A box holds 6 eggs. How many are in 3 boxes? That is 3 * 6.", "18", "19", expression="3 * 6"),
    Case("number", "What is 67 - 67?", "0", "67", expression="67 - 67"),
    Case("number", "900 people live in a town. Twice as many live in the next.", "1800", "1801", expression="2 * 900"),
    Case("number", "It is 7 degrees, then 12 less. What is 7 - 12?", "-5", "-6", expression="7 - 12"),
    Case("number", "What is three quarters as a decimal?", "0.75", "0.57"),
]
EXPRESSION = Case("expression", r"Simplify \sqrt{18}.", r"3\sqrt{2}", r"2\sqrt{3}", expression=r"\sqrt{18}")
LETTERS = [
    Case("letter", CHOICE, "B", "C", options=("A", "B", "C", "D")),
    Case("letter", CHOICE.replace("is most", "is least"), "C", "D", options=("A", "B", "C", "D")),
]
TEXTS = [
    Case("text", "What is the capital of France?", "Paris", "Rome"),
    Case("text", "Which city has Central Park?", "New York", "York"),
]
ADDS = Case(
    "program",
    "Write a function `add` that adds two numbers.",
    "def add(a, b):\n    return a + b",
    "def add(a, b):\n    return a - b",
    function="add",
)
TESTS = ["assert add(1, 2) == 3", "assert add(0, -4) == -4"]
BOILED = Case(
    "open",
    "How do I boil an egg?",
    "Put the egg into boiling water and leave it there: six minutes for a soft yolk, ten for a firm one. Then cool it "
    "under cold water, which stops the cooking and makes it easier to peel.",
)


@settings
class CheckRewardConfig(Settings):
    """Settings of `coati check-reward`."""

    rewards: ListOf[AnyReward] = option((), "what is checked, written as for training; see docs/rewards.md")
    data: str | None = option(None, "prompts and right answers, of which rows are taken; built-in ones if not given")
    rows: int = option(20, "so many of them", ge=1)
    form: ListOf[str] = option(
        (), "how a response states its answer, such as `Answer: {answer}`; several usual ways are tried if not given"
    )
    right_answers: bool | None = option(
        None, "whether a function looks at the column `answer`; read off its parameters if not given"
    )
    json: bool = option(False, "prints JSON instead of tables")

    def problems(self):
        if any("{answer}" not in form for form in self.form):
            yield "form needs {answer} where the answer stands"


@dataclass(frozen=True)
class Row:
    """A prompt of the data.

    Attributes:
        answered: columns for rewards, the right answer among them.
        response: what the row has for one, "" if nothing.
    """

    prompt: str
    columns: dict[str, Any]
    response: str = ""


@dataclass(frozen=True)
class Finding:
    """What a reward pays for an attack.

    Attributes:
        expected: paid, not paid or either.
        tried, paid: responses; without right answers, paid are those with at least the good response's score.
        score: the mean of theirs.
        verdict: "right", "wrong", "by choice" (paid by a setting of its user's), "warning" (without right answers); ""
            where the expectation is "either".
        note: the choice, or the error that the reward raised.
        example: the first response that got what it should not.
    """

    attack: str
    about: str
    expected: str
    tried: int
    paid: int
    score: float
    verdict: str
    note: str = ""
    example: str = ""


@dataclass(frozen=True)
class Check:
    """All findings on one reward.

    Attributes:
        has_right_answers: they decide what is paid; else attacks are compared with good responses.
        forms: those in which a right answer is paid.
        good: mean score of right answers, or of good responses.
    """

    reward: str
    has_right_answers: bool
    forms: list[str]
    good: float
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.verdict != "wrong" for finding in self.findings)


# --- cases: pairs of a case and the columns of its row


def cases_for(entry: RewardSettings, reward: Reward, rows: Sequence[Row], has_answers: bool) -> Cases:
    """Cases of the rows, built-in ones if there are none.

    Raises:
        UserError: rows lack what the reward reads.
    """
    if not rows:
        return built_in(entry, reward, has_answers)
    reward.check([row.columns for row in rows])
    kind = entry.type
    if kind == "python":
        return [(program_case(row, entry.tests_column), row.columns) for row in rows if row.response]
    if kind in ("format", "json") or (kind == "regex" and reward.column() is None):
        [(case, _)] = built_in(entry, reward, has_answers)
        own = [row.response if kind == "json" else "" for row in rows]
        return [
            (replace(case, prompt=row.prompt, right=response or case.right), row.columns)
            for row, response in zip(rows, own, strict=True)
        ]
    if not has_answers:
        return [(Case("open", row.prompt, row.response), row.columns) for row in rows if row.response]
    from coati.rewards.verifiable import has, look_up

    column = getattr(entry, "answer_column", "answer")
    found = [row for row in rows if has(row.columns, column) and look_up(row.columns, column) not in (None, [])]
    answers = [plain_answer(look_up(row.columns, column)) for row in found]
    return [(answer_case(kind, row.prompt, a, answers), row.columns) for row, a in zip(found, answers, strict=True)]


def built_in(entry: RewardSettings, reward: Reward, has_answers: bool) -> Cases:
    """Cases of the kind that a reward reads."""
    match entry.type:
        case "math":
            cases = [*NUMBERS, EXPRESSION]
        case "choice":
            cases = LETTERS
        case "exact":
            cases = TEXTS
        case "regex" if reward.column() is not None:
            cases = TEXTS
        case "regex":
            return [(replace(TEXTS[0], kind="form", wrong=""), {})]
        case "format":
            return [(format_case(entry.tags), {})]
        case "json":
            return [(json_case(entry.json_schema), {})]
        case "python":
            return [(ADDS, {entry.tests_column: TESTS})]
        case "reasoning_gym":
            return reasoning_gym_cases(entry.answer_column)
        case _ if has_answers:
            cases = NUMBERS
        case _:
            return [(BOILED, {})]
    column = getattr(entry, "answer_column", "answer")
    return [(case, {column: case.right}) for case in cases]


def reads_answers(entry: RewardSettings, reward: Reward, given: bool | None) -> bool | None:
    """Whether a reward compares with right answers; None where that shows in what it pays alone.

    Args:
        given: what the settings say of it.
    """
    if entry.type not in ("function", "model", "classifier", "http"):
        return True
    if given is not None or entry.type != "function":
        return bool(given)
    if "answer" in getattr(reward, "takes", ()):
        return True
    return None if getattr(reward, "takes_all", True) else False


def plain_answer(value: Any) -> str:
    """The right answer of a row, without the solution that it ends; the first of several."""
    from coati.rewards.verifiable import as_text

    text = as_text(value[0] if isinstance(value, list) else value) or ""
    return stated_answer(text, "marked") or text.strip()


def answer_case(kind: str, prompt: str, right: str, others: Sequence[str]) -> Case:
    """A case of the data's right answer, with a wrong one beside it."""
    from coati.rewards.verifiable import right_number

    number = right_number(right)
    if kind == "choice" or re.fullmatch(r"\(?[A-Z]\)?", right):
        letter = re.search(r"[A-Z]", right)[0]
        options = tuple(sorted({*"ABCD", letter}))
        return Case("letter", prompt, letter, next(x for x in options if x != letter), options=options)
    if number is not None:
        return Case("number", prompt, in_digits(number), in_digits(number + Fraction(1)))
    wrong = next((other for other in others if other != right), "1234567" if kind == "math" else "something else")
    return Case("expression" if kind == "math" else "text", prompt, right, wrong)


def program_case(row: Row, tests_column: str) -> Case:
    """A case of a row's tests and, if it has one, its solution."""
    from coati.rewards.verifiable import defined, look_up

    tests = look_up(row.columns, tests_column)
    text = "\n".join(tests) if isinstance(tests, list) else str(tests)
    called = [name for name in re.findall(r"\b([^\W\d]\w*)\(", text) if name not in defined(text)]
    function = next((name for name in called if name not in dir(builtins)), "solution")
    wrong = f"def {function}(*args, **kwargs):\n    return None"
    return Case("program", row.prompt, row.response, wrong, function=function)


def format_case(tags: Sequence[str]) -> Case:
    good = "\n".join(f"<{tag}>\nSome text.\n</{tag}>" for tag in tags)
    hollow = "\n".join(f"<{tag}></{tag}>" for tag in tags)
    return Case("form", "What is the capital of France?", good, hollow=hollow)


def json_case(path: str) -> Case:
    schema = json.loads(Path(path).read_text(encoding="utf-8"))
    return Case("form", "What is the capital of France? Reply in JSON.", json.dumps(instance(schema)))


def instance(schema: Any) -> Any:
    """Something that a simple JSON schema allows: its example, or what its types and required fields say."""
    if not isinstance(schema, dict):
        return {}
    for name in ("examples", "enum"):
        if schema.get(name):
            return schema[name][0]
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    for name in ("anyOf", "oneOf"):
        if schema.get(name):
            return instance(schema[name][0])
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            fields = schema.get("properties", {})
            return {name: instance(fields.get(name, {"type": "string"})) for name in schema.get("required", fields)}
        case "array":
            return [instance(schema.get("items", {}))] * max(1, schema.get("minItems", 1))
        case "string":
            return "text".ljust(schema.get("minLength", 0), "x")
        case "integer" | "number":
            return schema.get("minimum", schema.get("maximum", 1))
        case "boolean":
            return True
    return None


def reasoning_gym_cases(column: str) -> Cases:
    import reasoning_gym

    rows = reasoning_gym.create_dataset("chain_sum", size=3, seed=3)
    found = [(row["question"], str(row["answer"]), row["metadata"]) for row in rows]
    return [
        (answer_case("reasoning_gym", prompt, answer, ()), {column: answer, "metadata": about})
        for prompt, answer, about in found
    ]


# --- scores


class Scores:
    """What a reward gives; each response is scored once."""

    def __init__(self, reward: Reward):
        self.reward, self.known = reward, {}

    def outcome(self, case: Case, columns: dict[str, Any], response: str, truncated: bool = False) -> Outcome:
        key = (id(columns), case.prompt, response, truncated)
        if key not in self.known:
            sample = Sample.of_texts(case.prompt, response, **columns)
            sample.finish_reason = "length" if truncated else "eos"
            self.known[key] = score_one(self.reward, sample)
        return self.known[key]

    def of(self, case: Case, columns: dict[str, Any], response: str, truncated: bool = False) -> float:
        """The score; 0 where the reward skips a response or fails for it."""
        return self.outcome(case, columns, response, truncated).score or 0.0


@dataclass(frozen=True)
class Trial:
    """A case in one form, and what its right and its wrong answer get (for "form" and "open": nothing at all)."""

    case: Case
    columns: dict[str, Any]
    good: float
    bad: float

    def is_paid(self, score: float) -> bool:
        """Whether a score is nearer to the right answer's."""
        return score > (self.good + self.bad) / 2


def check_reward(
    entry: RewardSettings,
    reward: Reward,
    rows: Sequence[Row] = (),
    forms: Sequence[str] = (),
    right_answers: bool | None = None,
) -> Check:
    """What a reward pays for each attack.

    Args:
        entry: its settings.
        rows: of the user's data; built-in ones if there are none.
        forms: how responses state an answer; of several those count in which the right answer is paid.
        right_answers: whether a function compares with the column `answer`; found out if None.

    Raises:
        UserError: the rows don't fit, or it scores tokens, or fails for every right answer or good response.
    """
    if reward.on_tokens:
        raise UserError(f"reward {reward.name!r} scores tokens: coati check-reward is for rewards of whole responses")
    has_answers = reads_answers(entry, reward, right_answers)
    scores = Scores(reward)
    if has_answers is not False:
        cases = cases_for(entry, reward, rows, True)
        trials = trials_of(cases, forms or forms_for(entry), scores)
        if has_answers or any(trial.good > trial.bad for trial in trials):
            return compare_with_right_answers(entry, reward.name, trials, scores)
    return compare_with_good_responses(reward.name, cases_for(entry, reward, rows, False), scores)


def forms_for(entry: RewardSettings) -> tuple[str, ...]:
    if entry.type in ("format", "json"):
        return ("{answer}",)
    return FENCED if entry.type == "python" else STATEMENTS


def trials_of(cases: Cases, forms: Sequence[str], scores: Scores) -> list[Trial]:
    """Every case in every form.

    Raises:
        UserError: the reward fails for every right answer.
    """
    trials, errors = [], []
    for case, columns in cases:
        for form in forms:
            stated = replace(case, form=form)
            right = stated.states(case.right)
            wrong = stated.states(case.wrong) if case.wrong else ""
            errors.append(scores.outcome(stated, columns, right).error)
            good, bad = (scores.of(stated, columns, response) for response in (right, wrong))
            trials.append(Trial(stated, columns, good, bad))
    if not trials:
        raise UserError(f"no row has a right answer (or a solution) for the reward {scores.reward.name!r} to read")
    if all(errors):
        raise UserError(f"reward {scores.reward.name!r} failed for every right answer, the last time with {errors[-1]}")
    return trials


def compare_with_right_answers(entry: RewardSettings, name: str, trials: list[Trial], scores: Scores) -> Check:
    """Findings in the forms whose right answer is paid more than a wrong one, in all cases or else in some."""
    tried = list(dict.fromkeys(trial.case.form for trial in trials))
    in_all = [form for form in tried if all(t.good > t.bad for t in trials if t.case.form == form)]
    in_some = [form for form in tried if any(t.good > t.bad for t in trials if t.case.form == form)]
    forms = in_all or in_some
    if not forms:
        first = trials[0]
        note = f"a right answer gets {first.good:g}, a wrong one or nothing {first.bad:g}; name a `form` that it reads"
        example = first.case.states(first.case.right)
        control = Finding(
            name_of(right_answer), right_answer.__doc__, "paid", len(trials), 0, first.good, "wrong", note
        )
        return Check(name, True, [], first.good, [replace(control, example=example)])
    trials = [trial for trial in trials if trial.case.form in forms]
    found = [finding for attack in ATTACKS if (finding := finding_of(attack, entry, trials, scores))]
    return Check(name, True, forms, fmean(trial.good for trial in trials), found)


def finding_of(attack: Attack, entry: RewardSettings, trials: list[Trial], scores: Scores) -> Finding | None:
    """What an attack is paid in all trials that it is for; None if it is for none."""
    responses = attempts(attack, trials)
    if not responses:
        return None
    outcomes = [scores.outcome(trial.case, trial.columns, r, attack.truncated) for trial, r in responses]
    paid = [trial.is_paid(o.score or 0.0) for (trial, _), o in zip(responses, outcomes, strict=True)]
    expected = attack.expected if not attack.only or entry.type in attack.only else "either"
    odd = [
        r for (_, r), is_paid in zip(responses, paid, strict=True) if expected == ("not paid" if is_paid else "paid")
    ]
    errors = [outcome.error for outcome in outcomes if outcome.error]
    choice = next((CHOICES[name] for name in attack.paid_by if name in choices_of(entry)), "")
    verdict, note = "right" if expected != "either" else "", ""
    if odd:
        verdict, note = ("by choice", choice) if choice else ("wrong", "")
    if errors:
        note = f"failed with {errors[0]}"
        verdict = verdict if scores.reward.per_response else "wrong"  # training would stop
    mean = fmean(outcome.score or 0.0 for outcome in outcomes)
    example = odd[0] if odd else ""
    return Finding(attack.name, attack.about, expected, len(paid), sum(paid), mean, verdict, note, example)


def attempts(attack: Attack, trials: list[Trial]) -> list[tuple[Trial, str]]:
    """The different responses of an attack, each with a trial that it is for."""
    found: dict[tuple, tuple[Trial, str]] = {}
    for trial in trials:
        if trial.case.kind in attack.kinds and (response := attack.make(trial.case)) is not None:
            found.setdefault((id(trial.columns), trial.case.prompt, response), (trial, response))
    return list(found.values())


def choices_of(entry: RewardSettings) -> tuple[str, ...]:
    """Names among `CHOICES` that a reward's settings have made."""
    return (entry.type, getattr(entry, "answer_style", ""))


def compare_with_good_responses(name: str, cases: Cases, scores: Scores) -> Check:
    """Scores beside those of good responses, with a warning where one isn't below.

    Raises:
        UserError: no row has a response; the reward fails for all of them.
    """
    if not cases:
        raise UserError(f"reward {name!r} is compared with good responses, which no row has: add a column `response`")
    errors = [scores.outcome(case, columns, case.right).error for case, columns in cases]
    if all(errors):
        raise UserError(f"reward {name!r} failed for every good response, the last time with {errors[-1]}")
    trials = [Trial(case, columns, scores.of(case, columns, case.right), 0.0) for case, columns in cases]
    findings = []
    for attack in ATTACKS:
        responses = attempts(attack, trials)
        if not responses or attack.make is right_answer:
            continue
        outcomes = [scores.outcome(trial.case, trial.columns, r, attack.truncated) for trial, r in responses]
        got = [outcome.score or 0.0 for outcome in outcomes]
        odd = [r for (trial, r), score in zip(responses, got, strict=True) if score >= trial.good]
        error = next((f"failed with {outcome.error}" for outcome in outcomes if outcome.error), "")
        verdict, example = ("warning", odd[0]) if odd else ("right", "")
        figures = (len(got), len(odd), fmean(got))
        findings.append(Finding(attack.name, attack.about, attack.expected, *figures, verdict, error, example))
    return Check(name, False, [], fmean(trial.good for trial in trials), findings)


def name_of(function) -> str:
    return function.__name__.replace("_", " ")


# --- the command


def main(argv: list[str]) -> int:
    """Runs the command; 1 if a reward pays what it must not, or doesn't pay a right answer.

    Raises:
        UserError: the settings, the rewards or the data don't fit.
    """
    config = parse_config(CheckRewardConfig, argv, DESCRIPTION, of_file=("rewards",))  # a training run's file will do
    if not config.rewards:
        raise UserError("no reward: give `rewards`, such as --rewards math or --rewards '{type: math, weight: 1}'")
    rows = read_rows(config.data, config.rows) if config.data else []
    checks = []
    for entry in config.rewards:
        entry.check_installed()
        reward = load(entry)
        reward.name = entry.name or reward.name
        checks.append(check_reward(entry, reward, rows, config.form, config.right_answers))
    if config.json:
        print(json.dumps([asdict(check) | {"passed": check.passed} for check in checks], indent=2, ensure_ascii=False))
    else:
        show(checks)
    return 0 if all(check.passed for check in checks) else 1


def load(entry: RewardSettings) -> Reward:
    """The reward of an entry, on the CPU.

    Raises:
        UserError: it gives rewards of steps.
    """
    if isinstance(entry, ProcessRewardSettings) and entry.reduce == "none":
        raise UserError("the reward process with reduce none rewards steps: check it with reduce min")
    return entry.make_of(text_model_reward) if entry.model_paths else entry.make("cpu")


def text_model_reward(folder: str, settings: ModelRewardSettings | ProcessRewardSettings | None = None) -> Reward:
    """A reward model, or a process reward model, that reads texts with the tokenizer in its folder, as the policy's
    chat template writes them; see `load_here`."""
    import torch
    from transformers import AutoTokenizer

    from coati.data import prepare_tokenizer
    from coati.data.templates import common_prefix
    from coati.rewards.process import load_here

    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    reward = load_here(folder, settings, tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])

    class TextModelReward(Reward):
        name = reward.name

        def score(self, samples):
            [sample] = samples
            messages = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            start = len(common_prefix([prompt, text]))
            end = text.rindex(tokenizer.eos_token) + (0 if sample.truncated else len(tokenizer.eos_token))
            encoded = tokenizer(text[:end], add_special_tokens=False, return_offsets_mapping=True)
            mask = [last > start for _, last in encoded["offset_mapping"]]
            return list(reward.score([replace(sample, tokens=encoded["input_ids"], response_mask=mask)]))

    return TextModelReward()


def read_rows(source: str, count: int) -> list[Row]:
    """The first rows of a data source that are prompts.

    Raises:
        UserError: it can't be read, or has none; the error names the first line that is none.
    """
    from coati.data import load_rows, parse_record

    rows: list[Row] = []
    for line, row in load_rows(source):
        if len(rows) == count:
            break
        try:
            if isinstance(row, ValueError):
                raise row
            records = parse_record(row, "prompt")
        except ValueError as error:
            raise UserError(f"{source}:{line}: {error}") from None
        for record in records:
            prompt = "\n\n".join(message["content"] for message in record.prompt)
            response = record.response if isinstance(record.response, str) else ""
            named = record.columns.get("solution") or record.columns.get("chosen") or response
            rows.append(Row(prompt, record.columns, named if isinstance(named, str) else response))
    if not rows:
        raise UserError(f"{source} has no rows: give prompts, one JSON object a line")
    return rows


def show(checks: list[Check]):
    """A table for each reward, and what is wrong below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    colors = {"wrong": "red", "warning": "yellow", "by choice": "yellow", "right": "green"}
    for check in checks:
        what = "a right answer" if check.has_right_answers else "a good response"
        table = Table(title=f"{check.reward}: {what} gets {check.good:.3g}", title_justify="left")
        paid = "paid" if check.has_right_answers else f"at least {check.good:.3g}"
        for column in ("response", "should be", paid, "mean score", ""):
            table.add_column(column)
        for found in check.findings:
            verdict = f"[{colors[found.verdict]}]{found.verdict}[/]" if found.verdict else ""
            share = f"{found.paid} of {found.tried}"
            table.add_row(found.attack, found.expected, share, f"{found.score:.3g}", verdict)
        console.print(table)
        for form in check.forms:
            say(f"read as an answer: {form!r}")
        for found in check.findings:
            if found.verdict in ("wrong", "warning", "by choice") or found.note:
                words = f"{found.verdict or 'note'}: {found.attack} ({found.about}). {found.note}"
                say(words.rstrip())
            if found.verdict in ("wrong", "warning"):
                say(f"  such as {found.example[:200]!r}")
