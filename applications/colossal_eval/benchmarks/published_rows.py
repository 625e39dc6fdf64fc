"""Reading what benchmarks are published as: folders of csv, jsonl and json files. Text stays text: "NA" is no gap."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coati.data import load_rows
from coati.errors import UserError
from colossal_eval.benchmarks.question import Question, check


@dataclass
class Row:
    """One published row: the questions it holds (none if it can't be scored here), or what is wrong with it.

    Attributes:
        split: "dev" or "test".
        location: `file:line`, or `file: entry N`.
    """

    split: str
    subject: str
    location: str
    questions: list[Question] | ValueError


def make_row(
    split: str, subject: str, location: str, make: Callable[..., Question | list[Question]], *arguments
) -> Row:
    """The row of what `make(*arguments)` returns, or of the ValueError that it or `check` raises."""
    try:
        made = make(*arguments)
        questions = made if isinstance(made, list) else [made]
        return Row(split, subject, location, [check(question) for question in questions])
    except (KeyError, TypeError) as error:
        return Row(split, subject, location, ValueError(f"a field is missing or of the wrong type ({error})"))
    except ValueError as error:
        return Row(split, subject, location, error)


def find_root(folder: Path, parts: list[str], inside: tuple[str, ...], expected: str) -> Path:
    """The first of `folder` and its subfolders `inside` that has all the folders or files `parts`.

    Raises:
        UserError: none has; `expected` says what the layout looks like.
    """
    for root in (folder, *(folder / name for name in inside)):
        if all((root / part).exists() for part in parts):
            return root
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder; expected {expected}")
    raise UserError(f"{folder} has no {' and '.join(parts)}; expected {expected}")


def subject_files(folder: Path, suffix: str, table: dict) -> dict[str, Path]:
    """Subject to file, for the files of `folder` that end in `suffix`, in the order of their names.

    Raises:
        UserError: there is none, or one whose subject the benchmark hasn't.
    """
    files = {path.name.removesuffix(suffix): path for path in sorted(folder.glob(f"*{suffix}"))}
    if not files:
        raise UserError(f"{folder} holds no file SUBJECT{suffix}; expected such as {next(iter(table))}{suffix}")
    if unknown := [subject for subject in files if subject not in table]:
        raise UserError(f"{files[unknown[0]]}: {unknown[0]!r} is no published subject; remove the file or rename it")
    return files


def check_pairs(dev: dict[str, Path], test: dict[str, Path], name: Callable[[str, str], Path]) -> None:
    """Raises a UserError that names the file which is missing beside one that is there."""
    for split, here, there in (("dev", dev, test), ("test", test, dev)):
        for subject in there:
            if subject not in here:
                raise UserError(
                    f"{name(split, subject)} is missing, though {there[subject]} is there: "
                    "few-shot examples and questions of a subject come together"
                )


def csv_rows(path: Path, header: list[str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """The line that each row starts at, and its cells; `header` are the columns that the first row must begin with.

    Raises:
        UserError: no rows, another header, not UTF-8, not csv.
    """
    count, start = 0, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            if header is not None:
                first = next(reader, [])
                if first[: len(header)] != header:
                    raise UserError(f"{path}:1 has the columns {first}; expected {','.join(header)}")
                start = reader.line_num + 1
            for cells in reader:
                if cells:
                    count += 1
                    yield start, cells
                start = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read as UTF-8 csv near line {start} ({error}): get the file again") from None
    if not count:
        columns = "question,A,B,C,D,answer" if header is None else ",".join(header)
        raise UserError(f"{path} holds no rows; expected {columns}")


def jsonl_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Line numbers from 1 on, and the objects; a ValueError where a line is none.

    Raises:
        UserError: the file is absent, or has no lines.
    """
    empty = True
    for number, value in load_rows(str(path)):
        empty = False
        yield number, value if isinstance(value, dict) else ValueError("the line is no JSON object")
    if empty:
        raise UserError(f"{path} is empty; expected one JSON object per line")


def check_object(value: dict | ValueError) -> dict:
    """The object itself; raises it if it is an error."""
    if isinstance(value, ValueError):
        raise value
    return value


def strip_letter(option: str) -> str:
    """The option without the letter that many benchmarks write before it: "(B) 3" and "B. 3" are "3"."""
    return re.sub(r"^\s*(?:[(（][A-J][)）]|[A-J][.．、:：])\s*", "", option).strip()
