"""`profile_steps`: traces and tables of the chosen steps, and nothing of the others."""

import gzip
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from coati.trainers import profiler
from coati.trainers.config import SFTConfig
from tests.conftest import settings_for, trainer_classes


def train(world, runtime, output, /, **changes):
    config_class, trainer_class = trainer_classes("sft")
    settings = settings_for("sft", world, output_dir=str(output), eval_data=[], **changes)
    trainer = trainer_class(configure(config_class, **settings), runtime)
    trainer.train()
    return trainer


def losses(output):
    return [row["loss"] for row in read_metrics(output)]


def test_chosen_steps_leave_a_trace_and_a_table_and_train_the_same(tiny_world, runtime, tmp_path, capsys):
    train(tiny_world, runtime, tmp_path / "plain", steps=3)
    assert not (tmp_path / "plain" / "profile").exists()
    capsys.readouterr()
    train(tiny_world, runtime, tmp_path / "profiled", steps=3, profile_steps=[1, 3])
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain")
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]
    said = capsys.readouterr().out
    for step in (1, 3):
        place = folder / f"step-{step:08d}"
        assert sorted(path.name for path in place.iterdir()) == ["rank-0.json.gz", "rank-0.txt"]
        with gzip.open(place / "rank-0.json.gz", "rt") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::mm", "aten::embedding"} <= names
        text = (place / "rank-0.txt").read_text()
        title, header, *rows = text.splitlines()
        assert title == f"profile of step {step} on rank 0"
        assert header.split() == ["CPU", "operation", "self", "ms", "calls", "share"]
        found = [re.fullmatch(r"(.{50}) +([\d.]+) +(\d+) +([\d.]+)%", row).groups() for row in rows]
        times, shares = [float(row[1]) for row in found], [float(row[3]) for row in found]
        assert len(found) == 10 and times == sorted(times, reverse=True) and times[0] > 0
        assert all(int(row[2]) > 0 for row in found)
        # all shares are of one total
        assert times[0] / times[4] == pytest.approx(shares[0] / shares[4], rel=0.2) and 10 < sum(shares) <= 100.1
        assert text in said


def test_nothing_is_profiled_when_it_is_off(tiny_world, runtime, tmp_path, monkeypatch):
    def refuse(**how):
        raise AssertionError("profiled")

    monkeypatch.setattr(profiler, "profile", refuse)
    train(tiny_world, runtime, tmp_path / "off", steps=1)
    with pytest.raises(AssertionError, match="profiled"):
        train(tiny_world, runtime, tmp_path / "on", steps=1, profile_steps=[1])


@pytest.mark.parametrize(("steps", "chosen", "named"), [(4, [5], "5"), (4, [2, 9, 4, 7], "9, 7")])
def test_steps_out_of_range_are_an_error_before_anything_is_loaded(tiny_world, steps, chosen, named):
    config = configure(SFTConfig, **settings_for("sft", tiny_world, steps=steps, profile_steps=chosen))
    with pytest.raises(UserError, match=f"profile_steps has {named}, but the run ends at step {steps}"):
        config.check(1)


def test_of_epochs_before_the_first_step(tiny_world, runtime, tmp_path):
    """How many steps they have is known once the data is."""
    changes = dict(steps=0, epochs=1.0)  # 40 rows in batches of 8
    with pytest.raises(UserError, match="profile_steps has 6, but the run ends at step 5"):
        train(tiny_world, runtime, tmp_path, profile_steps=[5, 6], **changes)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("chosen", [[0], [-1], [3, 0]])
def test_steps_count_from_1(tiny_world, chosen):
    with pytest.raises(UserError, match=r"profile_steps\[\d\] is .*at least 1"):
        configure(SFTConfig, **settings_for("sft", tiny_world, profile_steps=chosen))


def test_kernels_count_with_the_operation_that_started_them():
    """On a GPU the profiler lists kernels beside operations, and each kernel's time is in its operation's too."""
    cpu, gpu = profiler.DeviceType.CPU, profiler.DeviceType.CUDA
    event = partial(SimpleNamespace, self_cpu_time_total=10.0)
    events = [
        event(key="aten::add", count=4, self_device_time_total=1000.0, device_type=cpu),
        event(key="aten::mm", count=2, self_device_time_total=3000.0, device_type=cpu),
        event(key="sm90_gemm", count=2, self_device_time_total=3000.0, device_type=gpu),
    ]
    _, *rows = profiler._table(events, "self_device_time_total", "CUDA").splitlines()
    assert [row.split() for row in rows] == [["aten::mm", "3.00", "2", "75.0%"], ["aten::add", "1.00", "4", "25.0%"]]
