"""Runs the checks and measurements that need a GPU, part by part: see tools/gpu_check.sh."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "colossalai", "datasets", "triton", "vllm", "flash-attn")
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "-m", "gpu", "--timeout=300"]


def benchmark(*arguments: str) -> list[str]:
    return [sys.executable, "benchmarks/gpu.py", *arguments]


def parts(device: str) -> dict[str, list[str]]:
    """Commands by name, those first that tell the most."""
    decode = ["--parts", "decode", "--device", device]
    train = ["--parts", "sft", "reward", "--device", device]
    if device == "cpu":
        decode += ["--shapes", "tiny", "--rounds", "1", "--cases", "fixed-16-32"]
        train += ["--shapes", "tiny", "--rounds", "1"]
    return {
        "parity": [*PYTEST, "tests/gpu/test_parity.py"],
        "rollout": [*PYTEST, "tests/gpu/test_rollout.py"],
        "runs": [*PYTEST, "tests/gpu/test_runs.py"],
        "decode": benchmark(*decode),
        "train": benchmark(*train),
        "planner": [*PYTEST, "tests/gpu/test_planner.py"],
        "quickstart": [
            sys.executable,
            "examples/quickstart/run.py",
            "--processes",
            "1",
            "--output",
            "{folder}/quickstart",
        ],
        "vllm": [*PYTEST, "tests/gpu/test_vllm.py"],
    }


def versions(device: str) -> dict:
    """What the figures were measured on."""
    import torch

    found: dict = {"python": sys.version.split()[0], "time": time.strftime("%Y-%m-%d %H:%M")}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found["commit"] = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return found


def run(name: str, command: list[str], device: str, limit: float, folder: Path) -> dict:
    """One part: its exit status, seconds, the figures that it kept and the end of what it printed."""
    figures, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    figures.touch()
    environment = dict(os.environ, COATI_TEST_DEVICE=device, COATI_GPU_FIGURES=str(figures))
    environment.setdefault("OMP_NUM_THREADS", "4")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [word.format(folder=folder) for word in command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"stopped after {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    kept = [json.loads(line) for line in figures.read_text().splitlines()]
    return {
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "failed": failed,
        "figures": {x["name"]: x["value"] for x in kept},
        "end": lines[-3:],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", help="only these, in this order: " + ", ".join(parts("cuda")))
    parser.add_argument("--minutes", type=float, default=60.0, help="for all parts together; what is left over is told")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of benchmarks/results")
    parser.add_argument("--logs", type=Path, help="a folder for what the parts print")
    options = parser.parse_args()
    everything = parts(options.device)
    chosen = options.parts or list(everything)
    if unknown := [name for name in chosen if name not in everything]:
        parser.error(f"unknown part {unknown[0]}: choose from {', '.join(everything)}")
    about = versions(options.device)
    name = about["device"].lower().replace(" ", "-")
    output = options.output or RESULTS / f"gpu-{name}.json"
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(output.read_text()) if output.exists() else {"parts": {}}
    result["versions"] = about
    end = time.monotonic() + 60 * options.minutes
    for part in chosen:
        left = end - time.monotonic()
        if left < 10:
            result["parts"][part] = {"status": "no time left"}
        else:
            result["parts"][part] = run(part, everything[part], options.device, left, folder)
        output.write_text(json.dumps(result, indent=1) + "\n")
        report(part, result["parts"][part])
    print(f"{output}; logs in {folder}")
    sys.exit(any(result["parts"][part]["status"] != 0 for part in chosen))


def report(part: str, found: dict):
    """A part as lines of the table."""
    print(
        f"{part:12} {'passed' if found['status'] == 0 else found['status']!s:22} {found.get('seconds', '')} s",
        flush=True,
    )
    for line in found.get("failed", []):
        print(f"    {line[:150]}")
    for name, value in found.get("figures", {}).items():
        print(f"    {name}: {value}")
    if found["status"] != 0:
        for line in found.get("end", []):
            print(f"    | {line[:150]}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
