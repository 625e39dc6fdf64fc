"""Reading rows from files and from `datasets` names."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from coati.errors import UserError

TEXTS = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".bz2", ".zst")
SUFFIXES = (*TEXTS, *(text + packed for text in TEXTS for packed in COMPRESSED), ".parquet")


def load_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line_number, row)` from 1 on; `row` is a `ValueError` where a JSON line cannot be read.

    `source` is a file of JSON lines or of a JSON list (.jsonl, .ndjson, .json, also .gz, .bz2 or .zst), a .parquet
    file, a folder that `datasets` saved or can load, or a name `name`, `org/name` or `org/name/config`; with `:split`
    at the end unless the split is `train` (a file has no other), which may be a slice: `:train[:100]`. Nulls in the
    fields of tables are left out at every level: there they mean that a row lacks the field.

    Raises `UserError` when the source does not exist or cannot be read as a whole.
    """
    place = _local(source)
    if place is None:
        return enumerate(map(_without_nulls, _named_dataset(source)), start=1)
    path, split = place
    if path.is_dir():
        return enumerate(map(_without_nulls, _folder(path, split)), start=1)
    rows = _parquet(path) if path.suffix == ".parquet" else _json(path)
    if not split:
        return rows
    read = list(rows)
    return chain.from_iterable(read[part] for _, part in _slices(source, split, {"train": len(read)}))


def check_source(source: str) -> None:
    """Raise `UserError` when `source` is a file that does not exist or has an unknown format; nothing is read."""
    _local(source)


def fingerprint(source: str) -> str:
    """A hash of the source's content; `UserError` when it does not exist."""
    place = _local(source)
    if place is None:
        return _named_dataset(source)._fingerprint
    path, split = place
    return _folder(path, split)._fingerprint if path.is_dir() else hash_file(path)


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _local(source: str) -> tuple[Path, str] | None:
    """The file or folder that `source` names and its split, "" if none is given; None for a name of the hub's."""
    path, split = Path(source).expanduser(), ""
    if not path.exists():
        head, _, split = source.partition(":")
        path = Path(head).expanduser()
    if not path.exists():
        if path.name.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 2:
            raise UserError(f"The data file {source} does not exist (looked in {Path.cwd()}); correct the path.")
        return None
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise UserError(f"{source} has an unknown format; give a .jsonl, .json or .parquet file.")
    return path, split


def _slices(source: str, split: str, lengths: dict[str, int]) -> list[tuple[str, slice]]:
    """The rows that `split` names, in the syntax of `datasets`: `train[:100]`, `train[10%:]+test`."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        known = ", ".join(lengths)
        raise UserError(f"{source} has no split {split!r} ({_first_line(error)}); it has {known}.") from None
    return [(part.splitname, slice(part.from_, part.to)) for part in parts]


# --- files


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """JSON lines or one JSON list, whatever the name says."""
    lines = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return iter(())
    row, all_lines = _row(first[1]), chain([first], lines)
    if first[1].lstrip().startswith("["):
        return enumerate(_whole(path, all_lines), start=1)
    if ".json" in path.suffixes and isinstance(row, ValueError):
        return enumerate([_whole(path, all_lines)], start=1)  # one object over several lines
    if ".json" in path.suffixes and row == {}:
        raise UserError(f"{path} does not hold a JSON list; write the rows as a list or as .jsonl.")
    return ((number, _row(line)) for number, line in all_lines)


def _row(line: str) -> Any:
    try:
        line.encode()
    except UnicodeEncodeError:
        return ValueError("the line is not UTF-8 text; save the file as UTF-8")
    try:
        return json.loads(line)
    # Deep nesting ends in a RecursionError.
    except (ValueError, RecursionError):
        return ValueError("the line is not valid JSON")


def _whole(path: Path, lines: Iterable[tuple[int, str]]) -> Any:
    try:
        return json.loads("".join(line for _, line in lines))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct it or use one JSON object a line.") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text in UTF-8, UTF-16 or UTF-32, packed or not; they may end in LF, CR LF or CR.

    Bytes that are no UTF-8 become lone surrogates.
    """
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="detect") as file:
            encoding = json.detect_encoding(file.read(4))
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        with pyarrow.input_stream(str(path), compression="detect") as file:
            yield from io.TextIOWrapper(file, encoding=encoding, errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding.upper()} text ({error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); write it again.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                yield number, _without_nulls(row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet ({_first_line(error)}); write it again.") from None


def _without_nulls(value: Any) -> Any:
    """Without the fields that are null: a table gives every row the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


# --- what `datasets` reads


@lru_cache(maxsize=8)
def _folder(path: Path, split: str):
    """A split of a folder that `datasets` saved, or of one that holds files."""
    import datasets

    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return _load(f"{path}:{split}" if split else str(path), str(path), None, split)
    try:
        saved = datasets.load_from_disk(str(path))
    # What it raises for files that are missing or damaged is documented nowhere.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {_first_line(error)}); save it again."
        ) from None
    splits = saved if isinstance(saved, dict) else {"train": saved}
    parts = _slices(str(path), split or "train", {str(name): len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[name].select(range(len(splits[name]))[part]) for name, part in parts])


@lru_cache(maxsize=8)
def _named_dataset(source: str):
    name, _, split = source.partition(":")
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    return _load(source, "/".join(parts), config, split)


def _load(source: str, path: str, config: str | None, split: str):
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split or "train")
    # What `datasets` raises for a wrong name, config or split, or without a network, is documented nowhere.
    except Exception as error:
        raise UserError(
            f"{source} is neither a file nor a set that `datasets` can load "
            f"({type(error).__name__}: {_first_line(error)}); correct the path, name, config or split."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
