"""Runs that are interrupted, as clusters interrupt them, end with the weights of a run that was left alone."""

import json
import os
import signal
import time

import pytest

from tests.conftest import settings_for
from tests.distributed.runs import assert_same_end, log_of, start, wait_for_step, workers

pytestmark = pytest.mark.distributed
GRACE = 30  # seconds that torchrun and SLURM give after SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "processes"), [("sft", 2), ("reward", 1), ("ppo", 2)])
def test_sigterm_then_kill_then_resume_gives_the_uninterrupted_weights(algorithm, processes, tiny_world, tmp_path):
    """PITFALL 25, 26 and 31: SIGTERM saves and exits 0; a killed worker ends the run with a non-zero exit."""
    launcher = "colossalai" if processes > 1 else "none"
    steps = 40 if algorithm == "ppo" else 80
    changes = dict(steps=steps, save_every=7)
    if algorithm == "ppo":
        changes |= dict(temperature=1.0)
    settings = settings_for(algorithm, tiny_world, output_dir=str(tmp_path / "whole"), **changes)
    whole = start(launcher, algorithm, settings, tmp_path, processes)
    assert whole.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()[-3000:]

    output = tmp_path / "cut"
    settings |= dict(output_dir=str(output), resume="auto")
    first = start(launcher, algorithm, settings, tmp_path, processes)
    wait_for_step(output, steps // 8, tmp_path, lambda: first.poll() is None)
    for worker in workers(tmp_path):
        worker.send_signal(signal.SIGTERM)
    assert first.wait(timeout=GRACE) == 0
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert "SIGTERM received: saved step" in (tmp_path / "log.txt").read_text()

    second = start(launcher, algorithm, settings, tmp_path, processes)
    wait_for_step(output, steps // 2, tmp_path, lambda: second.poll() is None)
    os.kill(workers(tmp_path)[0].pid, signal.SIGKILL)
    assert second.wait(timeout=GRACE) != 0
    deadline = time.monotonic() + GRACE
    while workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(tmp_path)

    third = start(launcher, algorithm, settings, tmp_path, processes)
    assert third.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert_same_end(tmp_path / "whole", output)
    assert log_of(tmp_path / "whole") == log_of(output)
    assert {row["step"] for row in log_of(output)} == set(range(steps + 1))
