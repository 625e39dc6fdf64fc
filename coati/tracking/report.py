"""`write_report`: one self-contained HTML page about runs: curves, samples, settings, versions.

Everything that a run wrote is untrusted (a model's output may hold HTML): all of it is escaped, and the page's content
security policy allows no script but the report's own, by its hash, and nothing from outside. Without scripts the page
shows everything but the part for comparing samples.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.files import replace_file
from coati.run_layout import JOURNAL
from coati.tracking.charts import COLORS, Line, Points, line_chart, number
from coati.tracking.explorer import PAGE, explorer
from coati.tracking.files import RUN, SUMMARY, read_metrics, read_object, read_run, read_samples, run_folders
from coati.tracking.style import STYLE
from coati.tracking.timeline import timeline

TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "prm": "Process reward model",
    "preference": "Preference optimization",
    "ppo": "Reinforcement learning with PPO",
    "grpo": "Reinforcement learning with GRPO",
    "distill": "Distillation",
}
# The charts that a stage opens with, in order; the first that it has is its main metric.
_SPEED = (r"grad.*norm", r"learning_rate|(^|/)lr$", r"tokens_per_second")
_REINFORCEMENT = (
    r"^(reward|score)s?(/mean)?$",
    r"(^|[/_])kl(/mean)?$",
    r"entropy",
    r"length",
    r"explained_variance",
    r"(value|critic).*loss",
    r"(policy|actor).*loss",
    r"clip",
)
HEADLINES = {"sft": (r"loss$", r"perplexity", r"accuracy", *_SPEED), "ppo": _REINFORCEMENT, "grpo": _REINFORCEMENT}
HEADLINES["distill"] = (r"divergence", r"loss$", r"^(reward|score)s?(/mean)?$", r"length", *_SPEED)
_OTHER_HEADLINES = (r"accuracy", r"loss$", r"margin", *_SPEED)
# Their runs are also drawn in charts that they share.
LEARN_FROM_REWARDS = ("ppo", "grpo")
UNITS = {
    r"tokens_per_second": "tokens/s",
    r"length|tokens$": "tokens",
    r"seconds|(^|[/_])time": "s",
    r"(^|[/_])kl(/mean)?$|entropy$": "nats",
    r"_gib$": "GiB",
}
SAMPLES_EACH_END = 8
_TEXT_LIMIT = 2000


@dataclass
class Run:
    """A run folder as read: `label` tells it from the stage's other runs."""

    label: str
    folder: Path
    info: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The stage that the run belongs to."""
        return TITLES.get(self.info["algorithm"], self.info["algorithm"])


def write_report(run_dirs: list[Path], output: Path, seconds: float | None = None) -> Path:
    """Write the page about `run_dirs`, and give back its path.

    Args:
        run_dirs: run folders, or folders with run folders anywhere below them. Runs of one algorithm (seeds,
            say) share their charts. A `summary.json` in one of them is shown as a table of figures.
        output: the HTML file, replaced atomically if it exists.
        seconds: after so long a browser loads the page again; None: never.

    Raises:
        UserError: a folder holds no run, or a file in it is broken.
    """
    folders, output = [Path(folder) for folder in run_dirs], Path(output)
    runs = _read_runs(folders)
    stages: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        stages[run.info["algorithm"]].append(run)
    title = escape(", ".join(folder.resolve().name for folder in folders))
    body = [_overview(title, runs, seconds)]
    for folder in folders:
        if (folder / SUMMARY).exists():
            heading = f"Figures of {folder.resolve().name}" if len(folders) > 1 else "Figures"
            body.append(_figures(heading, read_object(folder / SUMMARY)))
    body.append(_together(runs))
    body += [_stage(algorithm, of_stage) for algorithm, of_stage in stages.items()]
    body.append(explorer([(run.label, run.samples) for run in runs]))
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, _page(title, "".join(body), seconds))
    return output


def _page(title: str, body: str, seconds: float | None) -> str:
    script, style = ((PAGE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    again = "" if seconds is None else f" data-seconds='{seconds:g}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title} · coati report</title><style>{STYLE}{style}</style></head><body{again}><main>{body}</main>"
        "<footer>Where a curve is thin and thick, thin shows the logged values and thick their running mean. "
        f"Written {_when(time.time())}.</footer><script>{script}</script></body></html>\n"
    )


def _read_runs(folders: list[Path]) -> list[Run]:
    """The runs below `folders`, each once, by the time they started."""
    labels: dict[Path, str] = {}
    for folder in folders:
        run_dirs = run_folders(folder)
        if not run_dirs:
            raise UserError(f"{folder} holds no run (no {RUN}); name a folder that a coati run has written.")
        for run_dir in run_dirs:
            relative = run_dir.relative_to(folder)
            labels.setdefault(run_dir.resolve(), str(relative) if relative.parts else run_dir.resolve().name)
    common = [label for label, count in Counter(labels.values()).items() if count > 1]
    labels |= {path: str(path) for path, label in labels.items() if label in common}
    runs = [Run(label, path, read_run(path), read_metrics(path), read_samples(path)) for path, label in labels.items()]
    return sorted(runs, key=lambda run: run.info["start"])


# ---- the top of the page


def _overview(title: str, runs: list[Run], seconds: float | None) -> str:
    names = ("Stage", "Run", "Steps", "Ranks", "Plugin", "Time", "Result", "")
    header = "".join(f"<th>{name}</th>" if name else "<td></td>" for name in names)
    rows = "".join(map(_overview_row, runs))
    table = f"<table class='overview'><tr>{header}</tr>{rows}</table>"
    live = ""
    if seconds is not None:
        live = f"<p class='live'>Updated at {_clock(time.time())} <button type='button' id='pause' hidden></button></p>"
    link = "<p id='to-samples' hidden><a href='#compare'>Samples side by side</a></p>"
    return f"<header><p>coati report</p><h1>{title}</h1>{live}{table}{link}</header>"


def _overview_row(run: Run) -> str:
    steps = max((record["step"] for record in run.metrics), default=0)
    plugin = next((v for k, v in _flatten(run.info["settings"]).items() if re.search(r"\bplugin(\.name)?$", k)), "–")
    cells = [run.title, run.label, f"{steps:,}", run.info["world_size"], plugin, _duration(run), _result(run)]
    status = escape(run.info["status"])
    row = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f"<tr>{row}<td><span class='status {status}'>{status}</span></td></tr>"


def _result(run: Run) -> str:
    """The first and the last value of the run's main metric (the evaluated one, if there is one)."""
    curves = _curves([run])
    for name in _headlines(run.info["algorithm"], list(curves))[:1]:
        line = max(curves[name], key=lambda line: (line.dashed and len(line.points) > 1, len(line.points)))
        return f"{line.label} {number(line.points[0][1])} → {number(line.points[-1][1])}"
    return "–"


