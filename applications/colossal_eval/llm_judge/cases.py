"""What a judge is asked about the responses of one model, or of two beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.question import Question
from colossal_eval.llm_judge.judge_prompts import KINDS, JudgePrompt, choose_prompt, read_objects


def read_responses(path: Path) -> dict[str, list[str]]:
    """A model's responses by question: rows `{"id", "turns"}`, or FastChat's `{"question_id", "choices"}`.

    Raises:
        UserError: the file can't be read, or a row is another.
    """
    responses = {}
    for number, row in read_objects(path):
        try:
            turns = row["turns"] if "turns" in row else row["choices"][0]["turns"]
            responses[str(row["id"] if "id" in row else row["question_id"])] = [str(turn) for turn in turns]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f'{path}:{number} is no response: write {{"id": ..., "turns": [...]}}') from error
    return responses


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
    responses: dict[str, list[str]],
    reference: list[str] | None,
    prompts: Sequence[JudgePrompt],
) -> Case:
    """What the judge is asked about one model's responses, or about two models'.

    Args:
        responses: the turns of each model, in order.
    """
    kind = KINDS[len(responses) - 1]
    asked = [question.question, *question.turns]
    prompt = choose_prompt(prompts, kind, turn, bool(reference) and len(reference) >= turn)
    values = {"question": asked[turn - 1]} | {f"question_{i}": text for i, text in enumerate(asked, 1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(reference or [], 1)}
    sides = ("_a", "_b") if kind == "pairwise" else ("",)
    for side, turns in zip(sides, responses.values(), strict=True):
        values[f"answer{side}"] = turns[turn - 1]
        values |= {f"answer{side}_{i}": text for i, text in enumerate(turns, 1)}
    return Case(question, turn, kind, tuple(responses), prompt.messages(**values))


def make_cases(
    questions: list[Question],
    responses: dict[str, dict[str, list[str]]],
    references: dict[str, list[str]],
    prompts: Sequence[JudgePrompt],
) -> list[Case]:
    """Every turn of every model, and of every pair of models in both orders.

    Args:
        responses: by model and question.
        references: right answers by question, for questions that have them.

    Raises:
        UserError: a model has no response to a question; it names both.
    """
    groups = [(model,) for model in responses]
    for one, other in combinations(responses, 2):
        groups += [(one, other), (other, one)]
    cases = []
    for question in questions:
        turns = {model: _turns(question, model, given) for model, given in responses.items()}
        for group, turn in product(groups, range(1, len(question.turns) + 2)):
            chosen = {model: turns[model] for model in group}
            cases.append(make_case(question, turn, chosen, references.get(question.id), prompts))
    return cases


def _turns(question: Question, model: str, by_question: dict[str, list[str]]) -> list[str]:
    turns, needed = by_question.get(question.id, []), len(question.turns) + 1
    if len(turns) < needed:
        raise UserError(f"{model} responds to {len(turns)} of the {needed} turns of question {question.id}")
    return turns
