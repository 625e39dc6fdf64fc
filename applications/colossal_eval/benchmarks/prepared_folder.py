"""The folder of a prepared benchmark: what is in it, how it is written and read.

`FOLDER/BENCHMARK/test/SUBJECT.jsonl` has the scored questions, `dev/SUBJECT.jsonl` those that few-shot examples are
taken from, and `summary.json` the counts. One JSON object per line with the fields of `Question`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from coati.errors import UserError
from coati.tracking.files import read_object
from colossal_eval.benchmarks.published_rows import Row
from colossal_eval.benchmarks.question import Question, check
from colossal_eval.benchmarks.subjects import SUBJECTS, TOTALS, Subject

SUMMARY = "summary.json"


@dataclass
class Conversion:
    """What was read.

    Attributes:
        rows: published rows by split and subject.
        questions: scored questions by split and subject; a row may hold several, or none that can be scored here.
        inseparable: rows that hold several questions which can't be told apart, by subject.
        problems: one line per malformed row.
    """

    rows: Counter = field(default_factory=Counter)
    questions: Counter = field(default_factory=Counter)
    inseparable: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def scored_rows(self) -> dict[str, int]:
        """Rows of the scored split by subject."""
        return {subject: count for (split, subject), count in self.rows.items() if split == "test"}


def write_questions(rows: Iterable[Row], folder: Path, subjects: list[str]) -> Conversion:
    """Writes the questions of `rows` to `folder`, in the order they come, those of `subjects` only unless it's empty.

    Raises:
        UserError: two questions of one id; a subject of `subjects` that is not there.
    """
    conversion = Conversion()
    ids: set[str] = set()
    for row in rows:
        if subjects and row.subject not in subjects:
            continue
        if isinstance(row.questions, ValueError):
            conversion.problems.append(f"{row.location}: {row.questions}")
            continue
        conversion.rows[row.split, row.subject] += 1
        if not row.questions:
            conversion.inseparable[row.subject] += 1
        for question in row.questions:
            if question.id in ids:
                raise UserError(f"{row.location}: the question {question.id} is there twice")
            ids.add(question.id)
            conversion.questions[row.split, row.subject] += 1
        path = folder / row.split / f"{row.subject}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(map(to_line, row.questions))
    scored_rows = conversion.scored_rows()
    if missing := [subject for subject in subjects if subject not in scored_rows]:
        raise UserError(
            f"the data has no subject {missing[0]!r}; it has {', '.join(sorted(scored_rows)) or 'none of those'}"
        )
    return conversion


def to_line(question: Question) -> str:
    """The question as a line of JSON."""
    return json.dumps(asdict(question), ensure_ascii=False) + "\n"


def describe(benchmark: str, conversion: Conversion) -> list[str]:
    """Lines that compare what is there with what is published."""
    scored_rows, table = conversion.scored_rows(), SUBJECTS.get(benchmark)
    if table is None:
        return [f"{benchmark}: {sum(scored_rows.values()):,} documents of {len(scored_rows)} files"]
    total = f"{sum(scored_rows.values()):,} of {TOTALS[benchmark]:,} published"
    lines = [f"{benchmark}: {total} rows, {len(scored_rows)} of {len(table)} subjects"]
    other = [
        f"{subject} {count} (published {table[subject].count})"
        for subject, count in scored_rows.items()
        if table[subject].count not in (None, count)
    ]
    if other:
        lines.append(f"{benchmark}: another number of rows than published: {', '.join(other)}")
    if missing := [subject for subject in table if subject not in scored_rows]:
        lines.append(f"{benchmark}: not there: {', '.join(missing)}")
    if inseparable := [f"{subject} {count}" for subject, count in conversion.inseparable.items()]:
        lines.append(f"{benchmark}: left out, as their questions can't be told apart: {', '.join(inseparable)}")
    return lines


def write_summary(folder: Path, benchmark: str, source: str, conversion: Conversion) -> None:
    """Writes `summary.json`: where the data came from, the counts beside the published ones, and the subjects."""
    table, subjects = SUBJECTS.get(benchmark, {}), {}
    for split, subject in conversion.questions:
        if split == "test":
            about = table.get(subject, Subject("texts", None, subject))
            counts = {s: conversion.questions[s, subject] for s in ("dev", "test") if conversion.questions[s, subject]}
            subjects[subject] = {"title": about.name, "category": about.category, **counts}
    summary = {
        "benchmark": benchmark,
        "source": source,
        "published": TOTALS.get(benchmark),
        "rows": sum(conversion.scored_rows().values()),
        "dropped": len(conversion.problems),
        "notes": describe(benchmark, conversion),
        "subjects": subjects,
    }
    (folder / SUMMARY).write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of one file.

    Raises:
        UserError: the file is absent, or a line is no question; names file and line.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: make it with applications/colossal_eval/prepare.py")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield check(Question(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}:{number} is no question ({error}): prepare the benchmark again") from None


def read_dialogues(folder: Path) -> list[Question]:
    """All questions of a prepared MT-Bench, or of a folder in its form.

    Raises:
        UserError: there are none; see `read_questions`.
    """
    questions = [question for path in sorted((folder / "test").glob("*.jsonl")) for question in read_questions(path)]
    if not questions:
        raise UserError(f"{folder} has no questions in test/*.jsonl: make it with prepare.py --benchmark mt_bench")
    return questions


def read_summary(folder: Path) -> dict:
    """`summary.json` of one benchmark's folder.

    Raises:
        UserError: it is absent or broken.
    """
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"{folder} holds no prepared benchmark ({SUMMARY} is missing): "
            f"run applications/colossal_eval/prepare.py --benchmark {folder.name}"
        )
    return read_object(folder / SUMMARY)
