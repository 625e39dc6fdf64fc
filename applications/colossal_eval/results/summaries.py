"""The figures of a report, from the kept records: one row per benchmark, one column per model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.benchmark_settings import SETTINGS
from colossal_eval.benchmarks.subjects import ACROSS
from colossal_eval.run.question_records import read_records
from colossal_eval.scores.metrics import macro_mean, mean, per_byte_perplexity
from colossal_eval.scores.significance import compare

KINDS = {"single_choice": "", "multi_choice": " (several answers)", "cloze": " (cloze)", "math": ""}
Columns = dict[str, list[dict]]
"""The records of each model."""


def title(row: dict) -> str:
    """A row's name: the benchmark, and the kind of its questions where it isn't the usual one."""
    return row["benchmark"] + KINDS[row["kind"]]


def main_metric(benchmark: str, kind: str, records: list[dict]) -> str:
    """The metric of the table: the benchmark's own, if it was computed."""
    present = records[0]["scores"]
    wanted = SETTINGS[benchmark].main_metric if kind == "single_choice" else "exact_match"
    return wanted if wanted in present else next(iter(present))


def scores_of(records: list[dict], metric: str) -> list[float]:
    """One score per record."""
    return [record["scores"][metric] for record in records]


def summarize(records: list[dict], metric: str) -> dict:
    """Size-weighted and macro mean with standard errors, and the same by subject and category."""
    subjects: dict[str, list[float]] = defaultdict(list)
    categories: dict[str, list[float]] = defaultdict(list)
    for record in records:
        subjects[record["subject"]].append(record["scores"][metric])
        categories[record["category"]].append(record["scores"][metric])
    for name, members in ACROSS.get(records[0]["benchmark"], {}).items():
        if scores := [score for subject in members for score in subjects.get(subject, ())]:
            categories[name] = scores
    means = {name: mean(scores) for name, scores in subjects.items()}
    return {
        "mean": asdict(mean(scores_of(records, metric))),
        "macro": asdict(macro_mean(list(means.values()))),
        "subjects": {name: asdict(score) for name, score in means.items()},
        "categories": {name: asdict(mean(scores)) for name, scores in categories.items()},
        "metrics": {name: asdict(mean(scores_of(records, name))) for name in records[0]["scores"]},
    }


def differences(values: dict[str, list[float]]) -> list[dict]:
    """Each pair of models compared on the same questions."""
    return [{"models": [a, b], **asdict(compare(values[a], values[b]))} for a, b in combinations(values, 2)]


def read_columns(output: Path, models: list[str], benchmark: str) -> Columns:
    """The records of all models, in the order of the questions' ids.

    Raises:
        UserError: models that were asked different questions.
    """
    records_of = {model: read_records(output, model, benchmark) for model in models}
    ids = sorted(records_of[models[0]])
    for model, records in records_of.items():
        if sorted(records) != ids:
            raise UserError(f"{model} was asked other questions of {benchmark} than {models[0]}: run both again")
    return {model: [records[id] for id in ids] for model, records in records_of.items()}


def select(columns: Columns, field: str, value: str) -> Columns:
    """The records whose field has this value."""
    return {model: [record for record in records if record[field] == value] for model, records in columns.items()}


def report_rows(output: Path, models: list[str], benchmarks: list[str]) -> list[dict]:
    """One row per benchmark and kind of question.

    Raises:
        UserError: see `read_columns`.
    """
    rows = []
    for benchmark in benchmarks:
        columns = read_columns(output, models, benchmark)
        present = {record["kind"] for record in columns[models[0]]}
        rows += [_row(benchmark, kind, select(columns, "kind", kind)) for kind in KINDS if kind in present]
    return rows


def _row(benchmark: str, kind: str, columns: Columns) -> dict:
    first = next(iter(columns.values()))
    metric = main_metric(benchmark, kind, first)
    return {
        "benchmark": benchmark,
        "kind": kind,
        "metric": metric,
        "n": len(first),
        "random": mean([record["random"] for record in first]).value,
        "models": {model: summarize(records, metric) for model, records in columns.items()},
        "differences": differences({model: scores_of(records, metric) for model, records in columns.items()}),
        "dropped_shots": {
            model: sum(record["dropped_shots"] for record in records) for model, records in columns.items()
        },
        "not_asked": {model: sum(not record["fits"] for record in records) for model, records in columns.items()},
    }


def text_rows(output: Path, models: list[str]) -> list[dict]:
    """One row per file of texts, and one for all of them: perplexity per byte, and the paired differences of its log.

    Raises:
        UserError: see `read_columns`.
    """
    columns = read_columns(output, models, "texts")
    names = sorted({record["subject"] for record in columns[models[0]]})
    rows = [_text_row(name, select(columns, "subject", name)) for name in names]
    return [*rows, _text_row("all", columns)] if len(names) > 1 else rows


def _text_row(name: str, columns: Columns) -> dict:
    sizes = [record["bytes"] for record in next(iter(columns.values()))]
    log_probs = {model: [record["log_prob"] for record in records] for model, records in columns.items()}
    # nats of each document, scaled so that their mean is the rate per byte
    rates = {model: [-value * len(sizes) / sum(sizes) for value in values] for model, values in log_probs.items()}
    return {
        "name": name,
        "n": len(sizes),
        "bytes": sum(sizes),
        "models": {model: asdict(per_byte_perplexity(values, sizes)) for model, values in log_probs.items()},
        "differences": differences(rates),
    }