def _duration(run: Run) -> str:
    """The time that the run's sessions took, without the pauses between them."""
    latest = run.metrics[-1]["time"] if run.metrics else 0.0
    sessions = run.info["sessions"]
    seconds = sum(max((session["end"] or latest) - session["start"], 0) for session in sessions)
    resumed = f", resumed {len(sessions) - 1}×" if len(sessions) > 1 else ""
    if seconds < 120:
        return f"{seconds:.0f} s{resumed}"
    return (f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h") + resumed


def _figures(heading: str, summary: dict[str, Any]) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_show(value))}</dd></div>"
        for name, value in summary.items()
    )
    return f"<section><h2>{escape(heading)}</h2><dl class='figures'>{tiles}</dl></section>"


# ---- a stage: charts, samples, settings


def _together(runs: list[Run]) -> str:
    """Charts that algorithms which learn from rewards share, of the main metrics that all of them log; "" if there is
    one such algorithm."""
    compared = [run for run in runs if run.info["algorithm"] in LEARN_FROM_REWARDS]
    algorithms = {run.info["algorithm"] for run in compared}
    if len(algorithms) < 2:
        return ""
    names = [set(_curves([run for run in compared if run.info["algorithm"] == one])) for one in algorithms]
    curves = _curves(compared)
    shared = [name for name in _headlines("ppo", list(curves)) if all(name in found for found in names)]
    legend = _legend(compared, curves)
    return f"<section id='together'><h2>All that learn from rewards</h2>{legend}{_charts(shared, curves)}</section>"


