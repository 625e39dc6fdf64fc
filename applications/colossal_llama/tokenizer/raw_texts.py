"""Reading raw text: .jsonl and .txt files, one document at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coati.errors import UserError


def read_texts(paths: Iterable[str | Path], field: str = "text") -> Iterator[str]:
    """Yield the documents of the files, in order; one document is in memory at a time.

    A row of a .jsonl file is a document: its `field`, else `source` and `target` after each other (Colossal-LLaMA's
    form). In a .txt file blank lines separate documents, as in BERT's pre-training data. Rows of nothing but
    spaces are left out, but a file must have one document.

    Raises:
        UserError: a file is missing, of another kind, empty or not UTF-8, or a row is not JSON or has no text; the
            message names file and line.
    """
    for path in map(Path, paths):
        if path.suffix not in (".jsonl", ".txt"):
            raise UserError(f"{path} is neither a .jsonl nor a .txt file; convert it.")
        texts = _jsonl(path, field) if path.suffix == ".jsonl" else _txt(path)
        empty = True
        for text in texts:
            if text.strip():
                empty = False
                yield text
        if empty:
            raise UserError(f"{path} holds no text; correct it or leave it out.")


def sample_texts(texts: Iterable[str], size: int, seed: int) -> list[str]:
    """`size` of the texts, each with the same chance (reservoir sampling, Vitter 1985, algorithm R), or all."""
    generator = random.Random(seed)
    sample: list[str] = []
    for count, text in enumerate(texts):
        if count < size:
            sample.append(text)
        elif (place := generator.randrange(count + 1)) < size:
            sample[place] = text
    return sample


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} is not UTF-8 ({error.reason}); convert the file to UTF-8.") from None


def _txt(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\r\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\r\n")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path}:{number} is not valid JSON; correct or remove the line.") from None
            yield _text_of(row, field, f"{path}:{number}")


def _text_of(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object; write rows such as {{{json.dumps(field)}: ...}}.")
    if field not in row and "target" not in row:
        raise UserError(f"{place} has neither {field!r} nor 'target'; name the text's field.")
    names = [field] if field in row else ["source", "target"]
    parts = [row.get(name, "") for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, str):
            raise UserError(f"{place}: {name!r} is not a text; correct the row.")
        if not _is_encodable(part):
            raise UserError(f"{place}: {name!r} has half of a surrogate pair (\\ud800 to \\udfff); correct the row.")
    return "".join(parts)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
