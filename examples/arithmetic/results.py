"""What the arithmetic example's algorithms came to: a table and a plot."""

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
    found = {name: paths for name, paths in found.items() if paths}
    lines = ["| algorithm | right before | right after | gained, 95 % interval | pairs told apart | minutes |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [row(name, paths) for name, paths in found.items()]
    table = "\n".join(lines)
    (output / "figures.md").write_text(table + "\n")
    (output / "curves.svg").write_text(curves({n: [p.parent for p in paths] for n, paths in found.items()}, scripts))
    print(f"{table}\n\nfigures in {output / 'figures.md'}, curves in {output / 'curves.svg'}")
    if write_docs:
        fill_figures(ROOT / "docs" / "grpo.md", table, write_docs)
        (ROOT / "docs" / f"{write_docs}.svg").write_text((output / "curves.svg").read_text())


def row(name: str, paths: list[Path]) -> str:
    runs = [json.loads(path.read_text()) for path in paths]
    cells = [", ".join(f"{run[when]:.1%}" for run in runs) for when in ("before", "after")]
    told = [value for path in paths for _, value in evaluations(path.parent, "eval/accuracy")[-1:]]  # KTO has no pairs
    minutes = statistics.mean(run["seconds"] for run in runs) / 60
    gains = [run["after"] - run["before"] for run in runs]
    cells += [interval(gains), ", ".join(f"{share:.1%}" for share in told), f"{minutes:.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def interval(values: list[float]) -> str:
    """The mean in points with its 95 % interval (Student's), the values taken as independent."""
    mean = statistics.mean(values)
    if len(values) not in STUDENT:
        return f"{100 * mean:+.1f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"


def evaluations(folder: Path, name: str) -> list[tuple[float, float]]:
    """Values of an evaluated metric, by step."""
    return [(row["step"], row[name]) for row in read_metrics(folder) if name in row]


def curves(folders: dict[str, list[Path]], scripts: dict[str, str]) -> str:
    """Means over seeds: right answers to held-out sums, and held-out pairs told apart."""
    charts: dict[str, list[Line]] = {}
    for color, (name, runs) in enumerate(folders.items()):
        paired = scripts[name] == "preference"
        title = "held-out pairs told apart, by step" if paired else "right answers to held-out sums, by iteration"
        values: dict[float, list[float]] = {}
        for folder in runs:
            for step, value in evaluations(folder, "eval/accuracy" if paired else "eval/reward"):
                values.setdefault(step, []).append(value)
        points = [(step, statistics.mean(of_step)) for step, of_step in sorted(values.items())]
        if points:  # KTO has no pairs to tell apart
            charts.setdefault(title, []).append(Line(name, color, points, dashed=color >= COLORS))
    return figure(charts, list(folders), f"means over {max(map(len, folders.values()))} seeds")
