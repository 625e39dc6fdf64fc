"""What people's labels come to: an outcome per pair, how far people agree, which model wins."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from statistics import median
from typing import Any

from coati.intervals import wilson_interval
from coati.label.store import Label, Pair

VALUES = ("first", "second", "tie", "both_bad")
# What an outcome is for the first and the second response.
RESULTS = {"first": ("wins", "losses"), "second": ("losses", "wins")}


@dataclass(frozen=True)
class Outcome:
    """What most people chose of a pair.

    Attributes:
        choice: "first", "second", "tie", "both_bad", or "split" where no choice has more than half.
        edited: the newest edited text of the response that won.
    """

    choice: str
    edited: str | None = None


def outcomes(labels: Iterable[Label]) -> dict[int, Outcome]:
    """By pair, for pairs with a label."""
    by_pair: dict[int, list[Label]] = defaultdict(list)
    for label in labels:
        by_pair[label.pair].append(label)
    found = {}
    for pair, given in by_pair.items():
        choice, count = Counter(label.choice for label in given).most_common(1)[0]
        if 2 * count <= len(given):
            found[pair] = Outcome("split")
            continue
        edits = [label.edited for label in given if label.choice == choice and label.edited]
        found[pair] = Outcome(choice, edits[-1] if edits else None)
    return found


def wins_by_model(decided: Mapping[int, Outcome], pairs: Mapping[int, Pair]) -> list[dict[str, Any]]:
    """Per model, over pairs of responses from two models: wins, losses, the rest, and the share of wins among wins and
    losses with its 95 % interval (`share`, `low`, `high`; None before the first). The best share comes first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair, outcome in decided.items():
        models = pairs[pair].models
        if models[0] == models[1] or not all(models):
            continue
        first, second = RESULTS.get(outcome.choice, ("rest", "rest"))
        counts[models[0]][first] += 1
        counts[models[1]][second] += 1
    rows = []
    for model, count in counts.items():
        row: dict[str, Any] = {"model": model, **{name: count[name] for name in ("wins", "losses", "rest")}}
        n = count["wins"] + count["losses"]
        row["share"] = count["wins"] / n if n else None
        row["low"], row["high"] = wilson_interval(row["share"], n) if n else (None, None)
        rows.append(row)
    return sorted(rows, key=lambda row: (-1.0 if row["share"] is None else row["share"], row["wins"]), reverse=True)


def by_person(labels: Sequence[Label], skipped: Mapping[str, int], names: Iterable[str]) -> list[dict[str, Any]]:
    """Per person: labels, skipped pairs, median seconds per label, and how often the left response was chosen among
    those with a preference (half, if places don't matter)."""
    rows = []
    for name in names:
        own = [label for label in labels if label.person == name]
        sides = [label.side for label in own if label.side]
        rows.append(
            {
                "name": name,
                "labels": len(own),
                "skipped": skipped.get(name, 0),
                "seconds": median(label.seconds for label in own) if own else None,
                "left": sides.count("a") / len(sides) if sides else None,
            }
        )
    return rows


def agreement(labels: Iterable[Label]) -> dict[str, Any]:
    """How far people agree, over pairs with two labels or more.

    Returns:
        `pairs` with two labels or more; `share` of agreeing comparisons of two people's labels; `kappa`, Cohen's, where
        the labels are from exactly two people; `alpha`, Krippendorff's for nominal values. What isn't there is None,
        and `missing` says why.
    """
    by_pair: dict[int, dict[str, str]] = defaultdict(dict)
    for label in labels:
        by_pair[label.pair][label.person] = label.choice
    units = [given for given in by_pair.values() if len(given) > 1]
    compared = [a == b for given in units for a, b in combinations(given.values(), 2)]
    people = sorted({name for given in units for name in given})
    found: dict[str, Any] = {"pairs": len(units), "share": None, "kappa": None, "alpha": None, "missing": ""}
    if not units:
        return found | {"missing": "no pair has labels of two people"}
    found["share"] = sum(compared) / len(compared)
    if len({choice for given in units for choice in given.values()}) == 1:
        return found | {"missing": "all labels are the same, so agreement by chance can't be told"}
    absent = []
    if len(people) == 2:
        if find_spec("sklearn"):
            found["kappa"] = cohens_kappa(units, people)
        else:
            absent.append("kappa")
    if find_spec("krippendorff"):
        found["alpha"] = krippendorffs_alpha(units, people)
    else:
        absent.append("alpha")
    if absent:
        found["missing"] = f'for {" and ".join(absent)}: pip install "coati[label]"'
    return found


def cohens_kappa(units: Sequence[Mapping[str, str]], people: Sequence[str]) -> float:
    """Cohen's kappa of two people."""
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(*([given[name] for given in units] for name in people), labels=list(VALUES)))


def krippendorffs_alpha(units: Sequence[Mapping[str, str]], people: Sequence[str]) -> float:
    """Krippendorff's alpha for nominal values; not everybody needs to have labeled every pair."""
    import krippendorff

    missing = float("nan")
    data = [[VALUES.index(given[name]) if name in given else missing for given in units] for name in people]
    return float(krippendorff.alpha(reliability_data=data, level_of_measurement="nominal"))
