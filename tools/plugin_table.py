"""Runs the three example scripts under every plugin, as a user would, and writes the table in docs/plugins.md.

    python tools/plugin_table.py            # about 10 minutes on 2 cores

Each stage does 20 steps on 2 processes with `colossalai run`, saves at step 10, and is run again from that checkpoint.
The reference is one process without a launcher. PPO samples greedily, so that responses don't depend on the processes.
Needs the data and the models of `make quickstart`. Runs that are already in --output are not repeated.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.tracking import read_metrics
from examples.stages import SCRIPTS, fill_figures, free_port

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ("ddp", "zero1", "zero2", "zero2-offload", "gemini")
CURVES = {"sft": ("loss",), "reward": ("loss",), "ppo": ("value_loss", "reward", "explained_variance")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "plugin-table")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    for stage in SCRIPTS:
        reference = run(stage, "ddp", arguments, processes=1)
        for plugin in PLUGINS:
            folder = run(stage, plugin, arguments)
            middle = folder / "checkpoints" / f"step-{arguments.steps // 2:08d}"
            resumed = run(stage, plugin, arguments, resume=middle)
            rows.append((stage, plugin, difference(reference, folder, stage), same_weights(folder, resumed, stage)))
            print(*rows[-1], flush=True)
    write_table(rows, arguments.steps)


def run(stage: str, plugin: str, arguments, *, processes: int = 2, resume: Path | None = None) -> Path:
    """One training; returns its folder."""
    folder = arguments.output / f"{stage}-{plugin}-{processes}{'-resumed' if resume else ''}"
    if (folder / "model").is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    quickstart, data = arguments.quickstart, arguments.quickstart / "data"
    flags = ["--output_dir", folder, "--plugin", plugin, "--steps", arguments.steps, "--progress", "off"]
    flags += ["--save_every", arguments.steps // 2, "--eval_every", 0, "--samples", 8, "--keep_checkpoints", 9]
    match stage:
        case "sft":
            flags += ["--tokenizer", data / "tokenizer", "--train_data", data / "sft.jsonl"]
            flags += ["--eval_data", data / "sft_eval.jsonl"]
        case "reward":
            flags += ["--model", quickstart / "sft" / "model", "--train_data", data / "preference_train.jsonl"]
            flags += ["--eval_data", data / "preference_eval.jsonl"]
        case "ppo":
            flags += ["--model", quickstart / "sft" / "model", "--rewards"]
            flags += [json.dumps({"type": "model", "path": str(quickstart / "reward" / "model")})]
            flags += ["--train_data", data / "prompts_train.jsonl", "--eval_data", data / "prompts_eval.jsonl"]
            flags += ["--batch_size", 16, "--minibatches", 2, "--micro_batch_size", 8, "--temperature", 0]
            # small rates: once weights differ in the 5th digit, a greedy response somewhere flips
            flags += ["--learning_rate", 1e-5, "--critic_learning_rate", 1e-4]
    if resume:
        flags += ["--resume", resume]
    bin_folder = Path(sys.executable).parent
    launcher = [bin_folder / "colossalai", "run", "--nproc_per_node", processes, "--master_port", free_port()]
    start = [sys.executable] if processes == 1 else launcher
    command = [
        *start,
        ROOT / "examples" / SCRIPTS[stage],
        "--config",
        ROOT / f"examples/quickstart/configs/{stage}.yaml",
    ]
    environment = {"OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command), *map(str, flags)], env=environment, capture_output=True, text=True)
    if done.returncode or not (folder / "model").is_dir():
        sys.exit(f"{stage} under {plugin} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return folder


def difference(reference: Path, folder: Path, stage: str) -> float:
    """The largest difference between two curves, relative to the largest value of the reference's."""
    expected, found = read_metrics(reference), read_metrics(folder)
    errors = []
    for name in CURVES[stage]:
        pairs = [(a[name], b[name]) for a, b in zip(expected, found, strict=True) if name in a]
        errors.append(max(abs(b - a) for a, b in pairs) / max(abs(a) for a, _ in pairs))
    return max(errors)


def same_weights(folder: Path, resumed: Path, stage: str) -> bool:
    """Whether the final weights are bitwise the same."""
    names = ("model", "critic") if stage == "ppo" else ("model",)
    files = [path.relative_to(folder) for name in names for path in sorted((folder / name).glob("*.safetensors"))]
    return all((folder / name).read_bytes() == (resumed / name).read_bytes() for name in files)


def write_table(rows, steps: int):
    import torch
    import transformers

    lines = [
        f"`tools/plugin_table.py`: {steps} steps of the quickstart's stages with `colossalai run --nproc_per_node 2`, "
        f"against one process (torch {torch.__version__}, transformers {transformers.__version__}, gloo, CPU).",
        "",
        "| stage | plugin | precision | largest relative difference of the loss curves | resumed from the middle |",
        "|---|---|---|---|---|",
    ]
    for stage, plugin, error, same in rows:
        precision = "bf16" if plugin == "gemini" else "fp32"
        lines.append(
            f"| {stage} | {plugin} | {precision} | {error:.1e} | {'bitwise the same' if same else 'DIFFERS'} |"
        )
    fill_figures(ROOT / "docs" / "plugins.md", "\n".join(lines))


if __name__ == "__main__":
    main()
