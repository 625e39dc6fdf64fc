"""The table of docs/results.md, from the runs' folders."""

import json
from pathlib import Path

from coati.tracking import read_metrics, read_run, read_samples
from coati.tracking.charts import Line
from examples.arithmetic.results import interval
from examples.drawing import figure
from examples.smollm2.check import Share
from examples.stages import ROOT, fill_figures

SAMPLED = dict.fromkeys(("grpo", "grpo_full", "rloo", "ppo"), "right sums") | {"grpo_constraints": "constraints met"}
OTHERS = {"eval/loss": "held-out loss", "eval/margin": "held-out margin", "response_length": "response length, tokens"}
OTHERS |= {"eval/divergence": "divergence from the teacher, nats per token"}
OTHERS |= {"kl": "KL to the start, nats per response"}
WATCHED = {  # of PPO on the reward model, on held-out prompts
    "eval/reward/reward_model": "reward model's score",
    "eval/reward/sentiment": "sentiment, -1 to 1",
    "eval/reward/words": "words per response",
    "eval/reward/distinct": "share of distinct words",
}


def summarize(output: Path, *, write_docs: bool = False):
    """Writes figures.md and samples.md, of all stages that have finished; into docs/results.md if asked for."""
    folders = [path.parent for path in sorted(output.glob("seed*/*/summary.json"))]
    lines = ["| stage, seed | minutes | figure | before | after |", "|---|---|---|---|---|"]
    for folder in sorted(folders, key=lambda folder: (folder.name, folder.parent.name)):
        lines += rows(folder)
    for name in sorted({folder.name for folder in folders}):
        lines += gains([folder for folder in folders if folder.name == name])
    table, samples = "\n".join(lines), "\n".join(line for folder in folders for line in quoted(folder))
    (output / "figures.md").write_text(table + "\n")
    (output / "samples.md").write_text(samples + "\n")
    print(table)
    watched = [folder for folder in folders if folder.name == "ppo_hh"]
    if write_docs:
        fill_figures(ROOT / "docs" / "results.md", table)
        fill_figures(ROOT / "docs" / "results.md", samples, "samples")
        if watched:
            fill_figures(ROOT / "docs" / "results.md", over_optimization(watched[0]), "over-optimization")
            (ROOT / "docs" / "over-optimization.svg").write_text(drawn(watched))


def rows(folder: Path) -> list[str]:
    """A line for each figure of a stage; the first has its name and minutes."""
    metrics, run = read_metrics(folder), read_run(folder)
    minutes = (metrics[-1]["time"] - run["start"]) / 60
    figures = [*of_metrics(folder.name, metrics, run), *of_summary(folder)]
    if folder.name == "ppo_hh":
        figures.append(("responses that say nothing", *empty_responses(folder)))
    names = [f"{folder.name}, {run['settings']['seed']} | {minutes:.1f}"] + [" | "] * (len(figures) - 1)
    return [f"| {name} | {' | '.join(figure)} |" for name, figure in zip(names, figures, strict=True)]


def gains(folders: list[Path]) -> list[str]:
    """For a stage that several seeds have run, by how many points each share grew: the mean with Student's interval."""
    if len(folders) < 2:
        return []
    found = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    lines = []
    for name, value in found[0]["after"].items():
        if name in found[0]["before"] and name != "samples" and len(value) == 2:
            shares = [[summary[when][name] for when in ("before", "after")] for summary in found]
            grown = interval([after[0] / after[1] - before[0] / before[1] for before, after in shares])
            lines.append(f"| {folders[0].name}, {len(folders)} seeds |  | {name}: gained, points |  | {grown} |")
    return lines


