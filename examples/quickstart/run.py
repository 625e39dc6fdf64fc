"""The quickstart: a small model learns to be polite by RLHF, on two CPU processes, from nothing, in a few minutes.

python examples/quickstart/run.py            # data, SFT, reward model, PPO, report
python examples/quickstart/run.py --seeds 3  # the same three times, with a table
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from measure import measure  # noqa: E402

from coati.tracking import read_metrics, read_samples, write_report  # noqa: E402
from examples.stages import run, train  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--plugin", default="zero2", help="any plugin of coati")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    arguments = parser.parse_args()
    output, started, summaries = arguments.output.resolve(), time.monotonic(), []
    for seed in range(arguments.seeds):
        folder = output if arguments.seeds == 1 else output / f"seed{seed}"
        if (folder / "summary.json").exists():
            sys.exit(f"error: {folder} holds a finished quickstart: remove it, or name another --output")
        three_stages(folder, seed, arguments)
        summaries.append(summarize(folder))
    print(f"\n{time.monotonic() - started:.0f} s for data and training")
    for seed, summary in enumerate(summaries):
        print(f"seed {seed}: " + "  ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    print(f"open {write_report([output], output / 'report.html')}")


def three_stages(folder: Path, seed: int, arguments):
    """Data, SFT, reward model, PPO."""
    data, configs = folder / "data", HERE / "configs"
    run([sys.executable, str(HERE / "make_data.py"), "--out", str(data), "--seed", str(seed)])
    common = {"seed": seed, "plugin": arguments.plugin, "cache_dir": folder / "cache"}
    rows = {"train_data": data / "sft.jsonl", "eval_data": data / "sft_eval.jsonl", "tokenizer": data / "tokenizer"}
    train("sft", configs / "sft.yaml", folder / "sft", common | rows, arguments.processes)

    common["model"] = folder / "sft" / "model"
    rows = {"train_data": data / "preference_train.jsonl", "eval_data": data / "preference_eval.jsonl"}
    train("reward", configs / "reward.yaml", folder / "reward", common | rows, arguments.processes)

    common["rewards"] = [{"type": "model", "path": str(folder / "reward" / "model")}]
    rows = {"train_data": data / "prompts_train.jsonl", "eval_data": data / "prompts_eval.jsonl"}
    train("ppo", configs / "ppo.yaml", folder / "ppo", common | rows, arguments.processes)


def summarize(folder: Path) -> dict[str, float]:
    """Reward-model accuracy, and reward and the independent measure before and after PPO, on held-out prompts."""
    accuracy = [row["eval/accuracy"] for row in read_metrics(folder / "reward") if "eval/accuracy" in row]
    rewards = [row["eval/reward"] for row in read_metrics(folder / "ppo") if "eval/reward" in row]
    samples = read_samples(folder / "ppo")
    steps = samples[0]["step"], samples[-1]["step"]
    before, after = ([row for row in samples if row["step"] == step] for step in steps)
    good = [measure([row["prompt"] for row in rows], [row["response"] for row in rows]) for rows in (before, after)]
    summary = {
        "reward-model accuracy": accuracy[-1],
        "reward before": rewards[0],
        "reward after": rewards[-1],
        "polite and on topic before": good[0],
        "polite and on topic after": good[1],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
