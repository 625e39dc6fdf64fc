"""From published benchmark files to task files: `prepare.py --benchmark mmlu --data FOLDER --output runs/eval/data`."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from coati.config import Settings, option, parse_config
from coati.errors import UserError, run_command
from colossal_eval.benchmarks.converters import CONVERTERS
from colossal_eval.benchmarks.published_rows import Row
from colossal_eval.benchmarks.question import SUMMARY, to_line
from colossal_eval.benchmarks.subjects import SUBJECTS, TOTALS, Subject

SHOWN = 20


@dataclass
class PrepareConfig(Settings):
    """Settings of prepare.py."""

    benchmark: str = option("", f"one of {', '.join(CONVERTERS)}")
    data: str = option("", "folder with the published files, or datasets:NAME, such as datasets:cais/mmlu", path="file")
    output: str = option(
        "runs/eval/data", "folder for the task files; the benchmark gets a folder in it", path="output"
    )
    subjects: list[str] = option((), "only these subjects; each must be there")
    bad_rows: str = option("error", "error: malformed rows end the conversion; drop: they are named and left out")


@dataclass
class Conversion:
    """What was read.

    Attributes:
        rows: published rows by split and subject.
        questions: scored questions by split and subject; an entry may hold several, or none that can be scored here.
        apart: rows that hold several questions which can't be told apart, by subject.
        problems: one line a malformed row.
    """

    rows: Counter
    questions: Counter
    apart: Counter
    problems: list[str]


def convert(rows, folder: Path, subjects: list[str]) -> Conversion:
    """Write the questions of `rows` to `folder`, in the order they come, those of `subjects` only unless it's empty.

    Raises:
        UserError: two questions of one id; a subject of `subjects` that is not there.
    """
    found, ids, file, open_path = Conversion(Counter(), Counter(), Counter(), []), set(), None, None
    try:
        for row in rows:
            if subjects and row.subject not in subjects:
                continue
            path = folder / row.split / f"{row.subject}.jsonl"
            if path != open_path:
                if file is not None:
                    file.close()
                path.parent.mkdir(parents=True, exist_ok=True)
                file, open_path = path.open("a", encoding="utf-8"), path
            _take(row, found, ids, file)
    finally:
        if file is not None:
            file.close()
    there = {subject for split, subject in found.rows if split == "test"}
    if missing := [subject for subject in subjects if subject not in there]:
        raise UserError(f"the data has no subject {missing[0]!r}; it has {', '.join(sorted(there)) or 'none of those'}")
    return found


def _take(row: Row, found: Conversion, ids: set[str], file) -> None:
    if isinstance(row.questions, ValueError):
        found.problems.append(f"{row.place}: {row.questions}")
        return
    found.rows[row.split, row.subject] += 1
    found.apart[row.subject] += not row.questions
    for question in row.questions:
        if question.id in ids:
            raise UserError(f"{row.place}: the question {question.id} is there twice")
        ids.add(question.id)
        found.questions[row.split, row.subject] += 1
        file.write(to_line(question))


def describe(benchmark: str, found: Conversion) -> list[str]:
    """Lines that compare what is there with what is published."""
    table = SUBJECTS.get(benchmark)
    here = {subject: count for (split, subject), count in found.rows.items() if split == "test"}
    if table is None:
        return [f"{benchmark}: {sum(here.values()):,} documents of {len(here)} files"]
    total = f"{sum(here.values()):,} of {TOTALS[benchmark]:,} published"
    lines = [f"{benchmark}: {total} rows, {len(here)} of {len(table)} subjects"]
    other = [
        f"{subject} {count} (published {table[subject].count})"
        for subject, count in here.items()
        if table[subject].count not in (None, count)
    ]
    if other:
        lines.append(f"{benchmark}: another number of rows than published: {', '.join(other)}")
    if missing := [subject for subject in table if subject not in here]:
        lines.append(f"{benchmark}: not there: {', '.join(missing)}")
    if apart := {subject: count for subject, count in found.apart.items() if count}:
        told = ", ".join(f"{subject} {count}" for subject, count in apart.items())
        lines.append(f"{benchmark}: left out, as their questions can't be told apart: {told}")
    return lines


def summary(benchmark: str, source: str, found: Conversion) -> dict:
    """What `summary.json` holds: where the data came from and the counts, published ones beside them."""
    table, subjects = SUBJECTS.get(benchmark, {}), defaultdict(dict)
    for (split, subject), count in found.questions.items():
        subjects[subject][split] = count
    return {
        "benchmark": benchmark,
        "source": source,
        "published": TOTALS.get(benchmark),
        "rows": sum(count for (split, _), count in found.rows.items() if split == "test"),
        "dropped": len(found.problems),
        "notes": describe(benchmark, found),
        "subjects": {
            name: {"title": about.name, "category": about.category, **counts}
            for name, counts in subjects.items()
            if counts.get("test")
            for about in [table.get(name, Subject("texts", None, name))]
        },
    }


def rows_of(config: PrepareConfig):
    """The rows of a folder in its published layout, or else of a `datasets` name."""
    if config.benchmark not in CONVERTERS:
        raise UserError(f"--benchmark {config.benchmark!r} is none of {', '.join(CONVERTERS)}")
    if config.bad_rows not in ("error", "drop"):
        raise UserError(f"--bad_rows {config.bad_rows!r} is neither error nor drop")
    if not config.data:
        raise UserError("--data is missing: name the folder with the benchmark's published files")
    if config.data.startswith("datasets:"):
        from colossal_eval.benchmarks.datasets_hub import hub_rows

        return hub_rows(config.benchmark, config.data.removeprefix("datasets:"))
    return CONVERTERS[config.benchmark](Path(config.data).expanduser())


def prepare(config: PrepareConfig) -> Path:
    """Convert one benchmark; returns its folder.

    Raises:
        UserError: another layout, malformed rows, an output that is there.
    """
    rows = rows_of(config)
    folder = Path(config.output).expanduser() / config.benchmark
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or give another --output")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        found = convert(rows, aside, config.subjects)
        if found.problems:
            shown = "\n  ".join(found.problems[:SHOWN])
            more = f"\n  and {len(found.problems) - SHOWN} more" if len(found.problems) > SHOWN else ""
            told = f"{len(found.problems)} malformed rows:\n  {shown}{more}"
            if config.bad_rows == "error":
                raise UserError(f"{told}\ncorrect them, or leave them out with --bad_rows drop")
            print(told, file=sys.stderr)
        text = json.dumps(summary(config.benchmark, config.data, found), ensure_ascii=False, indent=1)
        (aside / SUMMARY).write_text(text + "\n", encoding="utf-8")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print("\n".join([*describe(config.benchmark, found), f"written to {folder}"]))
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: prepare(parse_config(PrepareConfig, argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
