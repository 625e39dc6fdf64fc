"""The report of an evaluation, from the kept records: one row a benchmark, one column a model."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from coati.config import Settings, option, parse_config
from coati.errors import UserError, run_command
from coati.tracking.files import read_lines, read_object, replace_file
from colossal_eval.benchmarks.subjects import ACROSS
from colossal_eval.results.published_figures import compare_published
from colossal_eval.results.tables import KINDS, markdown, page, sections, texts_section
from colossal_eval.run.task_yaml import SETTINGS
from colossal_eval.scores.metrics import macro_mean, mean, per_byte_perplexity
from colossal_eval.scores.significance import compare


def slug(name: str) -> str:
    """A model's column name as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_") or "model"


def headline(benchmark: str, kind: str, records: list[dict]) -> str:
    """The metric of the table: the benchmark's own, if it was computed."""
    there = records[0]["scores"]
    wanted = SETTINGS[benchmark].headline if kind == "single_choice" else "exact_match"
    return wanted if wanted in there else next(iter(there))


def read_records(output: Path, model: str, benchmark: str) -> dict[str, dict]:
    """The records of one model and benchmark by question id.

    Raises:
        UserError: they were not written.
    """
    path = output / "records" / slug(model) / f"{benchmark}.jsonl"
    records = {record["id"]: record for record in read_lines(path)}
    if not records:
        raise UserError(f"{path} holds no records: run evaluate.py with this model and benchmark")
    return records


def summarise(records: list[dict], metric: str) -> dict:
    """Size-weighted and macro mean with standard errors, and the same by subject and category."""
    parts: dict[str, dict[str, list[float]]] = {"subject": defaultdict(list), "category": defaultdict(list)}
    for record in records:
        for part, values in parts.items():
            values[record[part]].append(record["scores"][metric])
    for name, subjects in ACROSS.get(records[0]["benchmark"], {}).items():
        if found := [score for subject in subjects for score in parts["subject"].get(subject, ())]:
            parts["category"][name] = found
    by = {part: {name: mean(values) for name, values in found.items()} for part, found in parts.items()}
    return {
        "mean": asdict(mean([record["scores"][metric] for record in records])),
        "macro": asdict(macro_mean(list(by["subject"].values()))),
        "subjects": {name: asdict(score) for name, score in by["subject"].items()},
        "categories": {name: asdict(score) for name, score in by["category"].items()},
        "metrics": {name: asdict(mean([r["scores"][name] for r in records])) for name in records[0]["scores"]},
    }


def report_rows(output: Path, models: list[str], benchmarks: list[str]) -> list[dict]:
    """One row a benchmark and kind of question.

    Raises:
        UserError: models that were asked different questions.
    """
    rows = []
    for benchmark in benchmarks:
        found = {model: read_records(output, model, benchmark) for model in models}
        ids = next(iter(found.values()))
        for model, records in found.items():
            if records.keys() != ids.keys():
                raise UserError(f"{model} was asked other questions of {benchmark} than {models[0]}: run both again")
        there = {record["kind"] for record in ids.values()}
        for kind in [kind for kind in KINDS if kind in there]:
            alike = {m: [r for r in records.values() if r["kind"] == kind] for m, records in found.items()}
            rows.append(_row(benchmark, kind, {m: sorted(r, key=lambda r: r["id"]) for m, r in alike.items()}))
    return rows


def text_rows(output: Path, models: list[str]) -> list[dict]:
    """One row a file of texts, and one for all of them: perplexity a byte, and the paired differences of its log.

    Raises:
        UserError: models that read different texts.
    """
    found = {model: read_records(output, model, "texts") for model in models}
    ids = sorted(next(iter(found.values())))
    if any(sorted(records) != ids for records in found.values()):
        raise UserError("the models read different texts: run all of them again")
    names = sorted({found[models[0]][id]["subject"] for id in ids})
    return [
        _text_row(name, {m: [r[i] for i in ids if name in ("all", r[i]["subject"])] for m, r in found.items()})
        for name in ([*names, "all"] if len(names) > 1 else names)
    ]


def _text_row(name: str, found: dict[str, list[dict]]) -> dict:
    sizes = [record["bytes"] for record in next(iter(found.values()))]
    nats = {model: [record["log_prob"] for record in records] for model, records in found.items()}
    # scaled so that their mean is the difference of the rates
    rates = {model: [-log_prob * len(sizes) / sum(sizes) for log_prob in values] for model, values in nats.items()}
    return {
        "name": name,
        "n": len(sizes),
        "bytes": sum(sizes),
        "models": {model: asdict(per_byte_perplexity(values, sizes)) for model, values in nats.items()},
        "differences": [{"models": [a, b], **asdict(compare(rates[a], rates[b]))} for a, b in combinations(found, 2)],
    }


def _row(benchmark: str, kind: str, found: dict[str, list[dict]]) -> dict:
    first = next(iter(found.values()))
    metric = headline(benchmark, kind, first)
    scores = {model: [record["scores"][metric] for record in records] for model, records in found.items()}
    return {
        "benchmark": benchmark,
        "kind": kind,
        "metric": metric,
        "n": len(first),
        "random": mean([record["random"] for record in first]).value,
        "models": {model: summarise(records, metric) for model, records in found.items()},
        "differences": [{"models": [a, b], **asdict(compare(scores[a], scores[b]))} for a, b in combinations(found, 2)],
        "dropped_shots": {model: sum(record["dropped_shots"] for record in r) for model, r in found.items()},
        "not_asked": {model: sum(not record["fits"] for record in r) for model, r in found.items()},
    }


def write_report(output: Path, models: list[str], benchmarks: list[str], published: bool = False) -> dict:
    """Write `report.json`, `.md` and `.html` to the folder of an evaluation; returns the first one's content."""
    rows = report_rows(output, models, [name for name in benchmarks if name != "texts"])
    texts = text_rows(output, models) if "texts" in benchmarks else []
    beside = None
    if published:
        found = {b: {m: read_records(output, m, b).values() for m in models} for b in benchmarks}
        beside = compare_published(models, found)
    report = {"models": models, "rows": rows, "texts": texts, "published": beside}
    parts = sections(rows, models, beside) if rows else []
    parts += [texts_section(texts, models)] if texts else []
    replace_file(output / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    replace_file(output / "report.md", markdown(parts))
    if find_spec("matplotlib"):
        replace_file(output / "report.html", page(parts, rows, models))
    else:
        print("report.html is left out: its charts need matplotlib (pip install matplotlib)", file=sys.stderr)
    return report


@dataclass
class ReportConfig(Settings):
    """Settings of report.py."""

    output: str = option("runs/eval/out", "the folder of an evaluation", path="output")
    models: list[str] = option((), "columns; default: those of the last run", path="model")
    tasks: list[str] = option((), "benchmarks; default: those of the last run")
    published: bool = option(False, "compare with the figures of the Colossal-LLaMA-2 card")


def main(argv: list[str] | None = None) -> int:
    """Write the report of an evaluation again."""
    return run_command(lambda: _write_again(parse_config(ReportConfig, argv, description=__doc__)))


def _write_again(config: ReportConfig) -> None:
    from colossal_eval.run.model_loading import column_names

    output = Path(config.output).expanduser()
    last = read_object(output / "evaluation.json")
    models, tasks = config.models or column_names(last["models"]), config.tasks or last["tasks"]
    write_report(output, models, tasks, config.published)
    print(f"report: {output / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
