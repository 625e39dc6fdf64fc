"""The kit for a GPU runs here too, at tiny sizes on the CPU, so that it works when there is a GPU for half an hour."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PARTS = ("parity", "rollout", "vllm", "runs", "decode", "train", "planner")  # the quickstart is a test of its own


def run_kit(parts, output, *flags: str) -> subprocess.CompletedProcess:
    command = ["tools/gpu_check.sh", "--device", "cpu", "--parts", *parts, "--output", str(output), *flags]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_the_kit_passes_on_a_cpu(tmp_path):
    output = tmp_path / "figures.json"
    done = run_kit(PARTS, output)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(output.read_text())
    assert list(found["parts"]) == list(PARTS)
    assert found["versions"]["device"] == "cpu" and found["versions"]["torch"]
    for name, part in found["parts"].items():
        assert part["status"] == 0 and (name in ("planner", "vllm") or part["figures"]), name


def test_a_part_that_fails_is_told_and_stops_no_other(tmp_path):
    """Of a time that is up."""
    output = tmp_path / "figures.json"
    done = run_kit(("parity", "rollout"), output, "--minutes", "0")
    assert done.returncode == 1 and "no time left" in done.stdout
    assert {part["status"] for part in json.loads(output.read_text())["parts"].values()} == {"no time left"}
