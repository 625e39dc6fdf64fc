"""Line charts as inline SVG: axes, ticks, hover titles, no script. Colors come from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 34
COLORS = 8
_DRAWN, _HOVERED, _SMOOTHED = 300, 60, 40

Points = list[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]


@dataclass
class Line:
    """One curve: `points` are (step, value) in step order; values may be NaN or infinite."""

    label: str
    color: int
    points: Points
    dashed: bool = False


def number(value: float) -> str:
    """A figure for people: 4 significant digits, thousands separated."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10_000 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def line_chart(lines: list[Line], name: str = "", axis: str = "step") -> str:
    """The lines on one pair of axes as an `<svg>` element, whose name is read aloud. Points that are not finite leave
    a gap.

    Args:
        axis: what the horizontal one counts.
    """
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        finite = [(0, 0.0), (1, 1.0)]
    steps, values = [step for step, _ in finite], [value for _, value in finite]
    x_ticks = _ticks(min(steps), max(max(steps), min(steps) + 1), 5, integer=True)
    x_low, x_high = x_ticks[0], max(max(steps), x_ticks[0] + 1)
    low, high = min(values), max(values)
    y_ticks = _ticks(0 if 0 < low < high / 2 else low, high, 4)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    label = f' aria-label="{escape(name)}"' if name else ""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{label}>']
    for tick, text in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, _tick_labels(x_ticks), strict=True):
        if tick <= x_high:
            x = place(tick, y_ticks[0])[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(axis)}</text>')
    for line in lines:
        parts += _draw(line, place, axis)
    return "".join(parts) + "</svg>"


def _draw(line: Line, place: Place, axis: str) -> list[str]:
    """A line's curve (thin where a running mean is drawn over it), and dots with hover titles."""
    style = f"c{line.color % COLORS} of-{line.color}" + (" dashed" if line.dashed else "")
    smooth = running_mean(line.points)
    parts = [_path(_thin(line.points, _DRAWN), place, f"curve {style}" + (" raw" if smooth else ""))]
    if smooth:
        parts.append(_path(_thin(smooth, _DRAWN), place, f"curve {style}"))
    dots = [point for point in _thin(line.points, _HOVERED) if math.isfinite(point[1])]
    always_shown_below = _SMOOTHED if line.dashed else 2
    shown = " shown" if len(line.points) < always_shown_below else ""
    for step, value in dots:
        x, y = place(step, value)
        title = escape(f"{line.label}, {axis} {step:g}: {number(value)}")
        parts.append(
            f'<g class="dot {style}{shown}"><circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/><title>{title}</title></g>'
        )
    return parts


def _path(points: Points, place: Place, style: str) -> str:
    commands, command = [], "M"
    for step, value in points:
        if math.isfinite(value):
            x, y = place(step, value)
            commands.append(f"{command}{x:.1f} {y:.1f}")
            command = "L"
        else:
            command = "M"
    return f'<path class="{style}" d="{"".join(commands)}"/>'


def running_mean(points: Points) -> Points:
    """The mean over a tenth of the points (100 at most) around each; none for a short or an even curve."""
    points = [point for point in points if math.isfinite(point[1])]
    values = [y for _, y in points]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    if len(points) < _SMOOTHED or turns < len(points) / 5:
        return []
    half = min(len(points) // 20, 50)
    means = []
    for i, (x, _) in enumerate(points):
        left = min(half, i)
        # At the start both sides shrink alike, as a one-sided mean would misplace a steep start.
        window = values[i - left : i + left + 1]
        means.append((x, sum(window) / len(window)))
    return means


def _thin(points: Points, most: int) -> Points:
    """About `most` points: the first, the last, and each bucket's lowest and highest, so no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        gaps = [i for i in bucket if not math.isfinite(points[i][1])]
        if gaps:
            kept.update(gaps)
        else:
            kept.add(min(bucket, key=lambda i: points[i][1]))
            kept.add(max(bucket, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def _ticks(low: float, high: float, count: int, integer: bool = False) -> list[float]:
    """Round numbers, evenly spaced, that enclose `low` to `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    if integer:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_labels(ticks: list[float]) -> list[str]:
    largest = max(abs(tick) for tick in ticks)
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= scale:
            scale = 1e3 if suffix == "k" else scale
            return [f"{tick / scale:g}{suffix if tick else ''}" for tick in ticks]
    step = ticks[1] - ticks[0]
    decimals = next((d for d in range(5) if abs(step * 10**d - round(step * 10**d)) < 1e-6), None)
    return [number(tick) if decimals is None else f"{tick:.{decimals}f}" for tick in ticks]
