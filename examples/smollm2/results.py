"""The table of docs/results.md, from the runs' folders."""

import json
from pathlib import Path

from coati.tracking import read_metrics, read_run, read_samples
from coati.tracking.charts import Line
from examples.arithmetic.results import interval
from examples.drawing import figure
from examples.smollm2.check import Share
from examples.stages import ROOT, fill_figures

RECORDED = Path(__file__).resolve().parent / "figures.json"  # of finished stages, also of other machines
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

Value = float | list[float] | None  # a list is a share: [count, n]
Figure = tuple[str, Value, Value]  # its name, before, after


def summarize(output: Path, *, write_docs: bool = False):
    """Writes figures.md, of all stages that have finished.

    Args:
        write_docs: also put them into docs/results.md, beside those that RECORDED has from other machines.
    """
    folders = [path.parent for path in sorted(output.glob("seed*/*/summary.json"))]
    found = {f"{folder.name}, {read_run(folder)['settings']['seed']}": measured(folder) for folder in folders}
    table = table_of(found)
    (output / "figures.md").write_text(table + "\n")
    print(table)
    if write_docs:
        found = json.loads(RECORDED.read_text()) | found
        RECORDED.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        page = ROOT / "docs" / "results.md"
        fill_figures(page, table_of(found))
        fill_figures(page, quoted(found), "samples")
        watched = [folder for folder in folders if folder.name == "ppo_hh"]
        if watched:
            fill_figures(page, over_optimization(watched[0]), "over-optimization")
            (ROOT / "docs" / "over-optimization.svg").write_text(drawn(watched))


def measured(folder: Path) -> dict:
    """What is told of a finished stage: minutes of training, figures and samples before and after it."""
    metrics, run = read_metrics(folder), read_run(folder)
    figures = [*of_metrics(folder.name, metrics, run), *of_summary(folder)]
    if folder.name == "ppo_hh":
        figures.append(("responses that say nothing", *empty_responses(folder)))
    minutes = (metrics[-1]["time"] - run["start"]) / 60
    return {"minutes": round(minutes, 1), "figures": figures, "samples": samples_of(folder)}


def by_stage(found: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """The same for each stage, its seeds in order."""
    stages: dict[str, dict[str, dict]] = {}
    for name, stage in sorted(found.items()):
        stages.setdefault(name.partition(",")[0], {})[name] = stage
    return stages


def table_of(found: dict[str, dict]) -> str:
    """A line for each figure of a stage, the first with its name and minutes; then what several seeds gained."""
    lines = ["| stage, seed | minutes | figure | before | after |", "|---|---|---|---|---|"]
    stages = by_stage(found)
    for of_seeds in stages.values():
        for name, stage in of_seeds.items():
            first = f"{name} | {stage['minutes']}"
            for title, before, after in stage["figures"]:
                lines.append(f"| {first} | {title} | {told(before)} | {told(after)} |")
                first = " | "
    for name, of_seeds in stages.items():
        lines += gains(name, list(of_seeds.values()))
    return "\n".join(lines)


def gains(name: str, of_seeds: list[dict]) -> list[str]:
    """For a stage that several seeds have run, by how many points each share grew: the mean with Student's interval."""
    if len(of_seeds) < 2:
        return []
    grown: dict[str, list[float]] = {}
    for stage in of_seeds:
        for title, before, after in stage["figures"]:
            if isinstance(before, list) and isinstance(after, list):
                grown.setdefault(title, []).append(after[0] / after[1] - before[0] / before[1])
    first = f"| {name}, {len(of_seeds)} seeds |  |"
    return [f"{first} {title}: gained, points |  | {interval(points)} |" for title, points in grown.items()]


def of_metrics(name: str, metrics: list[dict], run: dict) -> list[Figure]:
    """Figures that the run has logged, first and last."""
    found: list[Figure] = []
    if name in SAMPLED:
        [path] = run["settings"]["data"]["eval_data"]
        n = len(Path(path).read_text(encoding="utf-8").splitlines())
        shares = [[row["eval/reward"] * n, n] for row in metrics if "eval/reward" in row]
        found.append((f"{SAMPLED[name]}, sampled", shares[0], shares[-1]))
    pairs = [row for row in metrics if "eval/pairs" in row]
    if pairs:
        shares = [[row["eval/accuracy"] * row["eval/pairs"], row["eval/pairs"]] for row in (pairs[0], pairs[-1])]
        found.append(("held-out accuracy", *shares))
    # a task's scorer may pay for parts: its mean is no share of prompts
    others = OTHERS | ({"eval/reward": "the task's own score, sampled"} if name == "grpo_reversals" else {})
    for metric, title in others.items():
        values = [row[metric] for row in metrics if metric in row]
        if values:
            found.append((title, values[0], values[-1]))
    return found


def empty_responses(folder: Path) -> list[list[float]]:
    """Their shares among the samples of the first and the last evaluation."""
    logged = read_samples(folder)
    shares = []
    for step in (logged[0]["step"], logged[-1]["step"]):
        responses = [row["response"] for row in logged if row["step"] == step]
        shares.append([sum(not text.strip() for text in responses), len(responses)])
    return shares


def of_summary(folder: Path) -> list[Figure]:
    """Figures that check.py has measured."""
    summary = json.loads((folder / "summary.json").read_text())
    names = [name for name in summary["before"] | summary["after"] if name != "samples"]
    return [(name, *(value_of(summary[when].get(name)) for when in ("before", "after"))) for name in names]


def value_of(checked: list[float] | None) -> Value:
    """A share stays [count, n]; what else was measured is a list of one number."""
    return checked[0] if checked is not None and len(checked) == 1 else checked


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


def told(value: Value) -> str:
    if isinstance(value, list):
        return str(Share(*value))
    return "" if value is None else f"{round(value, 3):g}"


def shown(prompt: str) -> str:
    """What the user has said last."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def samples_of(folder: Path) -> list[list[str]]:
    """Greedy responses before and after; to HH-RLHF one, for many of its prompts are offensive."""
    if folder.name == "ppo_hh":
        logged = read_samples(folder)
        first, last = (
            next(f"{shown(row['prompt'])} -> {row['response']}" for row in logged if row["step"] == step)
            for step in (logged[0]["step"], logged[-1]["step"])
        )
        return [[first, last]]
    summary = json.loads((folder / "summary.json").read_text())
    before, after = (summary[when].get("samples", []) for when in ("before", "after"))
    # a model with random weights has none before
    return [list(pair) for pair in zip(before, after, strict=False)]


def quoted(found: dict[str, dict]) -> str:
    """Samples of each stage's first seed that has some, as lists."""
    lines = []
    for of_seeds in by_stage(found).values():
        for name, samples in [(name, stage["samples"]) for name, stage in of_seeds.items() if stage["samples"]][:1]:
            lines += [f"{name}:", ""]
            lines += [f"- before: {json.dumps(one)}\n  after: {json.dumps(other)}" for one, other in samples]
            lines.append("")
    return "\n".join(lines)
