"""Runs that are interrupted, as clusters interrupt them, end with the weights of a run that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from coati.tracking import read_metrics
from examples.stages import SCRIPTS, free_port
from tests.conftest import ROOT, settings_for

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent


def start(algorithm: str, settings: dict, processes: int, folder: Path) -> subprocess.Popen:
    """The example script, by `colossalai run`, or by plain python for one process."""
    import yaml

    config = folder / f"{algorithm}.yaml"
    config.write_text(yaml.safe_dump(settings))
    script = [str(ROOT / "examples" / SCRIPTS[algorithm]), "--config", str(config)]
    launcher = [sys.executable]
    if processes > 1:
        port = str(free_port())
        launcher = [str(BIN / "colossalai"), "run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PATH=f"{BIN}:{os.environ['PATH']}")
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen([*launcher, *script], env=environment, stdout=log, stderr=log, start_new_session=True)


def workers(config: str) -> list[psutil.Process]:
    """The training processes themselves, not their launchers: `python .../train_x.py --config FILE`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        # colossalai run, the shell it starts and torchrun all carry --nproc_per_node
        if config in words and not any("nproc_per_node" in word for word in words):
            found.append(process)
    return found


def wait_for_step(output: Path, step: int, process: subprocess.Popen, folder: Path):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if output.joinpath("metrics.jsonl").exists():
            lines = output.joinpath("metrics.jsonl").read_text().splitlines()
            if any(json.loads(line)["step"] >= step for line in lines[-3:-1]):
                return
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {(folder / 'log.txt').read_text()[-3000:]}")


@pytest.mark.parametrize(("algorithm", "processes"), [("sft", 2), ("reward", 1), ("ppo", 2)])
def test_sigterm_then_kill_then_resume_gives_the_uninterrupted_weights(algorithm, processes, tiny_world, tmp_path):
    """PITFALL 25, 26 and 31: SIGTERM saves and exits 0; a killed worker ends the run with a non-zero exit."""
    steps = 40 if algorithm == "ppo" else 150
    changes = dict(steps=steps, save_every=7, tensorboard=False)
    if algorithm == "ppo":
        changes |= dict(temperature=1.0)
    settings = settings_for(algorithm, tiny_world, output_dir=str(tmp_path / "whole"), **changes)
    whole = start(algorithm, settings, processes, tmp_path)
    assert whole.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()[-3000:]

    output = tmp_path / "cut"
    settings |= dict(output_dir=str(output), resume="auto")
    config = str(tmp_path / f"{algorithm}.yaml")
    first = start(algorithm, settings, processes, tmp_path)
    wait_for_step(output, steps // 8, first, tmp_path)
    for worker in workers(config):
        worker.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 0
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert "SIGTERM received: saved step" in (tmp_path / "log.txt").read_text()

    second = start(algorithm, settings, processes, tmp_path)
    wait_for_step(output, steps // 2, second, tmp_path)
    os.kill(workers(config)[0].pid, signal.SIGKILL)
    assert second.wait(timeout=60) != 0
    deadline = time.monotonic() + 30
    while workers(config) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(config)

    third = start(algorithm, settings, processes, tmp_path)
    assert third.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    for name in ("model", "critic") if algorithm == "ppo" else ("model",):
        expected = load_file(tmp_path / "whole" / name / "model.safetensors")
        found = load_file(output / name / "model.safetensors")
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    logs = [
        [row.get("loss", row.get("policy_loss")) for row in read_metrics(run)] for run in (tmp_path / "whole", output)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == steps + 1
