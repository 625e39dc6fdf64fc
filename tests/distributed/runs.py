"""Starting a run with each launcher, finding its processes, and waiting for its steps."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from coati.run_layout import checkpoints_of, list_complete
from coati.tracking import read_metrics, read_samples
from examples.stages import SCRIPTS, free_port
from tests.conftest import ROOT, as_yaml

BIN = Path(sys.executable).parent
MARK = "COATI_TEST_RUN"  # in the environment of all that a run starts


def launcher(name: str, processes: int, generators: int = 0) -> list[str]:
    """The words before the script: of `colossalai`, `torchrun`, `coati`, `srun` (a process per node), or `none`."""
    count = ["--nproc_per_node", str(processes)]
    more = ["--generators", str(generators)] if generators else []
    return {
        "colossalai": [str(BIN / "colossalai"), "run", *count, "--master_port", str(free_port())],
        "torchrun": [str(BIN / "torchrun"), *count, "--master_port", str(free_port())],
        "coati": [sys.executable, "-m", "coati.cli", "run", *count, *more],
        "srun": [
            "srun",
            "--disable-status",
            "--nodes",
            str(processes),
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",
            sys.executable,
        ],
        "none": [sys.executable],
    }[name]


def start(
    name: str,
    script: str | Path,
    settings: dict,
    folder: Path,
    processes: int = 2,
    generators: int = 0,
    **environment,
) -> subprocess.Popen:
    """A run in a session of its own, as a terminal would have it; its output goes to FOLDER/log.txt.

    Args:
        script: `sft`, `reward` or `ppo` for the example scripts, or a file with what comes before its settings.
        environment: more variables.
    """
    config = folder / "config.yaml"
    config.write_text(as_yaml(settings))
    words = [str(ROOT / "examples" / SCRIPTS[script])] if script in SCRIPTS else str(script).split()
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(folder)}
    command = [*launcher(name, processes, generators), *words, "--config", str(config)]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that a run started and that still lives."""
    return [process for process in psutil.process_iter() if environment_of(process).get(MARK) == str(folder)]


def workers(folder: Path) -> list[psutil.Process]:
    """The training processes, not their launchers, in the order of ranks."""
    config = str(folder / "config.yaml")
    ranks = {}
    for process in processes_of(folder):
        words, environment = process.cmdline(), environment_of(process)
        launches = process.name() == "srun" or any("nproc_per_node" in word for word in words)
        if config in words and not launches:
            ranks[int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))] = process
    return [ranks[rank] for rank in sorted(ranks)]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # gone, a zombie, or not ours
        return {}


def wait_for_step(output: Path, step: int, folder: Path, lives: Callable[[], bool]):
    """Returns once metrics.jsonl has the step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if output.joinpath("metrics.jsonl").exists():
            lines = output.joinpath("metrics.jsonl").read_text().splitlines()
            if any(json.loads(line)["step"] >= step for line in lines[-3:-1]):
                return
        assert lives(), (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {(folder / 'log.txt').read_text()[-3000:]}")


def whole_checkpoints(output: Path) -> list[Path]:
    """Oldest first."""
    return list_complete(checkpoints_of(output))


def assert_same_end(expected: Path, found: Path):
    """The newest checkpoints are the same files, byte for byte: weights, optimizer states, every rank's random states,
    the KL controller, the running reward statistics, the best metric. So are the finished models."""
    pairs = [(whole_checkpoints(expected)[-1], whole_checkpoints(found)[-1])]
    pairs += [(folder, found / folder.name) for name in ("model", "critic") if (folder := expected / name).is_dir()]
    for theirs, mine in pairs:
        assert theirs.name == mine.name
        names = [
            {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (theirs, mine)
        ]
        assert names[0] == names[1] != set()
        assert [name for name in sorted(names[0]) if _contents(theirs / name) != _contents(mine / name)] == []


def _contents(path: Path):
    """The bytes; of the optimizer's settings their values, which Colossal-AI stores in the order of their arrival; of a
    card all but its title, the run's name."""
    if path.name == "README.md":
        return re.sub(r"^# .*$", "", path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    return torch.load(path) if path.name.endswith("optim_group.bin") else path.read_bytes()


def log_of(output: Path, after: int = -1) -> list[dict]:
    """The metrics and samples of the steps after this one, without what a clock says and without the size of files."""
    rows = [*read_metrics(output), *read_samples(output)]
    clocks, others = ("time", "tokens_per_second"), ("seconds/", "bytes/")
    return [
        {name: value for name, value in row.items() if name not in clocks and not name.startswith(others)}
        for row in rows
        if row["step"] > after
    ]
