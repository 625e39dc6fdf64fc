"""Tokenized data sets: built once, kept as memory-mapped arrow files, with a report on the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coati.data.config import DataConfig, check_weights
from coati.data.records import Kind, Record, one_record_per_response, parse_record
from coati.data.report import ValidationReport
from coati.data.sources import fingerprint, load_rows
from coati.data.teaching import Teaching
from coati.data.tokenize import (
    PreferenceSample,
    PromptSample,
    ScoredSample,
    SkippedRow,
    StepwiseSample,
    TokenizedSample,
    TokenSequence,
    UnpairedSample,
    tokenize_many,
)
from coati.errors import UserError, unwritable
from coati.files import atomic_write

# Count up whenever the same rows and settings give other tokens or other files.
FORMAT_VERSION = 7
CHUNK_ROWS = 256


class TokenizedDataset:
    """A list of samples, with `lengths` (int array `[rows]`) and the `report`.

    `part_names` and `part_of_row` (int array `[rows]`) are the values of `part_column`, -1 for a row without one; if no
    column is given the sources' file names without folder and ending, or complete where two are alike.

    `key` tells the rows from any others: a hash of the sources' content, the tokenizer and the settings.

    `weights_per_row` (float `[rows]`, or None) is what `BatchSampler` takes.
    """

    def __init__(
        self, folder: Path, sources: list[str], weights: list[float] | None = None, has_parts: bool = False
    ) -> None:
        import datasets

        self.key = folder.name
        self._table = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        self.report = ValidationReport.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
        self.lengths = np.asarray(self._table.data.column("length"), dtype=np.int64)
        source_of_row = np.asarray(self._table.data.column("source"), dtype=np.int64)
        self.weights_per_row = None if weights is None else np.asarray(weights, dtype=float)[source_of_row]
        if has_parts:
            values = self._table.data.column("part").to_pylist()
            self.part_names = sorted({value for value in values if value is not None})
            numbers = {name: number for number, name in enumerate(self.part_names)}
            self.part_of_row = np.array([numbers.get(value, -1) for value in values], dtype=np.int64)
        else:
            stems = [Path(source).stem for source in sources]
            self.part_names = stems if len({*stems}) == len(stems) else sources
            self.part_of_row = source_of_row

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> TokenizedSample:
        return _from_row(self._table[int(row)])

    def __iter__(self) -> Iterator[TokenizedSample]:
        return (self[row] for row in range(len(self)))

    def teachers_of(self, rows: Sequence[int]) -> list[str | None]:
        """The names of some rows' teachers, see `Teaching`."""
        return self._table.data.column("teacher").take(list(rows)).to_pylist()

    def scores_given(self) -> list[int]:
        """Of `scored` rows, how many have a score of each objective."""
        import pyarrow.compute

        scores = pyarrow.compute.list_flatten(self._table.data.column("scores")).to_numpy()
        return (~np.isnan(scores.reshape(len(self), -1))).sum(0).tolist()


def build_dataset(
    sources: list[str],
    kind: Kind,
    tokenizer,
    config: DataConfig,
    weights: list[float] | None = None,
    teaching: Teaching | None = None,
    part_column: str | None = None,
    objectives: Sequence[str] = (),
) -> TokenizedDataset:
    """Read, check and tokenize `sources`, or open the cached result of the same rows, tokenizer and settings.

    `tokenizer` went through `prepare_tokenizer`; `weights` are one per source; `teaching` is of rows that are read by a
    teacher too; `part_column` is the field whose values name the rows' parts; `objectives` are those whose scores are
    read of `scored` rows. Processes that build the same data at the same time wait for the first.

    Raises `UserError` for a missing source, for bad rows unless `config.bad_rows` is "drop", when no sample is left,
    when no row has the `part_column`, and for an objective that no row has a score of.
    """
    from filelock import FileLock

    if not sources:
        raise UserError(f"No {kind} data is named; give at least one file with --train_data or --eval_data.")
    check_weights(weights, sources, "The list of data weights")
    cache = Path(config.cache_dir or "~/.cache/coati").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {cache} can't be created ({error.strerror}); change --cache_dir.") from None
    wanted = _Wanted(kind, teaching, part_column, tuple(objectives))
    folder = cache / f"{kind}-{_key(sources, wanted, tokenizer, config)}"
    if not folder.exists():
        with cache_write_errors(cache), FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(folder, sources, wanted, tokenizer, config)
    data = TokenizedDataset(folder, sources, weights, part_column is not None)
    _raise_on_problems(data, config)
    if not data.part_names:
        raise UserError(f"no row of {', '.join(sources)} has the field {part_column!r}: correct --eval_column")
    _raise_on_missing_scores(data, sources, objectives)
    return data


