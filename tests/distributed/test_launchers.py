"""Whatever happens to a run, all its processes end within 30 seconds, with the status that docs/launching.md promises.

With COATI_FIGURES=seen.json they, and tests/slurm, write what they see into that file and the page's table.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from coati.run_layout import incomplete
from coati.watch import lives
from examples.stages import fill_figures
from tests.conftest import ROOT, settings_for
from tests.distributed.runs import BIN, launcher, processes_of, start, wait_for_step, workers

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
SAVES = ("ctrl-c", "sigterm", "sigkill")
SAVES_NOT = {("none", "sigkill"), ("srun", "sigterm"), ("srun", "sigkill")}  # SLURM kills the tasks at once
NAMES = {
    "colossalai": "`colossalai run`",
    "torchrun": "`torchrun`",
    "coati": "`coati run`",
    "srun": "`srun`",
    "none": "`python`",
}

# What the starting command returns. Negative: ended by that signal, which a shell shows as 128 + its number.
STATUS = {
    "colossalai": {"killed": 1, "exception": 1, "ctrl-c": 1, "ctrl-c twice": 1, "sigterm": -15, "sigkill": -9},
    "torchrun": {"killed": 1, "exception": 1, "ctrl-c": 1, "ctrl-c twice": 1, "sigterm": 1, "sigkill": -9},
    "coati": {"killed": 137, "exception": 1, "ctrl-c": 0, "ctrl-c twice": 130, "sigterm": 0, "sigkill": -9},
    "none": {"exception": 1, "ctrl-c": 0, "sigterm": 0, "sigkill": -9},
}
QUICK = {("colossalai", "sigterm"), ("coati", "ctrl-c")}
CASES = [(name, event) for name, statuses in STATUS.items() for event in statuses]


def strike(event: str, process: subprocess.Popen, ranks: list[psutil.Process]):
    match event:
        case "killed":
            ranks[-1].kill()
        case "exception":
            ranks[-1].send_signal(signal.SIGUSR1)
        case "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        case "ctrl-c twice":
            ranks[0].suspend()  # the others now sit in a collective call
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(3)  # torchrun then has seen the first one, on a busy machine too
            os.killpg(process.pid, signal.SIGINT)
            deadline = time.monotonic() + 10
            while any(map(lives, ranks[1:])) and time.monotonic() < deadline:
                time.sleep(0.1)
            hang = list(filter(lives, ranks[1:]))
            if lives(ranks[0]):
                ranks[0].resume()
            assert not hang
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
    raise AssertionError(f"after {LIMIT} s: {left}\n{(folder / 'log.txt').read_text()[-3000:]}")


def check_the_end(name: str, event: str, status: int, tiny_world: dict[str, str], folder: Path, **environment):
    """Starts a run without end, lets the event happen, and looks at what is left."""
    output = folder / "run"
    settings = settings_for("reward", tiny_world, output_dir=str(output), steps=10**6, eval_every=0)
    settings["save_every"] = 0  # a checkpoint is then the one that was asked for
    process = start(name, SCRIPT, settings, folder, 1 if name == "none" else 2, **environment)
    try:
        wait_for_step(output, 3, folder, lambda: process.poll() is None)
        strike(event, process, workers(folder))
        seconds = seconds_until_gone(process, folder)
    finally:
        for survivor in processes_of(folder):
            survivor.kill()
    log = (folder / "log.txt").read_text()
    assert process.returncode == status, log[-3000:]
    saved = len([path for path in (output / "checkpoints").glob("step*") if not incomplete(path)])
    if event != "ctrl-c twice":  # which may come too late to keep a small model from being saved
        assert saved == (event in SAVES and (name, event) not in SAVES_NOT), log[-3000:]
        assert (json.loads((output / "run.json").read_text())["status"] == "interrupted") == bool(saved)
    if event == "exception":
        assert log.count("RuntimeError: the test asked for this error") == 1
    shown = 128 - status if status < 0 else status
    record(name, event, f"{'saved, ' if saved else ''}{shown}, {seconds:.0f} s")


def record(name: str, event: str, cell: str):
    """Adds what was seen to the file that COATI_FIGURES names and to the page."""
    if not os.environ.get("COATI_FIGURES"):
        return
    store = Path(os.environ["COATI_FIGURES"])
    seen = json.loads(store.read_text()) if store.exists() else {}
    seen[f"{name} {event}"] = cell
    store.write_text(json.dumps(seen))
    rows = ["| | " + " | ".join(NAMES.values()) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for event, title in EVENTS.items():
        rows.append(f"| {title} | " + " | ".join(seen.get(f"{name} {event}", "") for name in NAMES) + " |")
    fill_figures(ROOT / "docs" / "launching.md", "\n".join(rows))


@pytest.mark.parametrize(
    ("name", "event"), [pytest.param(*c, marks=[] if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_all_processes_end_with_the_promised_status(name, event, tiny_world, tmp_path):
    check_the_end(name, event, STATUS[name][event], tiny_world, tmp_path)


@pytest.mark.parametrize(
    ("launcher_name", "word", "status"),
    [("coati", "a b'c\"$HOME;|<|im_end|>", 2), ("colossalai", "'a b;|<|im_end|>'", 1)],
)
def test_arguments_arrive_and_a_mistake_is_one_line(launcher_name, word, status, tmp_path):
    """For `colossalai run` with the second pair of quotes that docs/launching.md asks for."""
    command = [*launcher(launcher_name, 2), str(SCRIPT), "--config", word]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == status
    ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(ours) == 1 and f"--config {word.strip(chr(39))}:" in ours[0], done.stderr
    if launcher_name == "coati":
        assert done.stderr.splitlines() == ours
