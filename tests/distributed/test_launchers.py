"""Whatever happens to a run, all its processes end within 30 seconds, with the status that docs/launching.md promises.

    COATI_FIGURES=1 python -m pytest tests/distributed/test_launchers.py   # writes what was seen into that page
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from coati.parallel.checkpoint import incomplete
from examples.stages import fill_figures
from tests.conftest import ROOT, settings_for
from tests.distributed.runs import launcher, processes_of, start, wait_for_step, workers

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("train_rm_or_raise.py")
LIMIT = 30

EVENTS = {
    "killed": "a process gets SIGKILL",
    "exception": "an exception in one process",
    "ctrl-c": "Ctrl-C",
    "ctrl-c twice": "Ctrl-C twice",
    "sigterm": "SIGTERM to the launcher",
    "sigkill": "SIGKILL to the launcher",
}
SAVES = ("ctrl-c", "sigterm", "sigkill")  # and the others must not

# What the starting command returns. Negative: ended by that signal, which a shell shows as 128 + its number.
STATUS = {
    "colossalai": {"killed": 1, "exception": 1, "ctrl-c": 1, "ctrl-c twice": 1, "sigterm": -15, "sigkill": -9},
    "torchrun": {"killed": 1, "exception": 1, "ctrl-c": 1, "ctrl-c twice": 1, "sigterm": 1, "sigkill": -9},
    "coati": {"killed": 137, "exception": 1, "ctrl-c": 0, "ctrl-c twice": 130, "sigterm": 0, "sigkill": -9},
    "none": {"exception": 1, "ctrl-c": 0, "ctrl-c twice": 130, "sigterm": 0, "sigkill": -9},
}
QUICK = {("colossalai", event) for event in EVENTS} | {("coati", "killed"), ("coati", "sigterm"), ("none", "ctrl-c")}
CASES = [(name, event) for name, statuses in STATUS.items() for event in statuses]
seen: dict[tuple[str, str], str] = {}


def strike(event: str, process: subprocess.Popen, folder: Path):
    ranks = workers(folder) or [process]
    match event:
        case "killed":
            ranks[-1].send_signal(signal.SIGKILL)
        case "exception":
            ranks[-1].send_signal(signal.SIGUSR1)
        case "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        case "ctrl-c twice":
            for worker in ranks[:1]:  # so that the first one can't end the run
                worker.suspend()
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
            for worker in ranks[:1]:
                worker.resume()
        case "sigterm":
            process.terminate()
        case "sigkill":
            process.kill()


def seconds_until_gone(process: subprocess.Popen, folder: Path) -> float:
    started = time.monotonic()
    while time.monotonic() - started < LIMIT:
        if process.poll() is not None and not processes_of(folder):
            return time.monotonic() - started
        time.sleep(0.1)
    left = [(p.pid, p.status(), p.cmdline()) for p in processes_of(folder)]
    for survivor in processes_of(folder):
        survivor.kill()
    raise AssertionError(f"after {LIMIT} s: {left}\n{(folder / 'log.txt').read_text()[-3000:]}")


@pytest.mark.parametrize(
    ("name", "event"), [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_all_processes_end_with_the_promised_status(name, event, tiny_world, tmp_path):
    output = tmp_path / "run"
    settings = settings_for("reward", tiny_world, output_dir=str(output), steps=10**6, eval_every=0, tensorboard=False)
    process = start(name, SCRIPT, settings, tmp_path, processes=1 if name == "none" else 2)
    wait_for_step(output, 3, process, tmp_path)
    strike(event, process, tmp_path)
    seconds = seconds_until_gone(process, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert process.returncode == STATUS[name][event], log[-3000:]
    saved = [path for path in (output / "checkpoints").glob("step*") if not incomplete(path)]
    alone_and_killed = (name, event) == ("none", "sigkill")
    assert len(saved) == (event in SAVES and not alone_and_killed), log[-3000:]
    if event in SAVES and not alone_and_killed:
        assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    if event == "exception":
        assert log.count("RuntimeError: the test asked for this error") == 1
    shown = 128 - process.returncode if process.returncode < 0 else process.returncode
    seen[name, event] = f"{'saved, ' if saved else ''}{shown}, {seconds:.0f} s"


def test_coati_run_passes_arguments_on_and_shows_one_line_for_a_mistake(tmp_path):
    word = "a b'c\"$HOME;|<|im_end|>"
    command = [*launcher("coati", 2), str(SCRIPT), "--chat_template", word, "--no_such_option", word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr


@pytest.fixture(scope="module", autouse=True)
def figures():
    """Writes the table once all cases have been seen."""
    yield
    if os.environ.get("COATI_FIGURES") and len(seen) == len(CASES):
        names = {"colossalai": "`colossalai run`", "torchrun": "`torchrun`", "coati": "`coati run`", "none": "`python`"}
        rows = ["| | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
        for event, title in EVENTS.items():
            rows.append(f"| {title} | " + " | ".join(seen.get((name, event), "") for name in names) + " |")
        fill_figures(ROOT / "docs" / "launching.md", "\n".join(rows))