def _stage(algorithm: str, runs: list[Run]) -> str:
    curves = _curves(runs)
    first = _headlines(algorithm, list(curves))
    rest = sorted(curves.keys() - set(first))
    name = escape(algorithm)
    parts = [f"<section id='stage-{name}'><h2>{escape(runs[0].title)}</h2>"]
    parts += [_legend(runs, curves), _charts(first, curves)]
    if rest:
        summary = f"<summary>{len(rest)} more metrics</summary>"
        parts.append(f"<details id='more-{name}'>{summary}{_charts(rest, curves)}</details>")
    for run in runs:
        label = f" ({run.label})" if len(runs) > 1 else ""
        if drawing := timeline(run.metrics, run.folder / JOURNAL):
            parts.append(f"<h3>Timeline of the last iterations{escape(label)}</h3>{drawing}")
        parts.append(_samples(run, label, opened=run is runs[0]))
    return "".join([*parts, _settings(runs, f"settings-{name}"), "</section>"])


def _curves(runs: list[Run]) -> dict[str, list[Line]]:
    """The stage's lines by metric. `train/x` and `x` are metric x; `eval/x` is its dashed line."""
    curves: dict[str, list[Line]] = defaultdict(list)
    for color, run in enumerate(runs):
        points: dict[str, Points] = defaultdict(list)
        for record in run.metrics:
            for name in record.keys() - {"step", "time"}:
                points[name].append((record["step"], record[name]))
        for name in sorted(points):
            dashed = name.startswith("eval/")
            label = f"{run.label} {name}" if len(runs) > 1 else name
            curves[re.sub("^(train|eval)/", "", name)].append(Line(label, color, points[name], dashed))
    return curves


def _headlines(algorithm: str, names: list[str]) -> list[str]:
    """The metrics to show first: up to two (the shortest names) for each of the algorithm's patterns."""
    chosen: list[str] = []
    for pattern in HEADLINES.get(algorithm, _OTHER_HEADLINES):
        matching = [name for name in sorted(names, key=lambda n: (len(n), n)) if re.search(pattern, name)]
        chosen += [name for name in matching[:2] if name not in chosen]
    return chosen or sorted(names)[:6]


def _legend(runs: list[Run], curves: dict[str, list[Line]]) -> str:
    keys = []
    if len(runs) > 1:
        keys = [(f" data-run='{i}'", f"c{i % COLORS}", run.label) for i, run in enumerate(runs)]
    if any(line.dashed for lines in curves.values() for line in lines):
        keys += [("", "", "training"), ("", "dashed", "evaluation")]
    spans = "".join(f"<span{of}><i class='key {style}'></i>{escape(label)}</span>" for of, style, label in keys)
    return f"<p class='legend'>{spans}</p>" if keys else ""


def _charts(names: list[str], curves: dict[str, list[Line]]) -> str:
    return "<div class='grid'>" + "".join(_chart(name, curves[name]) for name in names) + "</div>"


def _chart(name: str, lines: list[Line]) -> str:
    unit = next((unit for pattern, unit in UNITS.items() if re.search(pattern, name)), "")
    ends = sorted(line.points[-1][1] for line in lines if not line.dashed or len(lines) == 1)
    last = " to ".join(dict.fromkeys(number(end) for end in ends[:1] + ends[-1:]))
    lost = sum(not math.isfinite(value) for line in lines for _, value in line.points)
    warning = f"<p class='warning'>{lost} not finite: gaps in the curve</p>" if lost else ""
    return (
        f"<figure><figcaption><b>{escape(name)}</b><small>{unit}</small><span title='last'>{last}</span>"
        f"</figcaption>{line_chart(lines, name)}{warning}</figure>"
    )


def _samples(run: Run, label: str, opened: bool) -> str:
    """A table for each kind of samples: the same prompts at the first and at the last sampled step."""
    parts = []
    for name in dict.fromkeys(row["name"] for row in run.samples):
        rows = [row for row in run.samples if row["name"] == name]
        steps = sorted({rows[0]["step"], rows[-1]["step"]})
        sides = [[row for row in rows if row["step"] == step] for step in steps]
        title = name.capitalize() + ", " + " against ".join(f"step {step:,}" for step in steps) + label
        table = _sample_table(_pairs(sides[0], sides[-1]), steps)
        key = f"id='{escape(f'samples-{run.label}-{name}')}'"
        parts.append(f"<details {key}{' open' if opened else ''}><summary>{escape(title)}</summary>{table}</details>")
    return "".join(parts)


