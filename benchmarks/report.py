"""Puts benchmarks/results/*.json into docs/performance.md: its tables and pictures.

python benchmarks/report.py
"""

import json
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import RESULTS
from benchmarks.time_to_reward import Curve, reached

matplotlib.use("svg")
from matplotlib import pyplot

DOCS = RESULTS.parents[1] / "docs"
MILESTONES = (0.75, 0.8)  # shares of held-out sums: where the curves still rise, and what the project asks for
# what the project asks of itself: the case, whose rate over whose, at least
TARGETS = [
    ("generation", "fixed-32-64", "", 1.8),
    ("generation", "fixed-128-64", "", 2.0),
    ("generation", "fixed-32-128", "", 1.8),
    ("generation", "fixed-128-128", "", 2.0),
    ("generation", "log-normal", "", 5.0),
    ("generation", "fixed-32-64", "vLLM", 1.0),
    ("generation", "fixed-128-64", "vLLM", 1.0),
    ("generation", "log-normal", "vLLM", 1.1),
    ("training", "ppo-fixed", "TRL", 1.2),
    ("training", "ppo-shared", "TRL", 1.8),
    ("training", "ppo-log-normal", "TRL", 3.0),
    ("family", "reward-log-normal", "TRL", 1.8),
    ("family", "reward-prompts", "TRL", 1.25),
    ("training", "reward-fixed", "plain loop", 1 / 1.05),
    ("family", "sft-log-normal", "TRL, p", 2.5),  # padded or packed
    ("training", "ranks", "coati, 1 process", 0.9),
    ("family", "dpo-fixed", "TRL", 1.25),
    ("family", "dpo-vocabulary", "TRL", 1.25),
    ("family", "dpo-prompts", "TRL", 1.25),
    ("family", "dpo-log-normal", "TRL", 2.0),
    ("family", "grpo-fixed", "TRL", 1.5),
    ("family", "grpo-log-normal", "TRL", 3.0),
]
# of the real model, whose rate over which peer's best configuration, at least; and memory over its, at most
REAL_TARGETS = {"fixed-32-64": ("vLLM", 1.0), "fixed-128-64": ("vLLM", 1.0), "log-normal": ("vLLM", 1.0)}
REAL_TARGETS |= {
    f"{work}-{lengths}": ("TRL", least)
    for work in ("sft", "reward", "dpo", "ppo", "grpo")
    for lengths, least in (("fixed", 1.2), ("log-normal", 2.0))
}
REAL_TARGETS |= {"reward-prompts": ("TRL", 1.2), "dpo-prompts": ("TRL", 1.2)}
REAL_MEMORY = 0.6
COLORS = ("#2166ac", "#b2182b", "#4d9221", "#998ec3")


