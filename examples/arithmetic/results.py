"""What the arithmetic example's algorithms came to: a table and a plot."""

import itertools
import json
import math
import statistics
from pathlib import Path

from coati.tracking import read_metrics
from coati.tracking.charts import COLORS, Line
from examples.drawing import figure
from examples.stages import ROOT, fill_figures

STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # of the 95 % interval of a mean, by the number of values


def summarize(output: Path, scripts: dict[str, str], *, write_docs: str | None = None):
    """Writes figures.md and curves.svg, by algorithm over its seeds.

    Args:
        scripts: by algorithm, grpo, ppo, distill or preference.
        write_docs: the name under which they go into docs/ too.
    """
    found = {name: sorted(output.glob(f"seed*/{name}/summary.json")) for name in scripts}
    found = {name: [path.parent for path in paths] for name, paths in found.items() if paths}
    columns = OF_PAIRS if any(scripts[name] == "preference" for name in found) else OF_SAMPLES
    lines = [f"| algorithm | right before | right after | gained, 95 % interval | {' | '.join(columns)} |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for name, folders in found.items():
        cells = [*accuracies(folders), *(column(folders) for column in columns.values())]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    (output / "figures.md").write_text(table + "\n")
    (output / "curves.svg").write_text(curves(found, scripts))
    print(f"{table}\n\nfigures in {output / 'figures.md'}, curves in {output / 'curves.svg'}")
    if write_docs:
        fill_figures(ROOT / "docs" / "grpo.md", table, write_docs)
        (ROOT / "docs" / f"{write_docs}.svg").write_text((output / "curves.svg").read_text())


# --- cells of an algorithm's row, from the folders of its seeds


def accuracies(folders: list[Path]) -> list[str]:
    """Right before, right after, and the gain."""
    runs = [summary(folder) for folder in folders]
    before, after = (", ".join(f"{run[when]:.1%}" for run in runs) for when in ("before", "after"))
    return [before, after, interval([run["after"] - run["before"] for run in runs])]


def told_apart(folders: list[Path]) -> str:
    last = [value for folder in folders for _, value in logged(folder, "eval/accuracy")[-1:]]  # KTO has no pairs
    return ", ".join(f"{share:.1%}" for share in last)


def minutes(folders: list[Path]) -> str:
    return f"{statistics.mean(summary(folder)['seconds'] for folder in folders) / 60:.1f}"


def iterations(folders: list[Path]) -> str:
    """Until nine tenths of what GRPO gains with the same seed, if that was run, on a line from evaluation to
    evaluation."""
    cells = []
    for folder in folders:
        if not (folder.parent / "grpo" / "summary.json").exists():
            return ""
        of_grpo = logged(folder.parent / "grpo", "eval/reward")
        target = of_grpo[0][1] + 0.9 * (of_grpo[-1][1] - of_grpo[0][1])
        cells.append(first_crossing(logged(folder, "eval/reward"), target))
    return ", ".join("never" if cell is None else f"{cell:.0f}" for cell in cells)


def first_crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Where a line through points first reaches a value, from below; None if it doesn't."""
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y >= target:
            return x + (next_x - x) * max(target - y, 0) / (next_y - y) if next_y > y else x
    return None


def explained(folders: list[Path]) -> str:
    """The share of the returns' variance that the critic explains, a mean over the last ten iterations."""
    last = [[value for _, value in logged(folder, "explained_variance")[-10:]] for folder in folders]
    return ", ".join(f"{statistics.mean(values):.2f}" for values in last if values)


OF_PAIRS = {"pairs told apart": told_apart, "minutes": minutes}
OF_SAMPLES = {"iterations to nine tenths of GRPO's gain": iterations, "variance that the critic explains": explained}


def interval(values: list[float]) -> str:
    """The mean in points with its 95 % interval (Student's), the values taken as independent."""
    mean = statistics.mean(values)
    if len(values) not in STUDENT:
        return f"{100 * mean:+.1f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())


def logged(folder: Path, name: str) -> list[tuple[float, float]]:
    """Values of a metric, by step."""
    return [(row["step"], row[name]) for row in read_metrics(folder) if name in row]


def mean_curve(folders: list[Path], name: str) -> list[tuple[float, float]]:
    """Means of a metric over runs, by step."""
    values: dict[float, list[float]] = {}
    for folder in folders:
        for step, value in logged(folder, name):
            values.setdefault(step, []).append(value)
    return [(step, statistics.mean(of_step)) for step, of_step in sorted(values.items())]


def curves(folders: dict[str, list[Path]], scripts: dict[str, str]) -> str:
    """Means over seeds: right answers to held-out sums, and held-out pairs told apart."""
    charts: dict[str, list[Line]] = {}
    for color, (name, runs) in enumerate(folders.items()):
        paired = scripts[name] == "preference"
        title = "held-out pairs told apart, by step" if paired else "right answers to held-out sums, by iteration"
        points = mean_curve(runs, "eval/accuracy" if paired else "eval/reward")
        if points:  # KTO has no pairs to tell apart
            charts.setdefault(title, []).append(Line(name, color, points, dashed=color >= COLORS))
    return figure(charts, list(folders), f"means over {max(map(len, folders.values()))} seeds")