def _pairs(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """(row before, row after) by prompt, a prompt's k-th with its k-th, by the reward after, best first."""
    waiting: dict[str, list[dict]] = defaultdict(list)
    for row in before:
        waiting[_show(row.get("prompt"))].append(row)
    pairs = []
    for row in after:
        same = waiting[_show(row.get("prompt"))]
        pairs.append((same.pop(0) if same else {}, row))
    return sorted(pairs, key=lambda pair: _reward(pair[1]), reverse=True)


def _sample_table(pairs: list[tuple[dict, dict]], steps: list[int]) -> str:
    scored = any("reward" in row for pair in pairs for row in pair)
    compared = len(steps) > 1
    header = "<th>Prompt</th>"
    for when in ["before", "after"] if compared else [""]:
        header += f"<th>Response {when}</th>"
        if scored:
            header += f"<th class='n'>Reward {when}</th>"
    lines = []
    for before, after in pairs:
        cells = _text_cell(after.get("prompt"))
        for row in [before, after] if compared else [after]:
            cells += (
                _conversation_cell(row["conversation"]) if "conversation" in row else _text_cell(row.get("response"))
            )
            if scored:
                cells += f"<td class='n'>{escape(_show(row.get('reward', '–')))}</td>"
        lines.append(f"<tr>{cells}</tr>")
    hidden = len(lines) - 2 * SAMPLES_EACH_END
    if hidden > 0:
        note = f"<tr><td class='gap' colspan='5'>{hidden} between the best and the worst are left out</td></tr>"
        lines[SAMPLES_EACH_END:-SAMPLES_EACH_END] = [note]
    return f"<table class='samples'><tr>{header}</tr>{''.join(lines)}</table>"


def _text_cell(value: Any) -> str:
    if value is None:
        return "<td class='gap'>not sampled</td>"
    text = _show(value)
    more = " […]" if len(text) > _TEXT_LIMIT else ""
    return f"<td><div>{escape(text[:_TEXT_LIMIT])}{more}</div></td>"


def _conversation_cell(messages: list[dict[str, Any]]) -> str:
    """An episode message by message; which tokens are learned, and what a turn earned, on hover."""
    blocks, left = [], _TEXT_LIMIT
    for message in messages:
        role, text = message["role"], message["content"]
        about = "not sampled, so not learned"
        if role == "assistant":
            about = f"{message['tokens']} sampled tokens, learned"
            text += f"\n(no call: {message['malformed_call']})" if "malformed_call" in message else ""
        earned = f"<b>{number(message['reward'])}</b>" if message.get("reward") else ""
        more = " […]" if len(text) > left else ""
        blocks.append(
            f"<p class='turn {escape(role)}' title='{about}'><small>{escape(role)}</small>{earned}"
            f"{escape(text[:left].strip())}{more}</p>"
        )
        left = max(left - len(text), 0)
        if not left:
            break
    return f"<td><div>{''.join(blocks)}</div></td>"


def _reward(row: dict) -> float:
    """The row's reward, lowest of all where it has none or a NaN (which is stored as text)."""
    try:
        value = float(row.get("reward", "nan"))
    except (TypeError, ValueError):
        return -math.inf
    return -math.inf if math.isnan(value) else value


def _settings(runs: list[Run], key: str) -> str:
    """The runs' settings, versions and circumstances side by side; rows in which they differ are marked."""
    columns = []
    for run in runs:
        about = {name: run.info[name] for name in ("versions", "host", "command")}
        about["started"] = _when(run.info["start"])
        columns.append(_flatten({"settings": run.info["settings"], **about}))
    rows = ["<tr><td></td>" + "".join(f"<th>{escape(run.label)}</th>" for run in runs) + "</tr>"]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, "–") for column in columns]
        style = "differs" if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f"<tr class='{style}'><th>{escape(name.removeprefix('settings.'))}</th>{cells}</tr>")
    table = f"<table class='settings'>{''.join(rows)}</table>"
    return f"<details id='{key}'><summary>Settings and versions</summary>{table}</details>"


# ---- values as text


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    parts = [_flatten(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
    return {name: text for part in parts for name, text in part.items()}


def _show(value: Any) -> str:
    if type(value) in (int, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
