"""LLM judges as rewards: a score for a response, or the share of comparisons that it wins."""

import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import combinations, groupby, islice

from coati.errors import UserError
from coati.judges import Judge, Question, Verdict
from coati.judges.local import LocalJudge
from coati.judges.questions import ask_better, ask_score, settle
from coati.rewards.base import Outcome, Reward
from coati.rewards.verifiable import as_text, has, look_up, refuse_objects
from coati.samples import Sample


class JudgedReward(Reward):
    """A reward that asks about each response by itself. Of an endpoint it is asked as soon as a response is finished,
    of a judge in this process once all are. A derived one fills in `questions` and `outcome`.

    Args:
        judge: who is asked.
        asks: how many questions there are, for the start of a run.
    """

    def __init__(self, judge: Judge | LocalJudge, asks: str):
        self.judge, self.about = judge, f"{asks} to {judge.place}"
        self.per_response = isinstance(judge, Judge)
        self.has_details = not self.per_response

    def questions(self, sample: Sample) -> list[Question]:
        """What the judge is asked about a response; none to skip it."""
        raise NotImplementedError

    def outcome(self, sample: Sample, verdicts: list[Verdict]) -> Outcome:
        """What the verdicts on its questions make of a response; all of them have a value."""
        raise NotImplementedError

    def begin(self, sample: Sample) -> "Future[Outcome] | None":
        if not self.per_response:
            return None
        return self.judge.submit_all(self.questions(sample), lambda verdicts: self._outcome(sample, verdicts))

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome]:
        asked = [self.questions(sample) for sample in samples]
        verdicts = iter(self.judge.answer([question for questions in asked for question in questions]))
        answered = [list(islice(verdicts, len(questions))) for questions in asked]
        return [self._outcome(sample, found) for sample, found in zip(samples, answered, strict=True)]

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        """Waits for the verdicts.

        Raises:
            ValueError: there is none for a sample.
            UserError: the endpoint refuses.
        """
        outcomes = self.outcomes(samples)
        for outcome in outcomes:
            if outcome.error:
                raise ValueError(outcome.error)
        return [outcome.score for outcome in outcomes]

    def _outcome(self, sample: Sample, verdicts: list[Verdict]) -> Outcome:
        if not verdicts:
            return Outcome(None)
        if any(verdict.value is None for verdict in verdicts):
            return Outcome(None, failure(verdicts))
        found = self.outcome(sample, verdicts)
        return replace(found, details=found.details | mass_of(verdicts))


class JudgeReward(JudgedReward):
    """A judge's score of a response, mapped to 0 for the lowest and 1 for the highest.

    Args:
        template: what the judge is asked, with `{prompt}`, `{response}`, maybe `{reference}` and `{boundary}`.
        reference_column: the data's column with a reference response for the judge; a row without one is skipped.
    """

    name = "judge"

    def __init__(
        self,
        judge: Judge | LocalJudge,
        template: str,
        lowest: float = 1.0,
        highest: float = 10.0,
        reference_column: str | None = None,
    ):
        super().__init__(judge, "one question per response")
        self.template, self.lowest, self.highest = template, lowest, highest
        self.reference_column = reference_column
        judge.check(ask_score(template, lowest, highest))

    def check(self, rows):
        check_references(rows, self.reference_column, self.name)

    def questions(self, sample):
        texts = {"prompt": sample.prompt, "response": sample.response}
        if self.reference_column is not None:
            reference = reference_of(sample, self.reference_column)
            if reference is None:
                return []
            texts["reference"] = reference
        return [ask_score(self.template, self.lowest, self.highest, **texts)]

    def outcome(self, sample, verdicts):
        [verdict] = verdicts
        return Outcome((verdict.value - self.lowest) / (self.highest - self.lowest))


class ReferenceComparisonReward(JudgedReward):
    """Whether a judge finds a response better than the row's reference response, see `share_of_first`. A row without a
    reference is skipped.

    Args:
        template: with `{prompt}`, `{response_a}`, `{response_b}` and maybe `{boundary}`.
    """

    name = "judge"

    def __init__(self, judge: Judge | LocalJudge, template: str, reference_column: str):
        super().__init__(judge, "two questions per response")
        self.template, self.reference_column = template, reference_column
        judge.check(ask_better(template, "", ""))

    def check(self, rows):
        check_references(rows, self.reference_column, self.name)

    def questions(self, sample):
        reference = reference_of(sample, self.reference_column)
        if reference is None:
            return []
        return both_orders(self.template, sample.prompt, sample.response, reference)

    def outcome(self, sample, verdicts):
        return Outcome(share_of_first(verdicts))