@contextmanager
def cache_write_errors(cache: Path) -> Iterator[None]:
    """Raises `UserError` where the block finds the cache folder full or read-only."""
    try:
        yield
    except Exception as error:
        place = getattr(error, "filename", None)  # errors of writing, unlike those of opening, name none
        reason = unwritable(error) if place is None or str(place).startswith(str(cache)) else None
        if reason is None:
            raise
        raise UserError(f"The cache folder {cache} can't be written ({reason}); change --cache_dir.") from error


def _raise_on_problems(data: TokenizedDataset, config: DataConfig) -> None:
    report = data.report
    if report.bad_rows and config.bad_rows == "error":
        raise UserError(f"{report.first_line()}; correct the data or drop such rows with --bad_rows drop.")
    if len(data) == 0:
        sources = ", ".join(report.rows)
        first_problem = f": {report.first_line()}" if report.problems else ""
        raise UserError(f"No usable rows in {sources}{first_problem}; check the data's format and length limits.")


def _raise_on_missing_scores(data: TokenizedDataset, sources: list[str], objectives: Sequence[str]) -> None:
    if not objectives:
        return
    for objective, count in zip(objectives, data.scores_given(), strict=True):
        if count == 0:
            raise UserError(
                f"No row of {', '.join(sources)} has a score of {objective!r}, in `scores` or in a field of that name; "
                "correct --objectives."
            )


@dataclass(frozen=True)
class _Wanted:
    """What is read of rows, see `build_dataset`."""

    kind: Kind
    teaching: Teaching | None
    part_column: str | None
    objectives: tuple[str, ...]


def _key(sources: list[str], wanted: _Wanted, tokenizer, config: DataConfig) -> str:
    """A hash of all that the tokenized rows and the report depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls of the tokenizer leave their padding and truncation behind; ours use neither.
    for state in ("padding", "truncation"):
        backend.pop(state, None)
    names = ("max_length", "max_prompt_length", "too_long", "train_on", "step_separator")
    settings = {name: getattr(config, name) for name in names}
    settings["chat_template_kwargs"] = config.template_arguments
    parts = [
        FORMAT_VERSION,
        asdict(wanted),
        settings,
        [(source, fingerprint(source)) for source in sources],
        [backend, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _build(folder: Path, sources: list[str], wanted: _Wanted, tokenizer, config: DataConfig) -> None:
    """Write the samples and the report to a partial folder, then rename it to `folder`."""
    from datasets.arrow_writer import ArrowWriter

    report = ValidationReport()
    with atomic_write(folder) as partial:
        partial.mkdir()
        with ArrowWriter(features=_features(), path=str(partial / "rows.arrow")) as writer:
            for row in _samples(sources, wanted, tokenizer, config, report):
                writer.write(row)
            writer.finalize()
        (partial / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")


def _samples(
    sources: list[str], wanted: _Wanted, tokenizer, config: DataConfig, report: ValidationReport
) -> Iterator[dict[str, Any]]:
    """The kept samples as table rows; every other row is counted in `report`."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}: {task.completed} rows"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for index, source in enumerate(sources):
            report.rows.setdefault(source, 0)
            report.samples.setdefault(source, 0)
            task = progress.add_task(f"Tokenizing {source}", total=None)
            chunk: list[_Read] = []
            for read in _records(source, wanted, config, report):
                chunk.append(read)
                if len(chunk) == CHUNK_ROWS:
                    yield from _tokenized(chunk, source, index, tokenizer, config, report)
                    chunk = []
                    progress.update(task, completed=report.rows[source])
            yield from _tokenized(chunk, source, index, tokenizer, config, report)


@dataclass(frozen=True)
class _Read:
    """A record, its line in its source, and what the row says of it besides."""

    line: int
    record: Record
    teacher: str | None
    part: str | None


