"""LLM judges as rewards: a score for a response, or the share of comparisons that it wins."""

import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import combinations, groupby

from coati.errors import UserError
from coati.judges import Judge, Question, Verdict
from coati.judges.questions import ask_better, ask_score, settle
from coati.rewards.base import Outcome, Reward
from coati.rewards.verifiable import as_text, has, look_up, refuse_objects
from coati.samples import Sample


class JudgedReward(Reward):
    """A reward that has each response judged as soon as it is finished. A derived one fills in `begin`.

    Attributes:
        judge: what is asked.
    """

    per_response = True
    judge: Judge

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        """Waits for the verdicts.

        Raises:
            ValueError: there is none for a sample.
            UserError: the endpoint refuses.
        """
        outcomes = [future.result() for future in [self.begin(sample) for sample in samples]]
        for outcome in outcomes:
            if outcome.error:
                raise ValueError(outcome.error)
        return [outcome.score for outcome in outcomes]

    def begin(self, sample: Sample) -> "Future[Outcome]":
        raise NotImplementedError


class JudgeReward(JudgedReward):
    """A judge's score of a response, mapped to 0 for the lowest and 1 for the highest.

    Args:
        template: what the judge is asked, with `{prompt}`, `{response}`, maybe `{reference}` and `{boundary}`.
        reference_column: the data's column with a reference response for the judge; a row without one is skipped.
    """

    name = "judge"

    def __init__(
        self,
        judge: Judge,
        template: str,
        lowest: float = 1.0,
        highest: float = 10.0,
        reference_column: str | None = None,
    ):
        self.judge, self.template, self.lowest, self.highest = judge, template, lowest, highest
        self.reference_column = reference_column
        self.about = f"one request per response to the judge {judge.model} at {judge.endpoint}"

    def check(self, rows):
        check_references(rows, self.reference_column, self.name)

    def begin(self, sample):
        texts = {"prompt": sample.prompt, "response": sample.response}
        if self.reference_column is not None:
            reference = reference_of(sample, self.reference_column)
            if reference is None:
                return skipped()
            texts["reference"] = reference
        question = ask_score(self.template, self.lowest, self.highest, **texts)
        return self.judge.submit_all([question], self.outcome)

    def outcome(self, verdicts: list[Verdict]) -> Outcome:
        [verdict] = verdicts
        if verdict.value is None:
            return Outcome(None, failure(verdicts))
        return Outcome((verdict.value - self.lowest) / (self.highest - self.lowest))


class ReferenceComparisonReward(JudgedReward):
    """Whether a judge finds a response better than the row's reference response: 1, 0, or 0.5 for a tie. Both orders
    are asked; where they disagree, it is a tie. A row without a reference is skipped.

    Args:
        template: with `{prompt}`, `{response_a}`, `{response_b}` and maybe `{boundary}`.
    """

    name = "judge"

    def __init__(self, judge: Judge, template: str, reference_column: str):
        self.judge, self.template, self.reference_column = judge, template, reference_column
        self.about = f"two requests per response to the judge {judge.model} at {judge.endpoint}"

    def check(self, rows):
        check_references(rows, self.reference_column, self.name)

    def begin(self, sample):
        reference = reference_of(sample, self.reference_column)
        if reference is None:
            return skipped()
        questions = both_orders(self.template, sample.prompt, sample.response, reference)
        return self.judge.submit_all(questions, self.outcome)

    def outcome(self, verdicts: list[Verdict]) -> Outcome:
        share = share_of_first(verdicts)
        return Outcome(None, failure(verdicts)) if share is None else Outcome(share)


class TournamentReward(Reward):
    """The mean share of comparisons that a response wins against other responses to the same prompt.

    Every pair is compared, n (n - 1) / 2 of n responses; with `comparisons` each response draws that many partners, and
    the pairs of all are compared, so a response takes part in at least that many. Draws depend on the row and the
    response's place among those of its prompt alone. A pair is asked about in both orders: two requests. A tie counts
    0.5, and so do orders that disagree and, without a request, equal responses. A comparison that fails is left out; a
    response without any has failed. A prompt's only response, as in evaluation, is skipped.

    Args:
        template: with `{prompt}`, `{response_a}`, `{response_b}` and maybe `{boundary}`.
        group_size: responses per prompt.
        comparisons: partners that each response draws; None for all.
    """

    name = "judge"

    def __init__(self, judge: Judge, template: str, group_size: int, comparisons: int | None = None):
        self.judge, self.template, self.group_size, self.comparisons = judge, template, group_size, comparisons
        most = 2 * most_pairs(group_size, comparisons)
        self.about = f"up to {most} requests per prompt to the judge {judge.model} at {judge.endpoint}"

    def score(self, samples):
        """Win shares; None for a sample that has none."""
        return [outcome.score for outcome in self.outcomes(samples)]

    def outcomes(self, samples):
        asked = {}
        for group in groups_of(samples, self.group_size):
            for i, j in pairs_of(samples[group[0]].row, len(group), self.comparisons):
                first, second = samples[group[i]], samples[group[j]]
                questions = both_orders(self.template, first.prompt, first.response, second.response)
                is_equal = first.response == second.response
                asked[group[i], group[j]] = None if is_equal else self.judge.submit_all(questions, list)
        shares, errors = defaultdict(list), defaultdict(str)
        for (i, j), future in asked.items():
            verdicts = [] if future is None else future.result()
            share = 0.5 if future is None else share_of_first(verdicts)
            if share is None:
                errors[i] = errors[j] = failure(verdicts)
            else:
                shares[i].append(share)
                shares[j].append(1 - share)
        return [
            Outcome(sum(shares[i]) / len(shares[i]) if shares[i] else None, "" if shares[i] else errors[i])
            for i in range(len(samples))
        ]


# --- comparisons


def both_orders(template: str, prompt: str, first: str, second: str) -> list[Question]:
    """The same comparison, with each response once as A."""
    return [
        ask_better(template, first, second, prompt=prompt),
        ask_better(template, second, first, prompt=prompt),
    ]


def share_of_first(verdicts: list[Verdict]) -> float | None:
    """What the first of `both_orders` gets; None if one of the verdicts is missing."""
    first, second = (verdict.value for verdict in verdicts)
    return None if first is None or second is None else settle(first, second)


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


def skipped() -> "Future[Outcome]":
    """The outcome of a sample that a reward does not apply to."""
    future: Future[Outcome] = Future()
    future.set_result(Outcome(None))
    return future


def failure(verdicts: Sequence[Verdict]) -> str:
    """Why one of the verdicts is missing."""
    failed = next(verdict for verdict in verdicts if verdict.value is None)
    return f"{len(failed.errors)} attempts without a verdict: {failed.errors[-1]}"
