"""Skipped rows, counted by file and reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

SHOWN_LINES = 3


@dataclass
class Problem:
    """One reason for which rows of one file were skipped, with the numbers of the first few lines."""

    file: str
    reason: str
    count: int = 0
    first_lines: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ", ".join(map(str, self.first_lines)) + (", ..." if self.count > len(self.first_lines) else "")
        return f"{self.count:,} rows: {self.reason} ({self.file}, line {lines})"


class Problems:
    """Problems in the order in which they were first met."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        self._by_key: dict[tuple[str, str], Problem] = {}
        self.extend(problems)

    def __iter__(self):
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, file: str, line: int, reason: str) -> None:
        """Count a row that is skipped; reasons are equal for equal faults."""
        self.extend([Problem(file, reason, 1, [line])])

    def extend(self, later: Iterable[Problem]) -> None:
        """Add the problems of rows that come later."""
        for problem in later:
            known = self._by_key.setdefault((problem.file, problem.reason), Problem(problem.file, problem.reason))
            known.count += problem.count
            known.first_lines = (known.first_lines + problem.first_lines)[:SHOWN_LINES]

    def count(self, file: str) -> int:
        """How many rows of a file were skipped."""
        return sum(problem.count for problem in self if problem.file == file)

    def as_json(self) -> list[dict]:
        """A list of objects with the fields of `Problem`, which takes them as keywords."""
        return [asdict(problem) for problem in self]
