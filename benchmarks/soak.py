"""A long GRPO run: memory, files and metrics over 500 iterations, and the same run killed every 50.

    python benchmarks/soak.py                    # half an hour on two cores; one JSON line
    python benchmarks/soak.py --save             # and writes benchmarks/results/soak.json

Two processes of one thread train a random Llama of 0.4 M parameters under ZeRO-2 on 64 responses per iteration, with
dynamic sampling, a KL penalty, and an evaluation and a checkpoint every 25 iterations. Memory is what all processes
have to themselves (USS: of libraries' pages other programs on the machine may have a share); its slope is taken after
the first hundred iterations, with an interval from the means of blocks of 25. The killed run gets SIGKILL in all its
processes at once and goes on by `--resume auto`; its weights have to be those of the other run, bit for bit.
"""

import argparse
import hashlib
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from benchmarks.world import PLAIN, REWARD, words, write_models, write_rows  # noqa: E402
from coati.config import as_flags  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.stages import environment  # noqa: E402

MODEL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024)
EVERY, SETTLED = 25, 100  # iterations between evaluations and checkpoints; after which memory should stay


def flags_of(folder: Path, output: Path, iterations: int) -> dict:
    return dict(
        model=folder / "policy",
        train_data=folder / "rows.jsonl",
        eval_data=folder / "eval.jsonl",
        output_dir=output,
        steps=iterations,
        batch_size=8,
        group_size=8,
        micro_batch_size=16,
        max_new_tokens=32,
        kl_coefficient=0.02,
        dynamic_sampling=True,
        learning_rate=1e-4,
        plugin="zero2",
        precision="fp32",
        rewards=[dict(type="function", path=f"{folder}/reward.py:reward")],
        eval_every=EVERY,
        save_every=EVERY,
        resume="auto",
        progress="off",
    )


def start(folder: Path, output: Path, iterations: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "coati.cli", "run", "--nproc_per_node", "2", str(ROOT / "examples/train_grpo.py")]
    with open(folder / f"{output.name}.log", "ab") as log:
        arguments = as_flags(flags_of(folder, output, iterations))
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(), stdout=log, stderr=log)


def memory_of(process: subprocess.Popen) -> float:
    """MiB of a run's processes; NaN where one has just ended."""
    try:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return sum(one.memory_full_info().uss for one in everyone) / 2**20
    except psutil.NoSuchProcess:
        return math.nan


def steps_done(output: Path) -> int:
    rows = read_metrics(output)
    return rows[-1]["step"] if rows else 0


def watched_run(folder: Path, output: Path, iterations: int) -> dict:
    """The run that nobody kills: memory and files as it goes on."""
    process, memory, files = start(folder, output, iterations), [], {}
    while process.poll() is None:
        step = steps_done(output)
        if 0 < step < iterations and (value := memory_of(process)) == value:  # not of processes that are ending
            memory.append((step, value))
        if step and step % 100 == 0:
            files[step] = sum(1 for path in output.rglob("*") if path.is_file())
        time.sleep(1)
    if process.returncode:
        sys.exit(f"the run failed: {(folder / f'{output.name}.log').read_text()[-3000:]}")
    slope, half = slope_of([point for point in memory if point[0] > SETTLED])
    values = [value for row in read_metrics(output) for value in row.values()]
    return {
        "mib_per_100_iterations": 100 * slope,
        "half_interval": 100 * half,
        "mib": [value for _, value in memory][-1],
        "files_at": files,
        "checkpoints": len(list((output / "checkpoints").glob("step-*"))),
        "metrics": len(values),
        "not_finite": sum(not math.isfinite(value) for value in values),
        "memory": memory,
    }


def slope_of(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Least squares over the means of blocks of iterations, and half of its 95 % interval (normal approximation)."""
    blocks: dict[int, list[float]] = {}
    for step, value in points:
        blocks.setdefault(step // EVERY, []).append(value)
    x, y = [EVERY * block for block in blocks], [statistics.mean(values) for values in blocks.values()]
    slope, intercept = statistics.linear_regression(x, y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.mean(x)) ** 2 for a in x)
    return slope, 1.96 * math.sqrt(left / (len(x) - 2) / spread)


def killed_run(folder: Path, output: Path, iterations: int, every: int) -> int:
    """The same run, killed whenever so many iterations have passed; how often it was."""
    kills = 0
    while True:
        process, goal = start(folder, output, iterations), steps_done(output) + every
        while process.poll() is None and steps_done(output) < min(goal, iterations):
            time.sleep(0.2)
        if goal >= iterations:
            process.wait()
        if process.poll() is not None:
            if process.returncode:
                sys.exit(f"the run failed: {(folder / f'{output.name}.log').read_text()[-3000:]}")
            return kills
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            one.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1


def weights_of(output: Path) -> str:
    """A hash of the finished model."""
    parts = [path.read_bytes() for path in sorted((output / "model").glob("*.safetensors"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--kill_every", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "world"
        write_models(folder, MODEL, PLAIN)
        write_rows(folder / "rows.jsonl", ({"prompt": words(i, 8)} for i in range(2000)))
        write_rows(folder / "eval.jsonl", ({"prompt": words(-i, 8)} for i in range(1, 33)))
        (folder / "reward.py").write_text(REWARD)
        whole = watched_run(folder, folder / "whole", options.iterations)
        kills = killed_run(folder, folder / "killed", options.iterations, options.kill_every)
        equal = weights_of(folder / "whole") == weights_of(folder / "killed")
    result = {"machine": machine(1), "iterations": options.iterations}
    result |= {"run": whole, "kills": kills, "same_weights": equal}
    summary = {key: value for key, value in whole.items() if key != "memory"}
    print(json.dumps(summary | {"kills": kills, "same_weights": equal}))
    if options.save:
        store(result, "soak", "run")


if __name__ == "__main__":
    main()
