"""Killed at any moment, or on a full disk, a run keeps a whole checkpoint and ends as if nothing had happened.

One run is killed again and again until it is through: whatever a kill may break, later kills and the end would show.

    COATI_FIGURES=1 python -m pytest tests/distributed/test_kills.py -m slow

writes what the thirty kills hit into docs/checkpoints.md.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coati.run_layout import MANIFEST, list_checkpoints
from coati.tracking.files import read_run
from examples.stages import fill_figures
from tests.conftest import ROOT, as_yaml, settings_for
from tests.distributed import forks, runs
from tests.distributed.runs import assert_same_end, log_of, whole_checkpoints

pytestmark = pytest.mark.distributed
SECONDS_TO_END = 30
PATIENCE = 300  # for a step to come on a busy machine
MOMENTS = ("while it starts", "at any time", "while it writes", "before the rename", "after the rename")
LEFT = "left-by-a-kill"  # a file in partial folders that are there before an attempt starts
VICTIMS = {"rank 0": [0], "rank 1": [1], "all": [0, 1]}


@dataclass
class Kill:
    """`fraction` says how long after the moment, `saves` how many checkpoints later; with a launcher's name the run is
    started by that launcher instead of being forked."""

    moment: str
    victims: str
    fraction: float
    saves: int = 1
    launcher: str | None = None


class Attempt:
    """A run of two ranks that is to be killed."""

    def __init__(self, settings: dict, folder: Path, launcher: str | None = None):
        self.folder, self.output = folder, Path(settings["output_dir"])
        self.launched = runs.start(launcher, "ppo", settings, folder) if launcher else None
        self.forked = [] if launcher else forks.start_training("ppo", settings, folder)

    def lives(self) -> bool:
        return self.launched.poll() is None if self.launched else all(rank.is_alive() for rank in self.forked)

    def wait_until(self, holds: Callable[[], bool]):
        """Looks some thousand times a second, as what is waited for may pass."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert self.lives() and time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.0003)

    def kill(self, victims: list[int]):
        ranks = runs.workers(self.folder) if self.launched else self.forked
        for rank in victims:
            os.kill(ranks[rank].pid, signal.SIGKILL)

    def terminate(self):
        """What every launcher does when a rank has died. Ranks that wait for the group to form need it."""
        for rank in self.forked:
            rank.terminate()

    def statuses(self, seconds: float) -> list[int | None]:
        """Of the launcher, or of each rank: what is left of a group that was complete ends without help."""
        if self.launched:
            return [self.launched.wait(seconds)]
        return forks.wait(self.forked, seconds)

    def end(self):
        forks.end(self.forked)
        for process in runs.processes_of(self.folder) if self.launched else ():
            process.kill()

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()


def partial_folders(output: Path) -> dict[str, bool]:
    """Those of a save that is under way, and whether the list of files is in them already."""
    folders = (output / "checkpoints").glob("*.partial")
    return {folder.name: (folder / MANIFEST).exists() for folder in folders if not (folder / LEFT).exists()}


def steps_saved(output: Path) -> list[str]:
    return [folder.name for folder in whole_checkpoints(output)]


def strike(attempt: Attempt, kill: Kill) -> str:
    """Waits for the moment and kills; says where the kill hit."""
    output, before = attempt.output, steps_saved(attempt.output)

    def saved() -> bool:
        names = [path.name for path in list_checkpoints(output / "checkpoints")]
        return max(names, default="") >= f"step-{kill.saves + (int(before[-1][5:]) if before else 0):08d}"

    match kill.moment:
        case "while it starts":
            attempt.wait_until(lambda: attempt.launched is None or len(runs.workers(attempt.folder)) == 2)
            time.sleep(kill.fraction * 3)
        case "at any time":
            attempt.wait_until(saved)
            time.sleep(kill.fraction)
        case "while it writes":
            attempt.wait_until(lambda: any(not listed for listed in partial_folders(output).values()))
            time.sleep(kill.fraction * 0.1)
        case "before the rename":
            attempt.wait_until(lambda: any(partial_folders(output).values()))
            time.sleep(kill.fraction * 0.001)
        case "after the rename":
            attempt.wait_until(saved)
    attempt.kill(VICTIMS[kill.victims])
    hit = partial_folders(output)
    if any("removed" in name for name in hit):
        return "in the removal of an old checkpoint"
    return "between saves" if not hit else "before the rename" if any(hit.values()) else "while files were written"


def chain(kills: list[Kill], world, folder: Path, steps: int) -> Counter:
    """A run with these kills, then to its end, against one that nobody killed; how often what was hit."""
    changes = dict(steps=steps, plugin="zero2", temperature=1.0, kl_target=0.5, kl_horizon=50, normalize_reward=True)
    settings = settings_for("ppo", world, **changes)
    hits, output = Counter(), folder / "killed"
    killed = settings | dict(output_dir=str(output), save_every=1, resume="auto")
    for i, kill in enumerate(kills):
        before = steps_saved(output)
        for partial in (output / "checkpoints").glob("*.partial"):
            (partial / LEFT).touch()
        (folder / f"{i}").mkdir()
        attempt = Attempt(killed, folder / f"{i}", kill.launcher)
        try:
            hits[strike(attempt, kill)] += 1
            if kill.moment == "while it starts":
                attempt.terminate()
            statuses = attempt.statuses(SECONDS_TO_END)
            assert not {0, None} & set(statuses), f"{kill}: {statuses}\n{attempt.log()[-3000:]}"
        finally:
            attempt.end()
        after = steps_saved(output)
        assert (after or [""])[-1] >= (before or [""])[-1], f"{kill} cost a checkpoint"
        if kill.moment != "while it starts":
            assert went_on_from(output) == (int(before[-1][5:]) if before else None), kill
    assert steps_saved(output)[-1] < f"step-{steps:08d}", "it was through before the last kill: give it more steps"
    run_to_the_end("ppo", killed, folder / "end")
    run_to_the_end("ppo", settings | dict(output_dir=str(folder / "whole")), folder / "never")
    assert_same_end(folder / "whole", output)
    assert log_of(folder / "whole") == log_of(output) and len(log_of(output)) > steps
    assert not list((output / "checkpoints").glob("*.partial"))
    assert len(steps_saved(output)) <= settings.get("keep_checkpoints", 2) + 1
    return hits


