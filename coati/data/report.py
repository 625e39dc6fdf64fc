"""What became of the rows that were read."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_PROBLEMS = 15
SHOWN_LINES = 3


@dataclass
class Problem:
    """One reason why rows of one source were dropped; `bad` is False for rows that are only too long."""

    source: str
    reason: str
    bad: bool
    count: int = 0
    lines: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.lines) else ""
        lines = ", ".join(map(str, self.lines))
        rows = "row" if self.count == 1 else "rows"
        return f"{self.count} {rows}: {self.reason} ({self.source}, line {lines}{more})"


@dataclass
class ValidationReport:
    """Rows read and samples kept of each source, and the problems by source and reason."""

    rows: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def drop(self, source: str, line: int, reason: str, bad: bool) -> None:
        """Count a row (or one record of it) that is dropped."""
        found = (p for p in self.problems if (p.source, p.reason, p.bad) == (source, reason, bad))
        problem = next(found, None)
        if problem is None:
            problem = Problem(source, reason, bad)
            self.problems.append(problem)
        problem.count += 1
        if len(problem.lines) < SHOWN_LINES and line not in problem.lines:
            problem.lines.append(line)

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
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, values: dict) -> ValidationReport:
        """The inverse of `dataclasses.asdict`."""
        problems = [Problem(**problem) for problem in values["problems"]]
        return cls(values["rows"], values["samples"], problems)