def _records(source: str, wanted: _Wanted, config: DataConfig, report: ValidationReport) -> Iterator[_Read]:
    """The records of a source; what is none is counted in the report."""
    teaching = wanted.teaching
    for line, row in load_rows(source):
        report.rows[source] += 1
        try:
            if isinstance(row, ValueError):
                raise row
            records, teacher = parse_record(row, wanted.kind, wanted.objectives), None
            if teaching is not None:
                records, teacher = [teaching.add_to(record) for record in records], teaching.teacher_of(row)
        except ValueError as error:
            report.drop(source, line, str(error), bad=True)
            continue
        if config.train_on == "each":
            records = [one for record in records for one in one_record_per_response(record)]
        part = None if wanted.part_column is None else row.get(wanted.part_column)
        yield from (_Read(line, record, teacher, None if part is None else str(part)) for record in records)


def _tokenized(chunk, source: str, index: int, tokenizer, config: DataConfig, report) -> Iterator[dict[str, Any]]:
    empty = dict.fromkeys(_features())
    results = tokenize_many([read.record for read in chunk], tokenizer, config)
    for read, tokenized in zip(chunk, results, strict=True):
        sample = tokenized.sample
        if isinstance(sample, ValueError):
            report.drop(source, read.line, str(sample), bad=not isinstance(sample, SkippedRow))
        else:
            report.samples[source] += 1
            for note in tokenized.notes:
                report.note(source, read.line, note)
            told = {"source": index, "teacher": read.teacher, "part": read.part}
            yield {**empty, "length": len(sample), **told, **_to_row(sample)}


def _features():
    """One table format for every kind: a list of token sequences (two for a pair, and for a prompt that a teacher reads
    in another way; three if it has a place for a response), and what a kind adds. The margin of an unpaired response is
    1 if it is good, else 0. Labels of steps stand at their tokens, NaN at others."""
    from datasets import Features, List, Value

    numbers = {"length": Value("int32"), "source": Value("int32"), "margin": Value("float64"), "tie": Value("bool")}
    numbers |= {"step_labels": List(Value("float64")), "scores": List(Value("float64"))}
    sequences = {"input_ids": List(List(Value("int32"))), "loss_masks": List(List(Value("bool")))}
    # Columns differ from row to row and source to source, so they are kept as JSON.
    texts = {name: Value("large_string") for name in ("text", "columns", "teacher", "part")}
    return Features({**numbers, **sequences, **texts})


def _to_row(sample: TokenizedSample) -> dict[str, Any]:
    if isinstance(sample, PromptSample):
        columns = json.dumps(sample.columns, default=str)
        prompts = [ids for ids in (sample.input_ids, sample.teacher_ids, sample.teacher_rest) if ids is not None]
        return {"input_ids": prompts, "loss_masks": [], "text": sample.text, "columns": columns}
    margin: float | None = None
    tie: bool | None = None
    step_labels: list[float] | None = None
    scores: list[float] | None = None
    if isinstance(sample, PreferenceSample):
        sides, margin, tie = [sample.chosen, sample.rejected], sample.margin, sample.tie
    elif isinstance(sample, UnpairedSample):
        sides, margin = [sample.sequence], float(sample.desirable)
    elif isinstance(sample, StepwiseSample):
        sides, step_labels = [sample.sequence], sample.labels
    elif isinstance(sample, ScoredSample):
        sides, scores = [sample.sequence], sample.scores
    else:
        sides = [sample]
    ids, masks = [side.input_ids for side in sides], [side.loss_mask for side in sides]
    kinds = {"margin": margin, "tie": tie, "step_labels": step_labels, "scores": scores}
    return {"input_ids": ids, "loss_masks": masks, **kinds}


def _from_row(row: dict[str, Any]) -> TokenizedSample:
    if row["columns"] is not None:
        ids, *of_teacher = row["input_ids"]
        return PromptSample(ids, row["text"], json.loads(row["columns"]), *of_teacher)
    sides = [TokenSequence(ids, mask) for ids, mask in zip(row["input_ids"], row["loss_masks"], strict=True)]
    if len(sides) == 2:
        return PreferenceSample(sides[0], sides[1], row["margin"], row["tie"])
    if row["step_labels"] is not None:
        return StepwiseSample(sides[0], row["step_labels"])
    if row["scores"] is not None:
        return ScoredSample(sides[0], row["scores"])
    return sides[0] if row["margin"] is None else UnpairedSample(sides[0], row["margin"] > 0)
