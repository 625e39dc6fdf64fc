"""What judgements say about models: mean ratings, and who wins against whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from colossal_eval.llm_judge.judge_prompts import settle
from colossal_eval.scores.metrics import mean


def summarise(records: Sequence[dict]) -> dict:
    """Ratings and comparisons, from records of `judge.py`; those without a verdict are counted and left out.

    A question's turns are averaged before anything else, so that errors are over questions, which are independent.
    """
    ratings: dict = defaultdict(lambda: defaultdict(list))
    orders: dict = defaultdict(dict)
    for record in (record for record in records if record["verdict"] is not None):
        place = record["category"], record["id"]
        if record["kind"] == "single":
            ratings[record["models"][0]][place].append(record["verdict"])
        else:
            first, second = record["models"]
            pair = tuple(sorted((first, second)))
            orders[(*pair, *place, record["turn"])][first == pair[0]] = record["verdict"]
    return {
        "judged": sum(record["verdict"] is not None for record in records),
        "failed": sum(record["verdict"] is None for record in records),
        "ratings": {model: _ratings(found) for model, found in sorted(ratings.items())},
        "comparisons": _comparisons(orders),
    }


def _ratings(found: dict[tuple[str, str], list[float]]) -> dict:
    by_category = defaultdict(list)
    for (category, _), verdicts in found.items():
        by_category[category].append(sum(verdicts) / len(verdicts))
    everything = [rating for ratings in by_category.values() for rating in ratings]
    return {"all": _score(everything)} | {name: _score(ratings) for name, ratings in sorted(by_category.items())}


def _score(values: Sequence[float]) -> dict:
    score = mean(values)
    return {"value": score.value, "stderr": score.stderr, "questions": len(values)}


def _comparisons(orders: dict) -> list[dict]:
    """For each pair, the first model's share of wins, ties halved; a turn counts if it was judged in both orders."""
    pairs: dict = defaultdict(lambda: defaultdict(list))
    agreed: dict = defaultdict(list)
    for (first, second, category, question, _), verdicts in orders.items():
        if len(verdicts) == 2:
            pairs[first, second][category, question].append(settle(verdicts[True], verdicts[False]))
            mirrored = {"A": "B", "B": "A", "C": "C"}[verdicts[False]]
            agreed[first, second].append(float(verdicts[True] == mirrored))
    found = []
    for (first, second), outcomes in sorted(pairs.items()):
        values = [sum(turns) / len(turns) for turns in outcomes.values()]
        consistent = agreed[first, second]
        share = {"consistent": sum(consistent) / len(consistent)}
        found.append({"first": first, "second": second, "wins": _score(values)} | share)
    return found


def table(report: dict) -> str:
    """The report as markdown."""
    lines = [f"Judged by {report['judge']}: {report['judged']} judgements, {report['failed']} failed.", ""]
    lines += ["| model | category | rating of 1 to 10 | questions |", "|---|---|---|---|"]
    for model, categories in report["ratings"].items():
        lines += [
            f"| {model} | {name} | {_shown(score)} | {score['questions']} |" for name, score in categories.items()
        ]
    if report["comparisons"]:
        lines += ["", "| model | beside | wins (ties halved) | questions | same verdict in both orders |"]
        lines.append("|---|---|---|---|---|")
    for found in report["comparisons"]:
        wins = found["wins"]
        cells = (found["first"], found["second"], _shown(wins), wins["questions"], f"{found['consistent']:.0%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _shown(score: dict) -> str:
    return f"{score['value']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")
