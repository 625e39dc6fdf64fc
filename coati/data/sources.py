"""Reading rows from files and from `datasets` names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from coati.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


def load_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yield `(line_number, row)` from 1 on; `row` is a `ValueError` where a JSON line cannot be read.

    `source` is a .jsonl, .json (a list) or .parquet file, a directory that `datasets` can load, or a name
    `name`, `org/name` or `org/name/config`, with `:split` at the end unless the split is `train`.
    Raises `UserError` when the source does not exist or cannot be read as a whole.
    """
    path = _file(source)
    if path is None:
        return enumerate(_named_dataset(source), start=1)
    return {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix](path)


def check_source(source: str) -> None:
    """Raise `UserError` when `source` is a file that does not exist or has an unknown format; nothing is read."""
    _file(source)


def fingerprint(source: str) -> str:
    """A hash of the source's content; `UserError` when it does not exist."""
    path = _file(source)
    if path is None:
        return _named_dataset(source)._fingerprint
    return hash_file(path)


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _file(source: str) -> Path | None:
    """The file that `source` names, or None if it is a name or directory for `datasets`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return None
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"{source} has an unknown format; give a {', '.join(SUFFIXES)} file.")
    looks_like_file = path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 2
    if looks_like_file and not path.is_file():
        raise UserError(f"The data file {source} does not exist (looked in {Path.cwd()}); correct the path.")
    return path if looks_like_file else None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                # Deep nesting ends in a RecursionError, bytes that are not UTF-8 in a ValueError.
                except (ValueError, RecursionError):
                    yield number, ValueError("the line is not valid JSON")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct it or use one JSON object a line.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} does not hold a JSON list; write the rows as a list or as .jsonl.")
    return enumerate(rows, start=1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                yield number, row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet ({_first_line(error)}); write it again.") from None


@lru_cache(maxsize=8)
def _named_dataset(source: str):
    import datasets

    directory = Path(source).expanduser()
    name, _, split = (source, "", "") if directory.is_dir() else source.partition(":")
    parts = name.split("/")
    config = parts.pop() if not directory.is_dir() and len(parts) == 3 else None
    path = str(directory) if directory.is_dir() else "/".join(parts)
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
