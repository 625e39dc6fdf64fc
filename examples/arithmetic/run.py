"""Chain sums: a small model from random weights gets some of them right after a short SFT, and goes on to learn from
whether its answers are right, on two CPU processes in minutes.

python examples/arithmetic/run.py                           # data, SFT, GRPO
python examples/arithmetic/run.py --algorithm dapo --seed 1 # data and SFT of a seed are shared by its algorithms
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from sums import make_data  # noqa: E402

from coati.tracking import read_metrics  # noqa: E402
from examples.stages import train  # noqa: E402

# What each differs in from configs/grpo.yaml, see docs/grpo.md.
ALGORITHMS = {
    "grpo": {},
    "dr_grpo": dict(advantage="dr_grpo", aggregation="constant"),
    "dapo": dict(aggregation="token", clip_high=0.28, dynamic_sampling=True, overlong_buffer=4),
    "gspo": dict(policy_loss="gspo", clip_low=0.003, clip_high=0.004),
    "cispo": dict(policy_loss="cispo", aggregation="token", clip_low=1.0, clip_high=1.0),
    "rloo": dict(advantage="rloo", policy_loss="none", aggregation="constant"),
    "reinforce++": dict(advantage="reinforce++-baseline", aggregation="token"),
    "remax": dict(advantage="remax", group_size=1, batch_size=256, aggregation="token"),
    "ppo": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "arithmetic", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    arguments = parser.parse_args()
    folder = arguments.output.resolve() / f"seed{arguments.seed}"
    output = folder / arguments.algorithm
    data = make_data(folder / "data", arguments.seed)
    common = {"seed": arguments.seed, "cache_dir": folder / "cache", "train_data": data["sft"]}
    rows = {"eval_data": data["sft_eval"], "tokenizer": data["tokenizer"]}
    train("sft", HERE / "configs" / "sft.yaml", folder / "sft", common | rows, arguments.processes)
    started, script = time.monotonic(), "ppo" if arguments.algorithm == "ppo" else "grpo"
    common |= {
        "model": folder / "sft" / "model",
        "train_data": data["prompts_train"],
        "eval_data": data["prompts_eval"],
    }
    flags = common | ALGORITHMS[arguments.algorithm]
    train(script, HERE / "configs" / f"{script}.yaml", output, flags, arguments.processes)
    summary = accuracies(output) | {"seconds": time.monotonic() - started}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("  ".join(f"{name} {value:.3f}" for name, value in summary.items()))


def accuracies(output: Path) -> dict[str, float]:
    """The share of held-out sums that were right before and after: one sampled answer to each."""
    found = [row["eval/reward"] for row in read_metrics(output) if "eval/reward" in row]
    return {"accuracy before": found[0], "accuracy after": found[-1]}


if __name__ == "__main__":
    main()
