"""Training processes forked from one that has imported torch, transformers and colossalai: a start takes a second.

Each is a rank as a launcher starts it, with its own group, signals, random states and exit status.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from examples.stages import free_port
from tests.conftest import ROOT, as_yaml, trainer_classes
from tests.distributed import worker

CONTEXT = multiprocessing.get_context("forkserver")


def start(target: Callable, folder: Path, processes: int, *arguments) -> list[BaseProcess]:
    """Calls `target(*arguments)` in every rank of a new group; the output goes to FOLDER/log.txt."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the process that forks
    CONTEXT.set_forkserver_preload(["tests.distributed.preload"])
    folder.mkdir(parents=True, exist_ok=True)
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in map(str, range(processes)):
        environment = {**place, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(CONTEXT.Process(target=_rank, args=(environment, folder / "log.txt", target, arguments)))
        ranks[-1].start()
    return ranks


def start_training(algorithm: str, settings: dict, folder: Path, processes: int = 2) -> list[BaseProcess]:
    """The example script's `main` with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(as_yaml(settings))
    return start(train, folder, processes, algorithm, str(config))


def run_jobs(jobs: list[dict], folder: Path, processes: int, work: Callable = worker.work) -> dict:
    """Runs tiny trainings, as `worker.py` describes them, in one process group; the results by job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ranks = start(work, folder, processes, str(folder / "jobs.json"), str(folder / "results.json"))
    try:
        assert wait(ranks, 900) == [0] * processes, (folder / "log.txt").read_text()[-6000:]
    finally:
        end(ranks)
    return json.loads((folder / "results.json").read_text())


def train(algorithm: str, config: str):
    from coati.trainers.main import main

    sys.argv = [algorithm, "--config", config]
    config_class, trainer_class = trainer_classes(algorithm)
    main(config_class, lambda: trainer_class, algorithm)


def wait(ranks: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """The exit status of each, negative for a signal; None for one that still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in ranks]


def end(ranks: Sequence[BaseProcess]):
    """Whatever still runs goes."""
    for process in ranks:
        process.kill()
        process.join()


def _rank(environment: dict[str, str], log: Path, target: Callable, arguments: tuple):
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)
