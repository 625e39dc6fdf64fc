"""The quickstart: a small model learns to be polite by RLHF, on two CPU processes, from nothing, in a few minutes.

python examples/quickstart/run.py            # data, SFT, reward model, PPO, report
python examples/quickstart/run.py --seeds 3  # the same three times, with a table
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = (("sft", "train_sft.py"), ("reward", "train_rm.py"), ("ppo", "train_ppo.py"))


def main():
    arguments = parse_arguments()
    started, summaries = time.monotonic(), []
    for seed in range(arguments.seeds):
        folder = arguments.output if arguments.seeds == 1 else arguments.output / f"seed{seed}"
        summaries.append(train(folder, seed, arguments))
    print(f"\n{time.monotonic() - started:.0f} s in all")
    for i, summary in enumerate(summaries):
        print(f"seed {i}: " + "  ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    page = subprocess.run(
        [sys.executable, "-m", "coati.cli", "report", str(arguments.output)], cwd=ROOT, check=True, capture_output=True
    )
    print(f"open {page.stdout.decode().strip()}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--plugin", default="zero2", help="any plugin of coati")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    return parser.parse_args()


def train(folder: Path, seed: int, arguments) -> dict[str, float]:
    """One seed: data, three stages, and the figures to judge them by."""
    if (folder / "summary.json").exists():
        sys.exit(f"error: {folder} holds a finished quickstart: remove it, or name another --output")
    run([sys.executable, str(HERE / "make_data.py"), "--out", str(folder / "data"), "--seed", str(seed)])
    for stage, script in STAGES:
        flags = ["--output_dir", str(folder / stage), "--seed", str(seed), "--plugin", arguments.plugin]
        flags += paths_of(stage, folder) + ["--resume", "auto"]
        launcher = [str(Path(sys.executable).parent / "colossalai"), "run"]
        launcher += ["--nproc_per_node", str(arguments.processes), "--master_port", str(29500 + os.getpid() % 1000)]
        config = ["--config", str(HERE / "configs" / f"{stage}.yaml")]
        run([*launcher, str(ROOT / "examples" / script), *config, *map(shlex.quote, flags)])
        if not (folder / stage / "model").is_dir():
            sys.exit(f"error: the {stage} stage did not finish; its output is above")
    summary = summarise(folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def paths_of(stage: str, folder: Path) -> list[str]:
    """Where a stage finds what the earlier ones made."""
    data, started_from = folder / "data", ["--model", str(folder / "sft" / "model")]
    match stage:
        case "sft":
            rows, more = "sft", ["--tokenizer", str(data / "tokenizer")]
        case "reward":
            rows, more = "preference", started_from
        case "ppo":
            rows, more = "prompts", [*started_from, "--reward_model", str(folder / "reward" / "model")]
    train = data / ("sft.jsonl" if rows == "sft" else f"{rows}_train.jsonl")
    return ["--train_data", str(train), "--eval_data", str(data / f"{rows}_eval.jsonl"), *more]


def summarise(folder: Path) -> dict[str, float]:
    """Reward-model accuracy, and reward and the independent measure before and after PPO, on held-out prompts."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    from measure import measure

    from coati.tracking import read_metrics, read_samples

    accuracy = [row["eval/accuracy"] for row in read_metrics(folder / "reward") if "eval/accuracy" in row]
    rewards = [row["eval/reward"] for row in read_metrics(folder / "ppo") if "eval/reward" in row]
    samples = read_samples(folder / "ppo")
    first, last = (
        [row for row in samples if row["step"] == step] for step in (samples[0]["step"], samples[-1]["step"])
    )
    good = [measure([row["prompt"] for row in rows], [row["response"] for row in rows]) for rows in (first, last)]
    return {
        "reward-model accuracy": accuracy[-1],
        "reward before": rewards[0],
        "reward after": rewards[-1],
        "polite and on topic before": good[0],
        "polite and on topic after": good[1],
    }


def run(command: list[str]):
    """Runs a command in the repository's root and stops with its exit status if it fails."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    print("$", " ".join(Path(command[0]).name if i == 0 else word for i, word in enumerate(command)), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
