"""The example jobs on a SLURM cluster of two nodes that this machine plays; `make test-slurm` runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coati.tracking import read_metrics
from tests.conftest import ROOT, settings_for
from tests.distributed.runs import BIN, MARK, free_port, processes_of, start, wait_for_step, workers
from tests.distributed.test_launchers import SCRIPT, seconds_until_gone
from tests.slurm.cluster import cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
STEPS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> dict[str, str]:
    """The environment in which sbatch and srun find the cluster, and `coati` the clone."""
    programs = tmp_path_factory.mktemp("bin")
    programs.joinpath("coati").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m coati.cli "$@"\n')
    programs.joinpath("coati").chmod(0o755)
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        path = f"{BIN}:{programs}:{environment['PATH']}"
        yield environment | dict(PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")


def run(command: list[str], environment: dict[str, str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, **options)


def submit(name: str, folder: Path, world: dict[str, str], slurm: dict[str, str], **changes) -> subprocess.Popen:
    """sbatch --wait of an example with a tiny model; its log is FOLDER/log.txt, its run FOLDER/run."""
    settings = settings_for("reward", world, steps=STEPS, save_every=0, tensorboard=False, eval_every=0) | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "output_dir"}))
    job = dict(CONFIG=str(folder / "config.yaml"), OUTPUT=str(folder / "run"), MASTER_PORT=str(free_port()))
    job |= {MARK: str(folder), "GPUS": "2" if name == "one_node" else "1"}
    script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    command = ["sbatch", "--wait", "--parsable", "--output", str(folder / "log.txt"), str(script)]
    return subprocess.Popen(command, cwd=ROOT, env=slurm | job, stdout=subprocess.PIPE, text=True)


def job_id(submitted: subprocess.Popen) -> str:
    return submitted.stdout.readline().strip()


def finish(submitted: subprocess.Popen, folder: Path):
    assert submitted.wait(timeout=200) == 0, (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(slurm, tiny_world, tmp_path_factory) -> Path:
    """The run that train_rm.sbatch makes when it is left alone, on both nodes."""
    folder = tmp_path_factory.mktemp("whole")
    finish(submit("train_rm", folder, tiny_world, slurm), folder)
    return folder


def same_weights(one: Path, other: Path) -> bool:
    weights = [load_file(folder / "run" / "model" / "model.safetensors") for folder in (one, other)]
    return weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_job_trains_on_both_nodes(uninterrupted):
    log = (uninterrupted / "log.txt").read_text()
    assert "2 x cpu" in log and "finished" in log, log[-3000:]
    assert len(read_metrics(uninterrupted / "run")) == STEPS + 1


@pytest.mark.parametrize("name", ["torchrun", "one_node"])
def test_the_other_jobs_give_the_same_weights(name, uninterrupted, slurm, tiny_world, tmp_path):
    submitted = submit(name, tmp_path, tiny_world, slurm)
    finish(submitted, tmp_path)
    assert same_weights(uninterrupted, tmp_path)


@pytest.mark.parametrize("how", ["scancel --signal=TERM", "scontrol requeue"])
def test_a_requeued_job_ends_with_the_uninterrupted_weights(how, uninterrupted, slurm, tiny_world, tmp_path):
    """`scancel --signal=TERM` stands for --signal before the time limit, `scontrol requeue` for preemption."""
    submitted = submit("train_rm", tmp_path, tiny_world, slurm)
    job = job_id(submitted)
    wait_for_step(tmp_path / "run", STEPS // 6, submitted, tmp_path)
    run([*how.split(), job], slurm, check=True)
    deadline = time.monotonic() + 100
    while "from step" not in (tmp_path / "log.txt").read_text() and time.monotonic() < deadline:
        if re.search(r"Reason=BeginTime", run(["scontrol", "show", "job", job], slurm).stdout):
            run(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm)  # a requeued job waits two minutes
        time.sleep(1)
    finish(submitted, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert "SIGTERM received: saved step" in log
    assert same_weights(uninterrupted, tmp_path)