def went_on_from(output: Path) -> int | None:
    return read_run(output)["sessions"][-1]["resume_step"]


def run_to_the_end(algorithm: str, settings: dict, folder: Path):
    ranks = forks.start_training(algorithm, settings, folder)
    try:
        assert forks.wait(ranks, 1200) == [0, 0], (folder / "log.txt").read_text()[-3000:]
    finally:
        forks.end(ranks)


def test_three_kills_do_not_show(tiny_world, tmp_path):
    """PITFALL 26, 31."""
    kills = [
        Kill("while it writes", "all", 0.2),
        Kill("before the rename", "rank 0", 0.0),
        Kill("at any time", "rank 1", 0.3),
    ]
    hits = chain(kills, tiny_world, tmp_path, steps=12)
    assert hits.total() == 3 and hits["between saves"] < 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_at_random_moments_do_not_show(tiny_world, tmp_path):
    draw = random.Random(5)
    launchers = {1: "colossalai", 8: "coati", 14: "torchrun", 15: "coati", 22: "torchrun", 28: "colossalai"}
    kills = []
    for i in range(30):
        victims = draw.choice(list(VICTIMS))
        kills.append(Kill(MOMENTS[i % 5], victims, draw.random(), draw.randint(1, 2), launchers.get(i)))
    started = time.monotonic()
    hits = chain(kills, tiny_world, tmp_path, steps=60)
    inside = hits.total() - hits["between saves"]
    assert hits.total() == 30 and inside >= 8
    if os.environ.get("COATI_FIGURES"):
        rows = [f"| {place} | {number} |" for place, number in sorted(hits.items(), key=lambda pair: -pair[1])]
        lines = ["| where the kill hit | kills |", "|---|---|", *rows, f"| all, {inside} of them in a save | 30 |", ""]
        lines.append(f"({time.monotonic() - started:.0f} s in all on a shared 2-core machine.)")
        fill_figures(ROOT / "docs" / "checkpoints.md", "\n".join(lines), "kills")


# --- no room


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train_until_full(folder: Path, kind: str, fraction: float, algorithm: str, config: str):
    """The run finds little room from its third save on: either files of more than `fraction` of the largest one so far
    are refused, which every machine can do, or so much of a checkpoint still fits on the disk."""
    from coati.trainers.trainer import Trainer

    save = Trainer.save

    def saved(self, score):
        if self.steps_done == 3:
            sizes = [path.stat().st_size for path in whole_checkpoints(self.folder.path)[-1].rglob("*")]
            if kind == "short files":
                limit = int(fraction * max(sizes))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            elif self.runtime.is_main:
                disk = os.statvfs(folder)
                with open(folder / "others", "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, int(disk.f_bavail * disk.f_bsize - fraction * sum(sizes)))
        save(self, score)

    Trainer.save = saved
    forks.train(algorithm, config)


@pytest.fixture(scope="module")
def settings(tiny_world) -> dict:
    return settings_for("sft", tiny_world, steps=6, save_every=1, plugin="zero1")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_the_end("sft", settings | dict(output_dir=str(folder / "run")), folder)
    return folder / "run"


FULL = [("short files", 0.75), ("full disk", 0.4)]
FULLER = [("short files", x) for x in (0.2, 0.5, 0.99)] + [("full disk", x) for x in (0.0, 0.2, 0.6, 0.8, 0.99)]


@pytest.mark.parametrize(
    ("kind", "fraction"), [pytest.param(*c, marks=[] if c in FULL else pytest.mark.slow) for c in FULL + FULLER]
)
def test_without_room_the_run_says_so_keeps_its_checkpoint_and_goes_on_later(kind, fraction, settings, whole, tmp_path):
    """PITFALL 26."""
    with small_disk(tmp_path / "disk", 64) if kind == "full disk" else contextlib.nullcontext(tmp_path) as disk:
        output = disk / "run"
        changes = settings | dict(output_dir=str(output), resume="auto")
        config = tmp_path / "config.yaml"
        config.write_text(as_yaml(changes))
        ranks = forks.start(train_until_full, tmp_path, 2, disk, kind, fraction, "sft", str(config))
        try:
            statuses = forks.wait(ranks, PATIENCE)
        finally:
            forks.end(ranks)
        log = (tmp_path / "log.txt").read_text()
        errors = [line for line in log.splitlines() if line.startswith("error:")]
        assert sorted(statuses) in ([1, 2], [2, 2]) and len(errors) == 1 and "Traceback" not in log, log[-3000:]
        for word in (f"{output} can't be written at step 3", "make room there", "--resume auto", "step-00000002"):
            assert word in errors[0]
        assert steps_saved(output) == ["step-00000001", "step-00000002"]
        # with not a byte left the word can't be written either
        assert read_run(output)["status"] == ("failed" if fraction > 0 else "running")
        (disk / "others").unlink(missing_ok=True)
        run_to_the_end("sft", changes, tmp_path / "again")
        assert went_on_from(output) == 2
        assert_same_end(whole, output)
