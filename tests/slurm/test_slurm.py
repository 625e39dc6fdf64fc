"""The example jobs on a SLURM cluster of two nodes that this machine plays; `make test-slurm` runs it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.tracking import read_metrics
from examples.stages import free_port
from tests.conftest import ROOT, as_yaml, settings_for
from tests.distributed.runs import BIN, start, wait_for_step
from tests.distributed.test_launchers import check_the_end
from tests.slurm.cluster import cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
STEPS = 60
PATIENCE = 600  # seconds, for a job on a busy machine
GOING = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")


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
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, **options
    )


def submit(name: str, folder: Path, world: dict[str, str], slurm: dict[str, str], *options) -> str:
    """Submits an example with a tiny model; returns the job's number. Its log is FOLDER/log.txt, its run FOLDER/run."""
    settings = settings_for("reward", world, steps=STEPS, save_every=0, eval_every=0)
    (folder / "config.yaml").write_text(as_yaml(settings))
    job = dict(CONFIG=str(folder / "config.yaml"), OUTPUT=str(folder / "run"), MASTER_PORT=str(free_port()))
    job |= {"GPUS": "2" if name == "one_node" else "1"}
    script = f"examples/slurm/{name}.sbatch"
    command = ["sbatch", "--parsable", "--output", str(folder / "log.txt"), *options, script]
    return run(command, slurm | job, check=True).stdout.strip()


def state(job: str, slurm: dict[str, str]) -> str:
    """PENDING, RUNNING, COMPLETED, ... A job that waits for its time to begin, as requeued ones do, begins now."""
    shown = run(["scontrol", "show", "job", job], slurm, check=True).stdout
    if "Reason=BeginTime" in shown:
        time.sleep(2)  # slurmd refuses a job that starts in the second in which it ended ("credential revoked")
        run(["scontrol", "update", f"JobId={job}", "StartTime=now"], slurm)
    return re.search(r"JobState=(\w+)", shown)[1]


def wait_until_complete(job: str, folder: Path, slurm: dict[str, str]):
    deadline = time.monotonic() + PATIENCE
    while (now := state(job, slurm)) in GOING and time.monotonic() < deadline:
        time.sleep(0.5)
    assert now == "COMPLETED", now + (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def uninterrupted(slurm, tiny_world, tmp_path_factory) -> Path:
    """What train_rm.sbatch makes when it is left alone."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit("train_rm", folder, tiny_world, slurm, "--wait")
    assert "NodeList=n[1-2]" in run(["scontrol", "show", "job", job], slurm).stdout
    return folder


def same_weights(one: Path, other: Path) -> bool:
    weights = [load_file(folder / "run" / "model" / "model.safetensors") for folder in (one, other)]
    return weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_job_trains_on_both_nodes(uninterrupted):
    log = (uninterrupted / "log.txt").read_text()
    assert "2 x cpu" in log and "finished" in log, log[-3000:]
    assert len(read_metrics(uninterrupted / "run")) == STEPS + 1


@pytest.mark.parametrize("name", ["torchrun", "one_node"])
@pytest.mark.slow
def test_the_other_jobs_give_the_same_weights(name, uninterrupted, slurm, tiny_world, tmp_path):
    wait_until_complete(submit(name, tmp_path, tiny_world, slurm), tmp_path, slurm)
    assert same_weights(uninterrupted, tmp_path)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("train_rm", "scancel --signal=TERM"),
        pytest.param("train_rm", "scontrol requeue", marks=pytest.mark.slow),
        pytest.param("torchrun", "scancel --signal=TERM", marks=pytest.mark.slow),
    ],
)
def test_a_requeued_job_ends_with_the_uninterrupted_weights(name, how, uninterrupted, slurm, tiny_world, tmp_path):
    """`scancel --signal=TERM` stands for --signal before the time limit, `scontrol requeue` for preemption."""
    job = submit(name, tmp_path, tiny_world, slurm)
    wait_for_step(tmp_path / "run", STEPS // 6, tmp_path, lambda: state(job, slurm) in GOING)
    run([*how.split(), job], slurm, check=True)
    wait_until_complete(job, tmp_path, slurm)
    log = (tmp_path / "log.txt").read_text()
    assert "SIGTERM received: saved step" in log and "from step" in log
    assert same_weights(uninterrupted, tmp_path)


@pytest.mark.slow
def test_one_node_samples_for_the_other_and_a_requeued_job_ends_with_the_same_bytes(slurm, tiny_world, tmp_path):
    """That of a run that was not stopped, on one machine."""
    changes = dict(steps=STEPS // 3, save_every=0, eval_every=0, max_staleness=1, temperature=1.0)
    settings = settings_for("grpo", tiny_world, **changes)
    (tmp_path / "config.yaml").write_text(as_yaml(settings))
    slurm = slurm | dict(COATI_GENERATOR_HOST="127.0.0.1", CONFIG=str(tmp_path / "config.yaml"))
    command = ["sbatch", "--parsable", "--output", str(tmp_path / "log.txt"), "examples/slurm/train_grpo.sbatch"]
    job = run(command, slurm | dict(OUTPUT=str(tmp_path / "run")), check=True).stdout.strip()
    wait_for_step(tmp_path / "run", STEPS // 6, tmp_path, lambda: state(job, slurm) in GOING)
    run(["scancel", "--signal=TERM", job], slurm, check=True)
    wait_until_complete(job, tmp_path, slurm)
    assert "SIGTERM received: saved step" in (tmp_path / "log.txt").read_text()
    whole = tmp_path / "whole"
    whole.mkdir()
    settings |= dict(output_dir=str(whole / "run"))
    process = start("coati", "grpo", settings, whole, processes=1, generators=1)
    assert process.wait(PATIENCE) == 0, (whole / "log.txt").read_text()[-3000:]
    assert same_weights(whole, tmp_path)


STATUS = {"killed": 137, "exception": 1, "ctrl-c": 0, "ctrl-c twice": 130, "sigterm": 137, "sigkill": -9}


QUICK = ("killed",)


@pytest.mark.parametrize("event", [pytest.param(e, marks=[] if e in QUICK else pytest.mark.slow) for e in STATUS])
def test_all_processes_of_srun_end_with_the_promised_status(event, slurm, tiny_world, tmp_path):
    check_the_end("srun", event, STATUS[event], tiny_world, tmp_path, **slurm)
