"""What trainer and generators did when, as bars: of a run that samples with generators (docs/asynchronous.md)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from coati.errors import UserError

ITERATIONS = 10  # that are drawn: the last ones
WIDTH, LEFT, RIGHT, LANE = 1100, 90, 10, 26  # LANE: a lane's height
# What a trainer's iteration consists of, in order, as its metrics `seconds/...` name it
PHASES = ("publish", "wait", "score", "evaluate", "teach", "learn", "average")
IDLE = "wait"
COLORS = {"generate": 0, "learn": 1, "evaluate": 2, "teach": 2, "score": 3, "publish": 4, "load": 4, "average": 5}


@dataclass(frozen=True)
class Bar:
    """Something that took from `start` to `end`, seconds since the epoch."""

    start: float
    end: float
    kind: str
    title: str


def trainer_bars(metrics: Sequence[dict[str, Any]]) -> list[Bar]:
    """The iterations of the process that logs.

    Args:
        metrics: rows of a run's `metrics.jsonl`; `time` is when the iteration had ended.
    """
    bars = []
    for row in metrics:
        parts = [(name, row[f"seconds/{name}"]) for name in PHASES if f"seconds/{name}" in row]
        start = row["time"] - sum(seconds for _, seconds in parts)
        for name, seconds in parts:
            bars.append(Bar(start, start + seconds, name, f"iteration {row['step']}: {name}"))
            start += seconds
    return bars


def generator_bars(journal: Path) -> dict[int, list[Bar]]:
    """The jobs of each generator by its number, in order.

    Args:
        journal: folder of the samples; a file's first line tells of its job.

    Raises:
        UserError: a file is damaged.
    """
    bars: dict[int, list[Bar]] = defaultdict(list)
    for path in journal.glob("version-*/*.jsonl"):
        try:
            with path.open(encoding="utf-8") as file:
                job = json.loads(file.readline())
        except ValueError:
            raise UserError(f"{path}:1 tells of no job; delete the file.") from None
        title = f"version {job['version']}: {job['samples']} samples"
        start = job["started"]
        for kind in ("load", "generate"):
            end = start + job["seconds"][kind]
            bars[job["generator"]].append(Bar(start, end, kind, f"{title}, {kind}"))
            start = end
    return {number: sorted(bars[number], key=lambda bar: bar.start) for number in sorted(bars)}


def idle_share(bars: Sequence[Bar], start: float, end: float) -> float:
    """The share of a time without a bar, or with one that waits."""
    busy = sum(max(0.0, min(bar.end, end) - max(bar.start, start)) for bar in bars if bar.kind != IDLE)
    return max(0.0, 1 - busy / (end - start))


def timeline(metrics: Sequence[dict[str, Any]], journal: Path) -> str:
    """The last iterations as HTML, a lane for the trainer and one for each generator; "" if the run has none."""
    rows = [row for row in metrics if f"seconds/{IDLE}" in row][-ITERATIONS:]
    if not rows:
        return ""
    lanes = {"trainer": trainer_bars(rows)}
    lanes |= {f"generator {number}": bars for number, bars in generator_bars(journal).items()}
    return _legend(lanes) + _drawing(lanes, lanes["trainer"][0].start, rows[-1]["time"])


def _legend(lanes: dict[str, list[Bar]]) -> str:
    drawn = {bar.kind for bars in lanes.values() for bar in bars}
    names: dict[int, list[str]] = defaultdict(list)
    for kind, color in COLORS.items():
        if kind in drawn:
            names[color].append(kind)
    keys = "".join(f"<span><i class='key c{color}'></i>{', '.join(kinds)}</span>" for color, kinds in names.items())
    return f"<p class='legend'>{keys}</p>"


def _drawing(lanes: dict[str, list[Bar]], start: float, end: float) -> str:
    """The bars of a time as an `<svg>`; what waits is left blank."""
    height = LANE * len(lanes) + 20
    scale = (WIDTH - LEFT - RIGHT) / (end - start)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Timeline">']
    for lane, (name, bars) in enumerate(lanes.items()):
        top = lane * LANE
        parts.append(f'<text x="0" y="{top + 10}">{name}</text>')
        parts.append(f'<text x="0" y="{top + 21}">{idle_share(bars, start, end):.0%} idle</text>')
        for bar in bars:
            left, right = max(bar.start, start), min(bar.end, end)
            if bar.kind == IDLE or right <= left:
                continue
            parts.append(
                f'<rect class="bar c{COLORS[bar.kind]}" x="{LEFT + (left - start) * scale:.1f}" y="{top + 2}" '
                f'width="{(right - left) * scale:.1f}" height="{LANE - 6}">'
                f"<title>{escape(bar.title)}, {bar.end - bar.start:.3g} s</title></rect>"
            )
    parts.append(f'<text x="{LEFT}" y="{height - 4}">0 s</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{end - start:.3g} s</text>')
    return "".join([*parts, "</svg>"])