def rates(result: dict) -> str:
    """A row a contender: its rate, the spread, CPU seconds and memory; and ours over it."""
    lines = [
        "| case | contender | per second (spread) | coati over it | CPU s per turn | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, found in result["cases"].items():
        ours, over = found["contenders"]["coati"]["rate"], found["ratios"]
        if "coati" in over:  # generation's are to transformers
            over = {name: ours / x["rate"] for name, x in found["contenders"].items()}
        for name, x in found["contenders"].items():
            ratio = "" if name == "coati" else f"{over[name]:.2f}"
            spread = (
                f"{x['rate']:,.0f} ({x['lowest']:,.0f} to {x['highest']:,.0f})"
                if x["rate"] > 50
                else (f"{x['rate']:.2f} ({x['lowest']:.2f} to {x['highest']:.2f})")
            )
            lines.append(f"| {case} | {name} | {spread} | {ratio} | {x['cpu_seconds']:.1f} | {x['peak_mib']:,.0f} |")
    return "\n".join(lines)


def targets(results: dict[str, dict]) -> str:
    lines = ["| work | compared with | target | measured |", "|---|---|---|---|"]
    for kind, case, peer, least in TARGETS:
        found = results[kind]["cases"].get(case)
        if found is None:
            continue
        ratios = found["ratios"]
        if kind == "generation":  # ratios to transformers
            if peer and peer not in ratios:
                continue
            unit = ratios[peer] if peer else 1.0
            ours = {"coati": "", "coati, compiled": " compiled"}
            shown = ", ".join(f"{ratios[name] / unit:.2f}{word}" for name, word in ours.items() if name in ratios)
            beside = peer or "`transformers.generate`, its best batch size"
        else:  # of several settings of a peer, the best
            names = [name for name in ratios if name.startswith(peer)]
            beside = min(names, key=ratios.__getitem__)
            shown = f"{ratios[beside]:.2f}"
        lines.append(f"| {case} | {beside} | {least:.2f} | {shown} |")
    return "\n".join(lines)


def real_targets(result: dict) -> str:
    """Of the real model's cases, coati beside the peer's quickest configuration: rate, and peak memory."""
    lines = [
        f"| work | compared with | target | measured | memory (target {REAL_MEMORY}) |",
        "|---|---|---|---|---|",
    ]
    for name, (peer, least) in REAL_TARGETS.items():
        case = result["cases"].get(name, {"contenders": {}})
        rates = {other: found["rate"] for other, found in case["contenders"].items() if other.startswith(peer)}
        if not rates:
            continue
        beside = max(rates, key=rates.__getitem__)
        if "memory_ratios" in case:
            quicker, memory_ratio = case["ratios"][beside], f"{case['memory_ratios'][beside]:.2f}"
        else:  # generation's ratios are to transformers, and vLLM's cache is there before the clock
            quicker, memory_ratio = case["contenders"]["coati"]["rate"] / rates[beside], ""
        lines.append(f"| {name} | {beside} | {least:.2f} | {quicker:.2f} | {memory_ratio} |")
    return "\n".join(lines)


def time_to_reward(result: dict) -> str:
    lines = [f"| seed | contender | {' | '.join(f'seconds to {share:.0%}' for share in MILESTONES)} | right sums |"]
    lines.append("|" + "---|" * (3 + len(MILESTONES)))
    for seed, found in result["seeds"].items():
        for name, curve in found["curves"].items():
            seconds = " | ".join(seconds_to(share, curve) for share in MILESTONES)
            told = ", ".join(f"{share:.1%} ({at:.0f})" for at, share in curve)
            lines.append(f"| {seed} | {name} | {seconds} | {told} |")
    return "\n".join(lines)


def seconds_to(share: float, curve: Curve) -> str:
    seconds = reached(curve, share)
    return f"not in {curve[-1][0]:.0f}" if seconds is None else f"{seconds:.0f}"


def memory(result: dict) -> str:
    lines = ["| case | peer | coati over it |", "|---|---|---|"]
    for case, found in result["cases"].items():
        lines += [f"| {case} | {name} | {ratio:.2f} |" for name, ratio in found["memory_ratios"].items()]
    return "\n".join(lines)


def experts(result: dict) -> str:
    """Seconds of a step, and how many times those of the tensor-parallel group, by where the experts are."""
    names = [*next(iter(result["cases"].values()))]
    lines = [f"| model | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for per_token, seconds in result["cases"].items():
        first = seconds[names[0]]
        cells = [f"{first:.2f} s", *(f"{seconds[name]:.2f} s ({seconds[name] / first:.2f})" for name in names[1:])]
        lines.append(f"| {per_token} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(result: dict) -> str:
    m = result["machine"]
    turns = "one turn each" if result["rounds"] == 1 else f"medians of {result['rounds']} turns"
    return (
        f"Measured on {m['cpu']}, {m['cores']} cores, {m['threads']} threads; "
        f"torch {m['torch']}, transformers {m['transformers']}, Python {m['python']}; "
        f"{turns} after one to warm up."
    )


def draw_scaling(result: dict):
    """Tokens per second and peak memory, over each axis."""
    axes = result["axes"]
    figure, plots = pyplot.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, (axis, points) in enumerate(axes.items()):
        for row, (key, label) in enumerate((("rate", "tokens per second"), ("peak_mib", "peak memory, MiB"))):
            plot = plots[row][column]
            names = next(iter(points.values()))["contenders"]
            for i, name in enumerate(names):
                name_of = {
                    v: next(k for k in found["contenders"] if k.split(", b")[0] == name.split(", b")[0])
                    for v, found in points.items()
                }
                values = [points[v]["contenders"][name_of[v]][key] for v in points]
                plot.plot([int(v) for v in points], values, "o-", label=name.split(", b")[0], color=COLORS[i])
            plot.set(xscale="log", ylim=(0, None), xlabel=axis, ylabel=label)
            plot.set_xticks([int(v) for v in points], points)
            plot.minorticks_off()
            plot.legend(frameon=False, fontsize=8)
    save(figure, "scaling")


def draw_parts(result: dict):
    """Where the time of a PPO iteration goes."""
    cases = {n: x["contenders"]["coati"]["parts"] for n, x in result["cases"].items() if n.startswith("ppo")}
    figure, plot = pyplot.subplots(figsize=(7, 0.6 * len(cases) + 1))
    for y, (name, parts) in enumerate(cases.items()):
        left = 0.0
        for color, (part, seconds) in zip(COLORS, parts.items(), strict=False):
            label = part.removeprefix("seconds/") if y == 0 else None
            plot.barh(name, seconds, left=left, color=color, label=label, height=0.6)
            left += seconds
    plot.set(xlabel="seconds of an iteration")
    plot.invert_yaxis()
    plot.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    save(figure, "ppo-time")


def save(figure, name: str):
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def fill(page: str, name: str, text: str) -> str:
    """The page with a text between its two marks."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    if end not in rest:
        raise ValueError(f"docs/performance.md has no {start} ... {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def read_results() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def filled(page: str, results: dict[str, dict]) -> str:
    """The page with all tables."""
    page = fill(page, "machine of generation", machine(results["generation"]))
    page = fill(page, "machine", machine(results["training"]))
    page = fill(page, "targets", targets(results))
    page = fill(page, "generation", rates(results["generation"]))
    page = fill(page, "training", rates(results["training"]))
    page = fill(page, "machine of the family", machine(results["family"]))
    page = fill(page, "family", rates(results["family"]))
    page = fill(page, "memory", memory(results["memory"]))
    page = fill(page, "machine of the real model", machine(results["real_model"]))
    page = fill(page, "targets of the real model", real_targets(results["real_model"]))
    page = fill(page, "real model", rates(results["real_model"]))
    page = fill(page, "time to reward", time_to_reward(results["time_to_reward"]))
    page = fill(page, "machine of the experts", machine(results["experts"]))
    return fill(page, "experts", experts(results["experts"]))


def main():
    matplotlib.rcParams["svg.hashsalt"] = "coati"
    results = read_results()
    path = DOCS / "performance.md"
    path.write_text(filled(path.read_text(), results))
    if "scaling" in results:
        draw_scaling(results["scaling"])
    draw_parts(results["training"])


if __name__ == "__main__":
    main()
