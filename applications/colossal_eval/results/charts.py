"""Charts of a report as inline SVG, by matplotlib: bars per category, and a radar plot."""

from __future__ import annotations

import io
import math

from colossal_eval.results.summaries import title

GRAY = "#8a93a3"  # readable on coati's light and dark pages


def bars(rows: list[dict], models: list[str]) -> str:
    """A bar per category and model with its standard error, and a mark at the score of random guessing."""
    groups = [
        (f"{title(row)}: {name}", row["random"], [row["models"][model]["categories"][name] for model in models])
        for row in rows
        for name in row["models"][models[0]]["categories"]
    ]
    figure, axes = _figure(8, 1.2 + 0.22 * len(groups) * (len(models) + 1))
    height = 0.8 / len(models)
    for i, model in enumerate(models):
        positions = [g + (i + 0.5) * height - 0.4 for g in range(len(groups))]
        scores = [scores[i] for _, _, scores in groups]
        errors = [100 * (score["stderr"] or 0) for score in scores]
        values = [100 * score["value"] for score in scores]
        axes.barh(positions, values, height * 0.92, xerr=errors, label=model, color=f"C{i}", ecolor=GRAY)
    for g, (_, chance, _) in enumerate(groups):
        axes.plot([100 * chance] * 2, [g - 0.4, g + 0.4], color=GRAY, linewidth=1.5, label=None if g else "random")
    axes.set_yticks(range(len(groups)), [name for name, _, _ in groups])
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    _legend(axes)
    return _svg(figure)


def radar(rows: list[dict], models: list[str]) -> str:
    """An axis per benchmark, or per category where there are fewer than three benchmarks."""
    axes_of = {title(row): [row["models"][model]["mean"]["value"] for model in models] for row in rows}
    if len(axes_of) < 3:
        axes_of = {
            f"{title(row)}: {name}": [row["models"][model]["categories"][name]["value"] for model in models]
            for row in rows
            for name in row["models"][models[0]]["categories"]
        }
    figure, axes = _figure(6.5, 5, polar=True)
    angles = [2 * math.pi * i / len(axes_of) for i in range(len(axes_of))]
    for i, model in enumerate(models):
        values = [100 * of_models[i] for of_models in axes_of.values()]
        axes.plot([*angles, angles[0]], [*values, values[0]], label=model, color=f"C{i}")
        axes.fill(angles, values, color=f"C{i}", alpha=0.12)
    axes.set_xticks(angles, list(axes_of))
    axes.set_ylim(0)
    _legend(axes)
    return _svg(figure)


def _figure(width: float, height: float, polar: bool = False):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(projection="polar" if polar else None)
    axes.tick_params(colors=GRAY, labelsize=8)
    axes.xaxis.label.set_color(GRAY)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(GRAY)
    axes.grid(color=GRAY, alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes) -> None:
    axes.legend(fontsize=8, labelcolor=GRAY, framealpha=0, loc="upper right", bbox_to_anchor=(1, 1.12), ncols=4)


def _svg(figure) -> str:
    """The `<svg>` element alone; text stays text, in the page's own font. The same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "coati"}):
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()[file.getvalue().index("<svg") :]
