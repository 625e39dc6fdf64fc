"""A rubric as a reward: criteria that a judge looks at one by one, weighted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coati.errors import UserError
from coati.judges import Judge
from coati.judges.local import LocalJudge
from coati.judges.questions import ask_criterion
from coati.rewards.base import Outcome
from coati.rewards.judge import JudgedReward
from coati.rewards.verifiable import has, look_up


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric.

    Attributes:
        text: what the judge is asked about.
        weight: added to the score where it is met. Below 0 it is that of a pitfall: the text describes a fault, and
            being met costs.
        veto: unmet, it makes the score 0.
        name: in metrics.
    """

    text: str
    weight: float = 1.0
    veto: bool = False
    name: str = ""


class RubricReward(JudgedReward):
    """The weights of the criteria that a response meets, divided by the sum of those above 0, clipped to 0 and 1; 0 if
    one with a veto is unmet. Of a judge that gives probabilities, a criterion counts by its own.

    Args:
        template: what the judge is asked about each criterion, with `{criterion}`, `{prompt}`, `{response}` and maybe
            `{boundary}`.
        criteria: of all responses; with them the share of responses that meet a criterion is logged.
        column: the data's column with the criteria of each row, if there are no such; a row without any is skipped.
    """

    name = "rubric"

    def __init__(
        self,
        judge: Judge | LocalJudge,
        template: str,
        criteria: Sequence[Criterion] | None = None,
        column: str | None = None,
    ):
        number = "a question" if criteria is None else f"{len(criteria)} questions"
        super().__init__(judge, f"{number} per response{' and criterion' if criteria is None else ''}")
        self.template, self.criteria, self.column = template, criteria, column
        self.has_details = self.has_details or criteria is not None
        judge.check(ask_criterion(template))

    def check(self, rows):
        """Raises a UserError for a row whose criteria can't be read, or if none has any."""
        if self.column is None or not rows:
            return
        found = [row for row in rows if has(row, self.column)]
        if not found:
            raise UserError(
                f"the reward {self.name} reads the column {self.column!r}, which the prompts' rows don't have "
                f"(but {', '.join(sorted(rows[0])) or 'none'}): add it, or name another (rubric_column)"
            )
        for row in found:
            self.criteria_of(row)

    def criteria_of(self, row: dict[str, Any]) -> Sequence[Criterion]:
        """The criteria of a response to a row; none if the row has none."""
        if self.criteria is not None:
            return self.criteria
        value = look_up(row, self.column) if has(row, self.column) else None
        return [] if value is None else parse_criteria(value, f"column {self.column!r}")

    def questions(self, sample):
        texts = {"prompt": sample.prompt, "response": sample.response}
        criteria = self.criteria_of(sample.columns)
        return [ask_criterion(self.template, criterion=criterion.text, **texts) for criterion in criteria]

    def outcome(self, sample, verdicts):
        criteria, met = self.criteria_of(sample.columns), [float(verdict.value) for verdict in verdicts]
        details = {} if self.criteria is None else {c.name: share for c, share in zip(criteria, met, strict=True)}
        return Outcome(rubric_score(criteria, met), details=details)


def rubric_score(criteria: Sequence[Criterion], met: Sequence[float]) -> float:
    """From 0 to 1.

    Args:
        met: how probable it is that each criterion is met, 1 or 0 where that is known.
    """
    if any(criterion.veto and share < 0.5 for criterion, share in zip(criteria, met, strict=True)):
        return 0.0
    reached = sum(criterion.weight * share for criterion, share in zip(criteria, met, strict=True))
    best = sum(criterion.weight for criterion in criteria if criterion.weight > 0)
    return min(max(reached / best, 0.0), 1.0)


def read_rubric(path: str) -> list[Criterion]:
    """The criteria in a YAML or JSON file.

    Raises:
        UserError: there is no such file, or it isn't a list of criteria.
    """
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"rubric {path} can't be read: {error}") from error
    return parse_criteria(value, f"rubric {path}")


def parse_criteria(value: Any, place: str) -> list[Criterion]:
    """Criteria as `{"criterion": TEXT, "weight": 1.0, "veto": false, "name": NAME}`, of which the text alone is needed.

    Raises:
        UserError: it is no such list, or no weight is above 0; it names the place and the criterion.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f'{place} holds {str(value)[:80]!r}: write a list of {{"criterion": ..., "weight": ...}}')
    criteria = [parse_criterion(entry, number, place) for number, entry in enumerate(value, start=1)]
    if not any(criterion.weight > 0 for criterion in criteria):
        raise UserError(f"{place}: no criterion has a weight above 0, so nothing can be earned; give one such a weight")
    names = [criterion.name for criterion in criteria]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{place}: two criteria are called {twice[0]!r}; give one another name")
    return criteria


def parse_criterion(entry: Any, number: int, place: str) -> Criterion:
    """One entry of a rubric; None, which tables have for what a row lacks, is the default."""
    where = f"{place}, criterion {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("criterion"), str) or not entry["criterion"].strip():
        raise UserError(f'{where} is {str(entry)[:80]!r}: write {{"criterion": ..., "weight": ...}}')
    given = {name: setting for name, setting in entry.items() if setting is not None}
    if unknown := given.keys() - {"criterion", "weight", "veto", "name"}:
        raise UserError(f"{where} has the unknown field {min(unknown)!r}: leave it out")
    weight, veto = given.get("weight", 1.0), given.get("veto", False)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
        raise UserError(f"{where} has the weight {weight!r}: write a number")
    if not isinstance(veto, bool):
        raise UserError(f"{where} has the veto {veto!r}: write true or false")
    if veto and weight < 0:
        raise UserError(f"{where} has a veto and a weight below 0: a veto is for what must be met, so describe that")
    return Criterion(given["criterion"], float(weight), veto, str(given.get("name", number)))