def of_metrics(name: str, metrics: list[dict], run: dict) -> list[tuple[str, str, str]]:
    """Figures that the run has logged: title, first and last."""
    found = []
    if name in SAMPLED:
        [path] = run["settings"]["data"]["eval_data"]
        n = len(Path(path).read_text(encoding="utf-8").splitlines())
        shares = [str(Share(row["eval/reward"] * n, n)) for row in metrics if "eval/reward" in row]
        found.append((f"{SAMPLED[name]}, sampled", shares[0], shares[-1]))
    accuracies = [
        f"{row['eval/accuracy']:.1%} ({row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%})"
        for row in metrics
        if "eval/accuracy_low" in row
    ]
    if accuracies:
        found.append(("held-out accuracy", accuracies[0], accuracies[-1]))
    # a task's scorer may pay for parts: its mean is no share of prompts
    others = OTHERS | ({"eval/reward": "the task's own score, sampled"} if name == "grpo_reversals" else {})
    for metric, title in others.items():
        values = [row[metric] for row in metrics if metric in row]
        if values:
            found.append((title, f"{round(values[0], 3):g}", f"{round(values[-1], 3):g}"))
    return found


def empty_responses(folder: Path) -> list[str]:
    """Their shares among the samples of the first and the last evaluation."""
    logged = read_samples(folder)
    shares = []
    for step in (logged[0]["step"], logged[-1]["step"]):
        responses = [row["response"] for row in logged if row["step"] == step]
        shares.append(str(Share(sum(not text.strip() for text in responses), len(responses))))
    return shares


def of_summary(folder: Path) -> list[tuple[str, str, str]]:
    """Figures that check.py has measured."""
    summary = json.loads((folder / "summary.json").read_text())
    names = [name for name in summary["before"] | summary["after"] if name != "samples"]
    return [(name, *(told(summary[when].get(name)) for when in ("before", "after"))) for name in names]


def watched_over_kl(folder: Path) -> list[tuple[float, dict[str, float]]]:
    """What is watched of a run on a reward model at each of its evaluations, by the KL of the iteration before it."""
    found, kl = [], 0.0
    for row in read_metrics(folder):
        kl = row.get("kl", kl)
        if "eval/reward" in row:
            found.append((row["step"], {"kl": kl} | {name: row[name] for name in WATCHED}))
    return found


def over_optimization(folder: Path) -> str:
    """A table of it."""
    lines = ["| iteration | KL, nats per response | " + " | ".join(WATCHED.values()) + " |"]
    lines.append("|---" * (len(WATCHED) + 2) + "|")
    for step, values in watched_over_kl(folder):
        lines.append(f"| {step} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |")
    return "\n".join(lines)


def drawn(folders: list[Path]) -> str:
    """The same as an SVG: what is watched over the KL, a line per seed."""
    charts: dict[str, list[Line]] = {title: [] for title in WATCHED.values()}
    for color, folder in enumerate(folders):
        found = sorted(watched_over_kl(folder), key=lambda of_step: of_step[1]["kl"])
        for name, title in WATCHED.items():
            charts[title].append(Line(folder.parent.name, color, [(values["kl"], values[name]) for _, values in found]))
    return figure(charts, [folder.parent.name for folder in folders], "over the KL, nats per response", columns=2)


def told(value: list | None) -> str:
    if value is None:
        return ""
    return str(Share(*value)) if len(value) == 2 else f"{value[0]:.2f}"


def shown(prompt: str) -> str:
    """What the user has said last."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def quoted(folder: Path) -> list[str]:
    """Greedy responses before and after, as a list; to HH-RLHF one, for many of its prompts are offensive."""
    if folder.name == "ppo_hh":
        logged = read_samples(folder)
        first, last = (
            [f"{shown(row['prompt'])} -> {row['response']}" for row in logged if row["step"] == step][:1]
            for step in (logged[0]["step"], logged[-1]["step"])
        )
        pairs = zip(first, last, strict=True)
    else:
        summary = json.loads((folder / "summary.json").read_text())
        before, after = (summary[when].get("samples", []) for when in ("before", "after"))
        pairs = zip(before, after, strict=False)  # a model with random weights has none before
    lines = [f"- before: {json.dumps(before)}\n  after: {json.dumps(after)}" for before, after in pairs]
    return [f"{folder.name}, {folder.parent.name}:\n", *lines, ""] if lines else []