class TournamentReward(Reward):
    """The mean share of comparisons that a response wins against other responses to the same prompt.

    Every pair is compared, n (n - 1) / 2 of n responses; with `comparisons` each response draws that many partners, and
    the pairs of all are compared, so a response takes part in at least that many. Draws depend on the row and the
    response's place among those of its prompt alone. A pair is asked about in both orders, see `share_of_first`; equal
    responses are a tie without a question. A comparison that fails is left out; a response without any has failed. A
    prompt's only response, as in evaluation, is skipped.

    Args:
        template: with `{prompt}`, `{response_a}`, `{response_b}` and maybe `{boundary}`.
        group_size: responses per prompt.
        comparisons: partners that each response draws; None for all.
    """

    name = "judge"

    def __init__(self, judge: Judge | LocalJudge, template: str, group_size: int, comparisons: int | None = None):
        self.judge, self.template, self.group_size, self.comparisons = judge, template, group_size, comparisons
        self.has_details = not isinstance(judge, Judge)
        self.about = f"up to {2 * most_pairs(group_size, comparisons)} questions per prompt to {judge.place}"
        judge.check(ask_better(template, "", ""))

    def score(self, samples):
        """Win shares; None for a sample that has none."""
        return [outcome.score for outcome in self.outcomes(samples)]

    def outcomes(self, samples):
        pairs = [
            (group[i], group[j])
            for group in groups_of(samples, self.group_size)
            for i, j in pairs_of(samples[group[0]].row, len(group), self.comparisons)
        ]
        differ = [(i, j) for i, j in pairs if samples[i].response != samples[j].response]
        questions = [
            both_orders(self.template, samples[i].prompt, samples[i].response, samples[j].response) for i, j in differ
        ]
        verdicts = self.judge.answer([question for both in questions for question in both])
        answered = dict(zip(differ, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True))
        shares, heard, errors = defaultdict(list), defaultdict(list), defaultdict(str)
        for i, j in pairs:
            found = answered.get((i, j), ())
            if any(verdict.value is None for verdict in found):
                errors[i] = errors[j] = failure(found)
                continue
            share = share_of_first(found) if found else 0.5
            shares[i].append(share)
            shares[j].append(1 - share)
            heard[i] += found
            heard[j] += found
        return [
            Outcome(sum(shares[i]) / len(shares[i]), details=mass_of(heard[i]))
            if shares[i]
            else Outcome(None, errors[i])
            for i in range(len(samples))
        ]


# --- comparisons


def both_orders(template: str, prompt: str, first: str, second: str) -> list[Question]:
    """The same comparison, with each response once as A."""
    return [
        ask_better(template, first, second, prompt=prompt),
        ask_better(template, second, first, prompt=prompt),
    ]


def share_of_first(verdicts: Sequence[Verdict]) -> float:
    """What the first of two responses gets for the verdicts on `both_orders`. Of choices it is 1, 0, or 0.5 for a tie
    and for orders that disagree; of probabilities that the response which stands first is better, their mean over the
    orders."""
    first, second = (verdict.value for verdict in verdicts)
    if isinstance(first, float):
        return (first + 1 - second) / 2
    return settle(first, second)


def mass_of(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """How probable a judge in this process found its choices, a mean."""
    masses = [verdict.mass for verdict in verdicts if verdict.mass is not None]
    return {"choice_mass": sum(masses) / len(masses)} if masses else {}


def groups_of(samples: Sequence[Sample], group_size: int) -> list[list[int]]:
    """The places of the responses to each prompt. They stand one after another; a row that was drawn twice may, too."""
    groups = []
    for _, places in groupby(range(len(samples)), lambda place: samples[place].row):
        run = list(places)
        groups += [run[start : start + group_size] for start in range(0, len(run), group_size)]
    return groups


def pairs_of(row: int, size: int, comparisons: int | None) -> list[tuple[int, int]]:
    """Which of a prompt's responses are compared, each pair once, the smaller place first."""
    every = list(combinations(range(size), 2))
    if comparisons is None or comparisons >= size - 1:
        return every
    chosen = set()
    for i in range(size):
        others = [j for j in range(size) if j != i]
        partners = random.Random(f"{row} {i}").sample(others, comparisons)
        chosen |= {(min(i, j), max(i, j)) for j in partners}
    return [pair for pair in every if pair in chosen]


def most_pairs(size: int, comparisons: int | None) -> int:
    """The most that `pairs_of` gives for any row."""
    every = size * (size - 1) // 2
    return every if comparisons is None else min(every, size * comparisons)


# --- what rows and judges leave out


def check_references(rows: Sequence[dict], column: str | None, name: str):
    """Raises a UserError if no row has the column of references, or one holds an object there."""
    if column is None or not rows:
        return
    found = [look_up(row, column) for row in rows if has(row, column)]
    if not found:
        raise UserError(
            f"the reward {name} reads the column {column!r}, which the prompts' rows don't have "
            f"(but {', '.join(sorted(rows[0])) or 'none'}): add it, or name another (reference_column)"
        )
    for reference in found:
        refuse_objects(reference, column)


def reference_of(sample: Sample, column: str) -> str | None:
    """A row's reference response, of several the first; None without any."""
    if not has(sample.columns, column):
        return None
    value = look_up(sample.columns, column)
    if isinstance(value, list):
        value = value[0] if value else None
    return as_text(value)


def failure(verdicts: Sequence[Verdict]) -> str:
    """Why one of the verdicts is missing."""
    failed = next(verdict for verdict in verdicts if verdict.value is None)
    attempts = "an attempt" if len(failed.errors) == 1 else f"{len(failed.errors)} attempts"
    return f"{attempts} without a verdict: {failed.errors[-1]}"
