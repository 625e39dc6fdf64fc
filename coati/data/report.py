"""A report on the rows that were read."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_PROBLEMS = 15
SHOWN_UNUSED = 5
SHOWN_LINES = 3


@dataclass
class Problem:
    """One reason why rows of one source were dropped, or one thing of kept rows that no sample holds; `bad` is True
    for rows that do not parse."""

    source: str
    reason: str
    bad: bool
    count: int = 0
    lines: list[int] = field(default_factory=list)
    last: int = 0

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.lines) else ""
        lines = ", ".join(map(str, self.lines))
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count} {rows}: {self.reason} ({self.source}, line {lines}{more})"

    def add(self, line: int) -> None:
        self.count += 1
        self.last = line
        if len(self.lines) < SHOWN_LINES and line not in self.lines:
            self.lines.append(line)


@dataclass
class ValidationReport:
    """Rows read and samples kept of each source, and by source and reason the problems (rows that were dropped) and
    the unused (parts of kept rows that no sample holds)."""

    rows: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)

    def drop(self, source: str, line: int, reason: str, bad: bool) -> None:
        """Count a row (or one record of it) that is dropped."""
        _find(self.problems, source, reason, bad).add(line)

    def note(self, source: str, line: int, what: str) -> None:
        """Count a row that is kept except for `what`, once for all of its records, which come one after another."""
        entry = _find(self.unused, source, what, bad=False)
        if entry.last != line:
            entry.add(line)

    @property
    def bad_rows(self) -> int:
        return sum(problem.count for problem in self.problems if problem.bad)

    def first_line(self) -> str:
        """The first problem, bad rows before long ones; or that there is none."""
        worst = sorted(self.problems, key=lambda p: not p.bad)
        if not worst:
            return f"{sum(self.samples.values())} samples from {sum(self.rows.values())} rows"
        first, total = worst[0], self.rows[worst[0].source]
        return f"{first.source} line {first.lines[0]}: {first.reason} ({first.count} of {total} rows)"

    def __str__(self) -> str:
        lines = [f"{source}: {rows} rows, {self.samples[source]} samples" for source, rows in self.rows.items()]
        problems = sorted(self.problems, key=lambda p: (not p.bad, -p.count))
        lines += [f"  dropped {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        if hidden := problems[SHOWN_PROBLEMS:]:
            lines.append(f"  dropped {sum(p.count for p in hidden)} more rows for {len(hidden)} other reasons")
        unused = sorted(self.unused, key=lambda p: -p.count)
        lines += [f"  not used of {part}" for part in unused[:SHOWN_UNUSED]]
        if hidden := unused[SHOWN_UNUSED:]:
            lines.append(f"  not used either: {', '.join(f'{p.reason} ({p.count} rows)' for p in hidden)}")
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, values: dict) -> ValidationReport:
        """The inverse of `dataclasses.asdict`."""
        problems, unused = ([Problem(**p) for p in values[name]] for name in ("problems", "unused"))
        return cls(values["rows"], values["samples"], problems, unused)


def _find(problems: list[Problem], source: str, reason: str, bad: bool) -> Problem:
    """The one of this source and reason; a new one if there is none yet."""
    for problem in problems:
        if (problem.source, problem.reason, problem.bad) == (source, reason, bad):
            return problem
    problems.append(Problem(source, reason, bad))
    return problems[-1]
