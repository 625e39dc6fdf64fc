"""PPO on the quickstart's task in three ways: policy and critic apart, on one trunk, and as LoRA adapters whose
reference is the policy with its adapter off. Run it after the quickstart, whose models and PPO run it takes.

    python examples/quickstart/trunks.py

Draws docs/trunks.svg and writes the table in docs/ppo.md. A quarter of an hour on two cores.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from measure import measure  # noqa: E402

from coati.tracking import read_metrics, read_samples  # noqa: E402
from coati.tracking.charts import Line  # noqa: E402
from examples.drawing import figure  # noqa: E402
from examples.stages import fill_figures, train  # noqa: E402

WAYS: dict[str, dict] = {
    "policy and critic apart": {},
    "shared trunk": dict(shared_trunk="true", critic_warmup=3, critic_learning_rate=1e-2, value_coefficient=0.02),
    "LoRA, reference with the adapter off": dict(
        lora_rank=32, lora_alpha=32, learning_rate=1.5e-3, critic_learning_rate=4e-3, steps=64, eval_every=16
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs" / "quickstart", help="a finished quickstart")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "trunks", help="where the other runs go")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    arguments = parser.parse_args()
    start, output = arguments.quickstart.resolve(), arguments.output.resolve()
    if not (start / "summary.json").is_file():
        sys.exit(f"error: {start} holds no finished quickstart: run `make quickstart`, or name one with --quickstart")
    rows = {
        name: start / "data" / f"prompts_{end}.jsonl" for name, end in (("train_data", "train"), ("eval_data", "eval"))
    }
    common = {"seed": 0, "cache_dir": start / "cache", **rows}
    common["model"] = start / "sft" / "model"
    common["rewards"] = [{"type": "model", "path": str(start / "reward" / "model")}]
    folders = {}
    for name, changes in WAYS.items():
        folders[name] = start / "ppo" if not changes else output / name.split(",")[0].replace(" ", "-").lower()
        train("ppo", HERE / "configs" / "ppo.yaml", folders[name], common | changes, arguments.processes)
    (ROOT / "docs" / "trunks.svg").write_text(draw(folders))
    fill_figures(ROOT / "docs" / "ppo.md", table(folders), "trunks")


def draw(folders: dict[str, Path]) -> str:
    """Reward on the held-out prompts (dots) and on each iteration's own, by iteration."""
    lines = []
    for color, (name, folder) in enumerate(folders.items()):
        for metric in ("reward", "eval/reward"):
            points = [(row["step"], row[metric]) for row in read_metrics(folder) if metric in row]
            lines.append(Line(name, color, points, dashed=metric != "reward"))
    return figure({"reward": lines}, list(folders), note="dots: on 200 held-out prompts")


def table(folders: dict[str, Path]) -> str:
    lines = ["| | reward before | after | polite and on topic |"]
    lines += ["|---|---|---|---|"]
    for name, folder in folders.items():
        metrics, samples = read_metrics(folder), read_samples(folder)
        rewards = [row["eval/reward"] for row in metrics if "eval/reward" in row]
        last = [row for row in samples if row["step"] == samples[-1]["step"]]
        good = measure([row["prompt"] for row in last], [row["response"] for row in last])
        lines.append(f"| {name} | {rewards[0]:.2f} | {rewards[-1]:.2f} | {good:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
