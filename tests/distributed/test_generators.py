"""Generators: what they sample is a matter of the settings, not of time, and nothing that they have sampled is lost."""

import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from coati.run_layout import JOURNAL, WEIGHTS
from coati.tracking import read_metrics
from coati.variables import GENERATOR
from tests.conftest import ROOT, settings_for
from tests.distributed import runs
from tests.distributed.runs import assert_same_end, log_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]
PATIENCE = 600
DELAYED = ROOT / "tests" / "distributed" / "delayed.py"
SAMPLED = dict(temperature=1.0, steps=4, save_every=2)
IN_DIFFERENCES = dict(weights_format="differences", precision="bf16", learning_rate=1e-6)


def begin(algorithm: str, world, folder: Path, processes: int = 1, generators: int = 1, environment=(), **changes):
    folder.mkdir(exist_ok=True)
    settings = settings_for(algorithm, world, output_dir=str(folder / "run"), resume="auto", **changes)
    return runs.start("coati", f"{DELAYED} {algorithm}", settings, folder, processes, generators, **dict(environment))


def run(algorithm: str, world, folder: Path, *arguments, **options) -> Path:
    """A run from its start to its end; its output."""
    process = begin(algorithm, world, folder, *arguments, **options)
    assert process.wait(PATIENCE) == 0, (folder / "log.txt").read_text()[-4000:]
    assert not runs.processes_of(folder)
    return folder / "run"


def assert_same_run(expected: Path, found: Path):
    assert_same_end(expected, found)
    assert log_of(expected) == log_of(found)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "generators"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_without_staleness_the_run_is_the_synchronous_one_to_the_last_bit(processes, generators, tiny_world, tmp_path):
    synchronous = run("grpo", tiny_world, tmp_path / "synchronous", processes, 0, **SAMPLED)
    asynchronous = run("grpo", tiny_world, tmp_path / "asynchronous", processes, generators, **SAMPLED)
    assert_same_run(synchronous, asynchronous)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "staleness", "in_parts"), [("grpo", 1, False), ("ppo", 2, False), ("grpo", 3, True)]
)
def test_delays_change_nothing(algorithm, staleness, in_parts, tiny_world, tmp_path):
    changes = SAMPLED | dict(max_staleness=staleness, steps=5, partial_rollouts=in_parts)
    prompt = run(algorithm, tiny_world, tmp_path / "prompt", **changes)
    late = run(algorithm, tiny_world, tmp_path / "late", 1, 2, dict(DELAYS="0.5"), **changes)
    assert_same_run(prompt, late)
    ahead = [row["staleness"] for row in log_of(prompt) if "staleness" in row]
    assert (ahead == [min(k, staleness) for k in range(5)]) != in_parts


@pytest.mark.slow
def test_ranks_and_delays_change_nothing_in_parts(tiny_world, tmp_path):
    """Two processes that train take the steps of one; each has the next parts of its own responses drawn."""
    changes = SAMPLED | dict(max_staleness=3, steps=6, partial_rollouts=True, stop=["e"])
    alone = run("grpo", tiny_world, tmp_path / "alone", 1, 1, **changes)
    late = run("grpo", tiny_world, tmp_path / "late", 2, 2, dict(DELAYS="0.3"), **changes)
    logs = [[row for row in log_of(output) if "staleness" in row] for output in (alone, late)]
    for of_one, of_two in zip(*logs, strict=True):
        for name in ("reward", "response_length", "staleness", "policy_loss"):
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_differences_and_delays_change_nothing_with_shards(tiny_world, tmp_path):
    """Two processes under ZeRO-2, two generators that are late: the run with whole weights."""
    changes = SAMPLED | dict(max_staleness=2, steps=5, plugin="zero2", precision="bf16", learning_rate=1e-6)
    whole = run("grpo", tiny_world, tmp_path / "whole", 2, 1, **changes)
    changes |= dict(weights_format="differences")
    assert_same_run(whole, run("grpo", tiny_world, tmp_path / "late", 2, 2, dict(DELAYS="0.5"), **changes))
    sizes = [row["bytes/publish"] for row in read_metrics(tmp_path / "late" / "run") if "bytes/publish" in row]
    assert len(sizes) == 5 and max(sizes[1:]) < 0.5 * sizes[0]


def processes_by_kind(folder: Path) -> dict[str, list[psutil.Process]]:
    """The launcher of a run, its trainers and its generators."""
    kinds: dict[str, list[psutil.Process]] = {"launcher": [], "trainer": [], "generator": []}
    for process in runs.processes_of(folder):
        words, environment = process.cmdline(), runs.environment_of(process)
        if "--generators" in words:
            kinds["launcher"].append(process)
        elif str(folder / "config.yaml") in words:
            kinds["generator" if GENERATOR in environment else "trainer"].append(process)
    return kinds


