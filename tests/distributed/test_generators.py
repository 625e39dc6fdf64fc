"""Generators: what they sample is a matter of the settings, not of time, and nothing that they have sampled is lost."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, settings_for
from tests.distributed import runs
from tests.distributed.runs import assert_same_end, log_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]
PATIENCE = 600
DELAYED = ROOT / "tests" / "distributed" / "delayed.py"
SAMPLED = dict(temperature=1.0, steps=4, save_every=2)


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


@pytest.mark.parametrize(("processes", "generators"), [(1, 2), (2, 1)])
def test_without_staleness_the_run_is_the_synchronous_one_to_the_last_bit(processes, generators, tiny_world, tmp_path):
    synchronous = run("grpo", tiny_world, tmp_path / "synchronous", processes, 0, **SAMPLED)
    asynchronous = run("grpo", tiny_world, tmp_path / "asynchronous", processes, generators, **SAMPLED)
    assert_same_run(synchronous, asynchronous)


@pytest.mark.parametrize(("algorithm", "staleness"), [("grpo", 1), ("ppo", 2)])
def test_delays_change_nothing(algorithm, staleness, tiny_world, tmp_path):
    changes = SAMPLED | dict(max_staleness=staleness, steps=5)
    prompt = run(algorithm, tiny_world, tmp_path / "prompt", **changes)
    late = run(algorithm, tiny_world, tmp_path / "late", 1, 2, dict(DELAYS="0.5"), **changes)
    assert_same_run(prompt, late)
    ahead = [row["staleness"] for row in log_of(prompt) if "staleness" in row]
    assert ahead == [min(k, staleness) for k in range(5)]
