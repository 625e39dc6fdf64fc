"""Labels as rows of training data."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coati.files import replace_file
from coati.label.items import completion
from coati.label.results import Outcome, outcomes
from coati.label.store import Pair, Store

Rows = list[dict[str, Any]]


def export(store: Store, format: str, output: Path, with_models: bool = False) -> tuple[int, dict[str, int]]:
    """Writes the rows of a format; returns how many, and how many pairs were left out by reason.

    Args:
        with_models: whether rows say which models their responses are from, in `chosen_model` and `rejected_model`, or
            in `model`.
    """
    rows, left_out = FORMATS[format](outcomes(store.labels()), store.pairs(), with_models)
    replace_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows), left_out


def preference_rows(
    decided: Mapping[int, Outcome], pairs: Mapping[int, Pair], with_models: bool = False
) -> tuple[Rows, dict[str, int]]:
    """`{"prompt", "chosen", "rejected"}`, one row per pair with a winner. An edited text is the chosen one."""
    rows: Rows = []
    left_out: Counter[str] = Counter()
    for pair, outcome in decided.items():
        if outcome.choice not in ("first", "second"):
            left_out[outcome.choice] += 1
            continue
        prompt, (chosen, rejected) = pairs[pair].prompt, winner_first(outcome, pairs[pair])
        if chosen == rejected:
            left_out["edited into the rejected response"] += 1
            continue
        row = {"prompt": prompt, "chosen": completion(prompt, chosen), "rejected": completion(prompt, rejected)}
        models = zip(("chosen_model", "rejected_model"), models_winner_first(outcome, pairs[pair]), strict=True)
        rows.append(row | (dict(models) if with_models else {}))
    return rows, dict(left_out)


def kto_rows(
    decided: Mapping[int, Outcome], pairs: Mapping[int, Pair], with_models: bool = False
) -> tuple[Rows, dict[str, int]]:
    """`{"prompt", "completion", "label"}`: a winner is good, a loser bad, and so are both of a pair of which most said
    so. A response that was good in one pair and bad in another is left out."""
    left_out: Counter[str] = Counter()
    found: dict[str, tuple[Any, str, str, set[bool]]] = {}

    def add(prompt: Any, text: str, model: str, is_good: bool) -> None:
        found.setdefault(json.dumps([prompt, text]), (prompt, text, model, set()))[3].add(is_good)

    for pair, outcome in decided.items():
        prompt = pairs[pair].prompt
        if outcome.choice == "both_bad":
            for text, model in zip(pairs[pair].texts, pairs[pair].models, strict=True):
                add(prompt, text, model, False)
        elif outcome.choice in ("first", "second"):
            (chosen, rejected), models = winner_first(outcome, pairs[pair]), models_winner_first(outcome, pairs[pair])
            add(prompt, chosen, models[0], True)
            add(prompt, rejected, models[1], False)
        else:
            left_out[outcome.choice] += 1
    rows: Rows = []
    for prompt, text, model, values in found.values():
        if len(values) == 2:
            left_out["responses that are good in one pair and bad in another"] += 1
        else:
            row = {"prompt": prompt, "completion": completion(prompt, text), "label": values == {True}}
            rows.append(row | ({"model": model} if with_models else {}))
    return rows, dict(left_out)


def sft_rows(
    decided: Mapping[int, Outcome], pairs: Mapping[int, Pair], with_models: bool = False
) -> tuple[Rows, dict[str, int]]:
    """`{"prompt", "completion"}` of the winners, edited where they were, each once."""
    left_out: Counter[str] = Counter()
    rows: dict[str, dict[str, Any]] = {}
    for pair, outcome in decided.items():
        if outcome.choice not in ("first", "second"):
            left_out[outcome.choice] += 1
            continue
        prompt, (chosen, _) = pairs[pair].prompt, winner_first(outcome, pairs[pair])
        row = {"prompt": prompt, "completion": completion(prompt, chosen)}
        model = models_winner_first(outcome, pairs[pair])[0]
        rows.setdefault(json.dumps([prompt, chosen]), row | ({"model": model} if with_models else {}))
    return list(rows.values()), dict(left_out)


def winner_first(outcome: Outcome, pair: Pair) -> tuple[str, str]:
    """Chosen (as edited) and rejected text."""
    first, second = pair.texts
    chosen, rejected = (first, second) if outcome.choice == "first" else (second, first)
    return outcome.edited or chosen, rejected


def models_winner_first(outcome: Outcome, pair: Pair) -> tuple[str, str]:
    """The models that the chosen and the rejected response are from, "" where that isn't known."""
    first, second = pair.models
    return (first, second) if outcome.choice == "first" else (second, first)


FORMATS: dict[str, Callable[[Mapping[int, Outcome], Mapping[int, Pair], bool], tuple[Rows, dict[str, int]]]] = {
    "preference": preference_rows,
    "kto": kto_rows,
    "sft": sft_rows,
}
REASONS = {"tie": "ties", "both_bad": "both bad", "split": "no choice of more than half"}
