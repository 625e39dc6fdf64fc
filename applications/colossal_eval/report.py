"""The report of an evaluation, from the kept records: one row per benchmark, one column per model."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import run_command
from coati.files import replace_file
from coati.tracking.files import read_object
from colossal_eval.results.published_figures import compare_published
from colossal_eval.results.summaries import report_rows, text_rows
from colossal_eval.results.tables import markdown, sections, texts_section
from colossal_eval.run.model_loading import column_names
from colossal_eval.run.question_records import read_records

EVALUATION = "evaluation.json"  # the settings of the evaluation, in its folder


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
    if texts:
        parts.append(texts_section(texts, models))
    replace_file(output / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    replace_file(output / "report.md", markdown(parts))
    if find_spec("matplotlib"):
        from colossal_eval.results.html_page import page

        replace_file(output / "report.html", page(parts, rows, models))
    else:
        print("report.html is left out: its charts need matplotlib (pip install matplotlib)", file=sys.stderr)
    return report


@settings
class ReportConfig(Settings):
    """Settings of report.py."""

    output: str = option("runs/eval/out", "the folder of an evaluation", path="output")
    models: ListOf[str] = option((), "columns; default: those of the last run", path="model")
    tasks: ListOf[str] = option((), "benchmarks; default: those of the last run")
    published: bool = option(False, "compare with the figures of the Colossal-LLaMA-2 card")


def main(argv: list[str] | None = None) -> int:
    """Write the report of an evaluation again."""
    return run_command(lambda: _write_again(parse_config(ReportConfig, argv, description=__doc__)))


def _write_again(config: ReportConfig) -> None:
    output = Path(config.output)
    last = read_object(output / EVALUATION)
    models = config.models or column_names(last["models"])
    write_report(output, models, config.tasks or last["tasks"], config.published)
    print(f"report: {output / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
