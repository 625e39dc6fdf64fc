"""What a judge's words mean, and what its judgments say about models: mean ratings, and who wins against whom."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from coati.judges.questions import settle
from colossal_eval.results.tables import markdown_table, with_error
from colossal_eval.scores.metrics import mean

RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
CHOICE = re.compile(r"\[\[([ABC])\]\]")
MIRRORED = {"A": "B", "B": "A", "C": "C"}  # the same verdict where the models stand the other way round


def read_verdict(kind: str, text: str) -> float | str | None:
    """The last grade (1 to 10) or choice ("A", "B" or "C") in double brackets; None if there is none."""
    matches = (RATING if kind == "single" else CHOICE).findall(text)
    if not matches:
        return None
    if kind == "pairwise":
        return matches[-1]
    rating = float(matches[-1])
    return rating if 1 <= rating <= 10 else None


def summarize(records: Sequence[dict]) -> dict:
    """Ratings and comparisons, from records of `judge.py`; those without a verdict are counted and skipped.

    A question's turns are averaged before anything else, so that errors are over questions, which are independent.
    """
    judged = [record for record in records if record["verdict"] is not None]
    ratings: dict = defaultdict(lambda: defaultdict(list))
    for record in judged:
        if record["kind"] == "single":
            ratings[record["models"][0]][record["category"], record["id"]].append(record["verdict"])
    return {
        "judged": len(judged),
        "failed": len(records) - len(judged),
        "ratings": {model: _ratings(by_question) for model, by_question in sorted(ratings.items())},
        "comparisons": _comparisons([record for record in judged if record["kind"] == "pairwise"]),
    }


def _ratings(by_question: dict[tuple[str, str], list[float]]) -> dict:
    by_category = defaultdict(list)
    for (category, _), verdicts in by_question.items():
        by_category[category].append(sum(verdicts) / len(verdicts))
    everything = [rating for ratings in by_category.values() for rating in ratings]
    return {"all": _score(everything)} | {name: _score(ratings) for name, ratings in sorted(by_category.items())}


def _score(values: Sequence[float]) -> dict:
    score = mean(values)
    return {"value": score.value, "stderr": score.stderr, "questions": len(values)}


def _comparisons(records: Sequence[dict]) -> list[dict]:
    """For each pair, the first model's share of wins, ties halved; a turn counts if it was judged in both orders."""
    verdicts = {(*r["models"], r["category"], r["id"], r["turn"]): r["verdict"] for r in records}
    shares: dict = defaultdict(lambda: defaultdict(list))
    agreed: dict = defaultdict(list)
    for (first, second, category, question, turn), verdict in verdicts.items():
        other = verdicts.get((second, first, category, question, turn))
        if first < second and other is not None:
            shares[first, second][category, question].append(settle(verdict, other))
            agreed[first, second].append(verdict == MIRRORED[other])
    comparisons = []
    for (first, second), questions in sorted(shares.items()):
        wins = _score([sum(turns) / len(turns) for turns in questions.values()])
        consistent = sum(agreed[first, second]) / len(agreed[first, second])
        comparisons.append({"first": first, "second": second, "wins": wins, "consistent": consistent})
    return comparisons


def report_text(report: dict) -> str:
    """The report as markdown."""
    lines = [f"Judged by {report['judge']}: {report['judged']} judgments, {report['failed']} failed.", ""]
    rows = [
        [model, name, with_error(score), str(score["questions"])]
        for model, categories in report["ratings"].items()
        for name, score in categories.items()
    ]
    lines.append(markdown_table(["model", "category", "rating of 1 to 10", "questions"], rows))
    if report["comparisons"]:
        header = ["model", "beside", "wins (ties halved)", "questions", "same verdict in both orders"]
        rows = []
        for comparison in report["comparisons"]:
            wins, consistent = comparison["wins"], f"{comparison['consistent']:.0%}"
            rows.append(
                [comparison["first"], comparison["second"], with_error(wins), str(wins["questions"]), consistent]
            )
        lines += ["", markdown_table(header, rows)]
    return "\n".join(lines) + "\n"
