"""`coati plan generators`: rates of a run as its files have them, and splits by arithmetic."""

import json

import pytest

from coati.errors import UserError
from coati.planner import main
from coati.planner.generators import Rates, possible_splits, read_rates
from tests.tracking.test_timeline import START, row, write_job


def write_run(folder, trainers: int = 2, ahead: int = 1, iterations: int = 6, **parallel):
    """Iterations of seven seconds of work (publish, learn) and three of waiting; jobs of five seconds, one of which was
    interrupted for long; in the first iterations all take longer."""
    folder.mkdir()
    parallel = dict(plugin="ddp", precision="fp32") | parallel
    settings = dict(batch_size=12, algorithm=dict(minibatches=2), parallel=parallel)
    run = dict(algorithm="grpo", world_size=trainers, settings=settings | dict(generators=dict(max_staleness=ahead)))
    (folder / "run.json").write_text(json.dumps(run))
    rows = [row(step) for step in range(iterations)]
    for slow in rows[:2]:
        slow["seconds/learn"] = 100.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for k in range(iterations):
        write_job(folder / "journal", k, k % 2, START + 10 * k, generate=400.0 if k == 3 else 4.0)
    return folder


def test_rates_are_medians_of_what_the_processes_did(tmp_path):
    found = read_rates(write_run(tmp_path / "run", tensor_parallel=2))
    assert found == Rates(2, 2, 1, trainer_seconds=14.0, generator_seconds=10.0, seconds=10.0, copies=2, rows=6)


def test_the_slower_side_sets_the_pace_and_both_take_turns_at_0():
    rates = Rates(1, 1, 2, trainer_seconds=12.0, generator_seconds=24.0, seconds=30.0, copies=1, rows=6)
    splits = {(s.trainers, s.generators): s for s in possible_splits(rates, 9)}
    assert list(splits) == [(1, 8), (2, 7), (3, 6), (6, 3)]  # four and five don't divide six rows
    # one trainer has two jobs at most in the air, so six of eight generators are idle
    assert (splits[1, 8].seconds, splits[1, 8].generators_idle) == (12.0, 0.75)
    assert (splits[3, 6].seconds, splits[3, 6].trainers_idle, splits[3, 6].generators_idle) == (4.0, 0.0, 0.0)
    assert (splits[6, 3].seconds, splits[6, 3].trainers_idle) == (8.0, 0.75)
    synchronous = {(s.trainers, s.generators): s.seconds for s in possible_splits(Rates(1, 1, 0, 12, 24, 30, 1, 6), 9)}
    assert synchronous == {(1, 8): 36.0, (2, 7): 18.0, (3, 6): 12.0, (6, 3): 10.0}


def test_trainers_that_share_a_model_stay_together():
    rates = Rates(4, 2, 1, trainer_seconds=8.0, generator_seconds=8.0, seconds=6.0, copies=4, rows=8)
    assert [(s.trainers, s.generators) for s in possible_splits(rates, 16)] == [(4, 12), (8, 8)]


def test_the_command_names_the_best_split(tmp_path, capsys):
    assert main(["generators", str(write_run(tmp_path / "run")), "--gpus", "5"]) == 0
    printed = capsys.readouterr().out
    assert "max_staleness 1: 10 s per iteration" in printed
    [best] = [line.split() for line in printed.splitlines() if line.endswith("*")]
    assert best == ["3", "2", "5", "7%", "0%", "*"]
    assert "coati run --nproc_per_node 3 --generators 2" in printed


@pytest.mark.parametrize(
    "changes, gpus, reason",
    [(dict(iterations=2), 4, "no more than 2 iterations"), (dict(tensor_parallel=4), 4, "is a multiple of 4")],
)
def test_what_can_not_be_split_is_an_error(changes, gpus, reason, tmp_path):
    folder = write_run(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=reason):
        main(["generators", str(folder), "--gpus", str(gpus)])


def test_a_run_without_generators_has_no_rates(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "journal").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no journal"):
        read_rates(folder)
