"""What a judge is asked and what its words mean (Zheng et al., 2306.05685: MT-Bench and LLM-as-a-judge)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.question import Question

OURS = Path(__file__).with_name("judge_prompts.jsonl")
KINDS = ("single", "pairwise")
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
CHOICE = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Template:
    """A prompt for the judge, in FastChat's form; its placeholders say what it is for."""

    name: str
    kind: str
    system: str
    text: str

    @property
    def with_reference(self) -> bool:
        return "{ref_answer_" in self.text

    @property
    def turn(self) -> int:
        """1, or 2 for what is judged after the second turn."""
        return 2 if "{question_2}" in self.text else 1

    def messages(self, **values: str) -> list[dict[str, str]]:
        """The conversation that the judge is sent."""
        asked = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.text)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": asked}]


def read_templates(path: Path = OURS) -> list[Template]:
    """The prompts of a file: rows `{"name", "type", "system_prompt", "prompt_template"}`.

    Raises:
        UserError: the file can't be read, or a row isn't such a one; it names the line.
    """
    templates = []
    for number, row in _rows(path):
        try:
            found = Template(row["name"], row["type"], row["system_prompt"], row["prompt_template"])
        except KeyError as error:
            message = f"{path}:{number} lacks {error}: a prompt has name, type, system_prompt and prompt_template"
            raise UserError(message) from error
        if found.kind not in KINDS:
            raise UserError(f"{path}:{number}: the type {found.kind!r} is none of {', '.join(KINDS)}")
        templates.append(found)
    return templates


def _rows(path: Path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object")
        yield number, row


def choose_template(templates: Sequence[Template], kind: str, turn: int, with_reference: bool) -> Template:
    """The prompt for a kind and turn, with a reference if there is one and a prompt for it.

    Raises:
        UserError: there is none for this kind and turn.
    """
    fits = [t for t in templates if (t.kind, t.turn) == (kind, turn) and (with_reference or not t.with_reference)]
    if not fits:
        raise UserError(f"no prompt of type {kind} for turn {turn}: --prompts must have one without a reference")
    return max(fits, key=lambda template: template.with_reference)


def read_answers(path: Path) -> dict[str, list[str]]:
    """A model's answers by question: rows `{"id", "turns"}`, or FastChat's `{"question_id", "choices"}`.

    Raises:
        UserError: the file can't be read, or a row is another.
    """
    answers = {}
    for number, row in _rows(path):
        try:
            turns = row["turns"] if "turns" in row else row["choices"][0]["turns"]
            answers[str(row["id"] if "id" in row else row["question_id"])] = [str(turn) for turn in turns]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f'{path}:{number} is no answer: write {{"id": ..., "turns": [...]}}') from error
    return answers


@dataclass(frozen=True)
class Case:
    """One thing to judge.

    Attributes:
        models: one, or the two that are compared, in the order in which the judge sees them.
    """

    question: Question
    turn: int
    kind: str
    models: tuple[str, ...]
    messages: list[dict[str, str]]


def make_case(
    question: Question,
    turn: int,
    answers: dict[str, list[str]],
    reference: list[str] | None,
    templates: Sequence[Template],
) -> Case:
    """What the judge is asked about one model's answers, or about two models'.

    Args:
        answers: the turns of each model, in order.
    """
    kind = KINDS[len(answers) - 1]
    asked = [question.question, *question.turns]
    template = choose_template(templates, kind, turn, bool(reference) and len(reference) >= turn)
    values = {"question": asked[turn - 1]} | {f"question_{i}": text for i, text in enumerate(asked, 1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(reference or [], 1)}
    for side, turns in zip(("_a", "_b") if kind == "pairwise" else ("",), answers.values(), strict=True):
        values[f"answer{side}"] = turns[turn - 1]
        values |= {f"answer{side}_{i}": text for i, text in enumerate(turns, 1)}
    return Case(question, turn, kind, tuple(answers), template.messages(**values))


def read_verdict(kind: str, text: str) -> float | str | None:
    """The last grade (1 to 10) or choice ("A", "B" or "C") in double brackets; None if there is none."""
    found = (RATING if kind == "single" else CHOICE).findall(text)
    if not found:
        return None
    if kind == "pairwise":
        return found[-1]
    rating = float(found[-1])
    return rating if 1 <= rating <= 10 else None


def settle(first: str, second: str) -> float:
    """What the first model gets of a comparison that was made in both orders: 1 if both say it is better, 0 if both
    say the other is, 0.5 where they disagree or see no difference (MT-Bench's conservative rule).

    Args:
        first: the choice where the first model was A.
        second: the choice where it was B.
    """
    wins = (first == "A") + (second == "B")
    losses = (first == "B") + (second == "A")
    return {(2, 0): 1.0, (0, 2): 0.0}.get((wins, losses), 0.5)
