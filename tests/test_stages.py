"""How examples start their stages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STAGE = """
import os, signal, sys, time
def save(*_):
    os.write(1, b"saved\\n")
    sys.exit(7)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
os.write(1, b"training\\n")
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("by_terminal", [False, True], ids=["SIGTERM", "Ctrl-C"])
def test_a_stage_saves_what_it_has_when_its_example_is_stopped(by_terminal):
    """SIGTERM is sent to the example alone, Ctrl-C by the terminal to both."""
    example = f"from examples.stages import run; run([{sys.executable!r}, '-c', {STAGE!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", example], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert any(line == "training\n" for line in process.stdout)
        if by_terminal:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 7
