"""Rows of .jsonl files as documents, read part by part so that several processes can share a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError
from colossal_llama.data.skipped_rows import Problems


@dataclass(frozen=True)
class Part:
    """Whole lines of a file: `size` bytes from byte `offset` on, which is the start of line `first_line`."""

    path: str
    offset: int
    size: int
    first_line: int


@dataclass(frozen=True)
class Document:
    """One row: only `target` is trained on; `source` may be empty."""

    line: int
    source: str
    target: str
    category: str


def split_file(path: str, part_bytes: int, digest) -> Iterator[Part]:
    """The parts of a .jsonl file, of about `part_bytes` each; all its bytes go into `digest` (of hashlib).

    Raises `UserError` if there is no such file or it is not .jsonl.
    """
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{path} is not a .jsonl file; write one JSON object per line and name the file so.")
    try:
        with open(path, "rb") as file:
            offset, line = 0, 1
            while block := file.read(part_bytes) + file.readline():
                digest.update(block)
                yield Part(path, offset, len(block), line)
                offset, line = offset + len(block), line + block.count(b"\n")
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({error.strerror}); correct --data.") from None


def read_documents(part: Part, category: str | None, bad: Problems) -> Iterator[Document]:
    """The documents of a part; malformed rows are counted in `bad`.

    `category` is that of rows that name none. Blank lines are no rows.
    """
    with open(part.path, "rb") as file:
        file.seek(part.offset)
        lines = file.read(part.size).split(b"\n")
    for number, line in enumerate(lines, start=part.first_line):
        if not line.strip():
            continue
        try:
            document = Document(number, *parse_row(line, category))
        except ValueError as error:
            bad.add(part.path, number, str(error))
            continue
        yield document


def check_part(part: Part, category: str | None) -> tuple[Counter[str], Problems]:
    """How many documents of each category a part holds, and its malformed rows."""
    bad = Problems()
    return Counter(document.category for document in read_documents(part, category, bad)), bad


def parse_row(line: bytes, category: str | None) -> tuple[str, str, str]:
    """`(source, target, category)` of a JSON line: `{"source", "target", "category"}` or `{"text", "category"}`.

    Raises `ValueError` with a short reason, equal for equal faults so that reasons can be counted.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("the line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("the line is not valid JSON") from None
    if not isinstance(row, dict):
        raise ValueError("the row is not an object with named fields")
    row = {key: value for key, value in row.items() if value is not None}
    if "text" in row and "target" in row:
        raise ValueError("the row has both `text` and `target`")
    field = "text" if "text" in row else "target"
    source = _text(row, "source", default="") if field == "target" else ""
    target = _text(row, field)
    if not target.strip():
        raise ValueError(f"`{field}` is empty")
    if "category" not in row and category is None:
        raise ValueError("`category` is missing, and --category names none for such rows")
    named = _text(row, "category", default=category)
    if not named.strip():
        raise ValueError("`category` is empty")
    return source, target, named


def _text(row: dict[str, Any], field: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if value is None:
        raise ValueError("the row has neither `target` nor `text`")
    if not isinstance(value, str):
        raise ValueError(f"`{field}` is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"`{field}` has half a surrogate pair (such as \\ud800), which is no character") from None
    return value