def something_new(folder: Path, what: str) -> bool:
    """Whether a file is being written: of weights, of samples, of a checkpoint."""
    return any((folder / "run").glob(f"{what}/**/*.partial"))


MOMENTS = ("any", WEIGHTS, JOURNAL, "checkpoints")


def kill_once(process, folder: Path, kind: str, moment: str, draw: random.Random) -> bool:
    """Waits for a moment and kills a process of a kind; False if the run was over before."""
    deadline = time.monotonic() + draw.uniform(5, 25)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if moment != "any" and something_new(folder, moment):
            break
        time.sleep(0.001)
    victims = processes_by_kind(folder)[kind]
    if not victims:
        return process.poll() is None
    draw.choice(victims).kill()
    return True


def killed_until_through(algorithm: str, world, folder: Path, kills: int, seed: int, **changes) -> Counter:
    """A run that is killed so many times and started again whenever it has ended; which processes were hit."""
    draw, hit = random.Random(seed), Counter()
    jobs = folder / "jobs.txt"
    while True:
        process = begin(algorithm, world, folder, 1, 2, dict(JOBS=str(jobs), DELAYS="0.2"), **changes)
        while sum(hit.values()) < kills and process.poll() is None:
            kind, moment = draw.choice(["trainer", "generator", "generator", "launcher"]), draw.choice(MOMENTS)
            if kill_once(process, folder, kind, moment, draw):
                hit[kind] += 1
            if kind != "generator":  # which alone is started again by the launcher
                process.wait(PATIENCE)
        status = process.wait(PATIENCE)
        wait_for_nobody(folder)
        if status == 0:
            return hit


def wait_for_nobody(folder: Path):
    """Until all that a run has started is gone."""
    deadline = time.monotonic() + 60
    while left := runs.processes_of(folder):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.1)


def check_kills(world, folder: Path, kills: int, seed: int, weights_format: str = "whole", **changes) -> Counter:
    """Kills change nothing, nor does how weights travel, and no job that was written is done again."""
    changes = SAMPLED | dict(max_staleness=2, steps=8, save_every=2) | changes
    whole = run("grpo", world, folder / "whole", 1, 1, **changes)
    (folder / "killed").mkdir()
    changes |= dict(weights_format=weights_format)
    hit = killed_until_through("grpo", world, folder / "killed", kills, seed, **changes)
    assert_same_end(whole, folder / "killed" / "run")
    assert log_of(whole) == log_of(folder / "killed" / "run")
    done = Counter((folder / "killed" / "jobs.txt").read_text().split())
    journal = {path.name for path in (folder / "killed" / "run" / JOURNAL).glob("*/*.jsonl")}
    assert set(done) <= journal and len(journal) == 8
    assert set(done.values()) == {1}
    return hit


def test_delays_and_kills_change_nothing_and_lose_no_sample(tiny_world, tmp_path):
    assert sum(check_kills(tiny_world, tmp_path, kills=1, seed=0).values()) > 0


@pytest.mark.slow
def test_a_killed_run_with_differences_is_the_one_with_whole_weights(tiny_world, tmp_path):
    """Two generators that skip versions, five kills, resumes: checkpoints, models, metrics and samples are the same."""
    hit = check_kills(tiny_world, tmp_path, kills=5, seed=1, **IN_DIFFERENCES)
    sizes = {row["bytes/publish"] for row in read_metrics(tmp_path / "killed" / "run") if "bytes/publish" in row}
    whole = {row["bytes/publish"] for row in read_metrics(tmp_path / "whole" / "run") if "bytes/publish" in row}
    print(hit, sizes, whole)
    assert sum(hit.values()) > 0 and len(whole) == 1 and min(sizes) < 0.5 * min(whole)


@pytest.mark.slow
def test_a_killed_run_in_parts_is_the_one_that_nobody_killed(tiny_world, tmp_path):
    """Five kills; checkpoints hold the responses that have begun."""
    hit = check_kills(tiny_world, tmp_path, kills=5, seed=1, partial_rollouts=True)
    print(hit)
    assert sum(hit.values()) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "changes", [{}, IN_DIFFERENCES, dict(partial_rollouts=True)], ids=["whole", "differences", "parts"]
)
def test_neither_do_forty(changes, tiny_world, tmp_path):
    """Runs of ten kills each; of some that are quick, fewer hit."""
    hit, seed = Counter(), 0
    while sum(hit.values()) < 40:
        seed += 1
        (tmp_path / str(seed)).mkdir()
        hit += check_kills(tiny_world, tmp_path / str(seed), kills=10, seed=seed, **changes)
    print(hit)
    assert sum(hit.values()) >= 40 and len(hit) == 3
