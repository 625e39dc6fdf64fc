"""What a tracker leaves on disk, through a crash and a resume; what progress prints."""

import gc
import importlib
import json
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from coati.config import parse_config
from coati.errors import UserError
from coati.tracking import (
    NullTracker,
    Tracker,
    TrackingConfig,
    make_tracker,
    progress_bar,
    read_metrics,
    read_run,
    read_samples,
)

SETTINGS = {"model": {"path": "tiny"}, "parallel": {"plugin": "zero2"}, "learning_rate": 3e-4}


def start(run_dir, resume_step=None, **options):
    config = TrackingConfig(**options)
    return Tracker(run_dir, config, algorithm="ppo", settings=SETTINGS, resume_step=resume_step)


def log_steps(tracker, first, last):
    for step in range(first, last + 1):
        tracker.log({"reward/mean": step / 3, "kl": 0.1 * step}, step)
        tracker.log({"eval/reward": step / 2}, step)
        if step % 2 == 0:
            tracker.log_samples([{"prompt": "p", "response": f"at {step}", "reward": 1.0}], step)


def without_time(records):
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def lines(path):
    return without_time(json.loads(line) for line in path.read_text().splitlines())


def test_metrics_are_read_back_one_dict_a_step(tmp_path):
    tracker = start(tmp_path)
    log_steps(tracker, 1, 2)
    assert without_time(read_metrics(tmp_path)) == [
        {"step": 1, "reward/mean": 1 / 3, "kl": 0.1, "eval/reward": 0.5},
        {"step": 2, "reward/mean": 2 / 3, "kl": 0.2, "eval/reward": 1.0},
    ]


def test_each_line_is_on_disk_before_log_returns(tmp_path):
    tracker = start(tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.log_samples([{"prompt": "p", "response": "r"}], 1)
    assert len(read_metrics(tmp_path)) == len(read_samples(tmp_path)) == 1


def test_large_numbers_keep_their_value(tmp_path):
    """PITFALL 11: 70000 must not become inf on the way through half precision."""
    values = {"python": 70000, "numpy": np.float64(70000.5), "torch": torch.tensor(70001.0), "long": 1e30}
    start(tmp_path).log(values, 1)
    assert without_time(read_metrics(tmp_path)) == [
        {"step": 1, "python": 70000.0, "numpy": 70000.5, "torch": 70001.0, "long": 1e30}
    ]


def test_values_that_are_not_finite_stay_valid_json_and_come_back(tmp_path):
    start(tmp_path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan)}, 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    stored = json.loads(line, parse_constant=refuse)
    assert (stored["a"], stored["b"], stored["c"]) == ("nan", "inf", "-inf")
    record = read_metrics(tmp_path)[0]
    assert math.isnan(record["a"]) and math.isnan(record["d"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_samples_are_visible_as_they_were_written(tmp_path):
    """PITFALL 33: anybody can read what the model says, also when it says "nan" or broken Unicode."""
    rows = [
        {"prompt": "hi\u2028there", "response": "nan", "reward": torch.tensor(0.5)},
        {"prompt": "\ud800", "response": "谢谢", "reward": math.nan},
    ]
    start(tmp_path).log_samples(rows, 3, name="eval")
    assert read_samples(tmp_path) == [
        {"step": 3, "name": "eval", "prompt": "hi\u2028there", "response": "nan", "reward": 0.5},
        {"step": 3, "name": "eval", "prompt": "?", "response": "谢谢", "reward": "nan"},
    ]
    assert "谢谢" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("torn", ["", '{"step": 8, "ti', '{"step": 8, "time": 1.0, "kl": 0.8}', "\xff"])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, torn):
    whole = start(tmp_path / "whole")
    log_steps(whole, 1, 9)
    killed = start(tmp_path / "killed")
    log_steps(killed, 1, 7)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write(torn)
    resumed = start(tmp_path / "killed", resume_step=4)
    log_steps(resumed, 5, 9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "killed" / name) == lines(tmp_path / "whole" / name)


def test_resuming_past_a_torn_line_starts_a_new_line(tmp_path):
    start(tmp_path).log({"loss": 1.0}, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    start(tmp_path, resume_step=1).log({"loss": 0.5}, 2)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 0.5]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_a_fresh_run_sets_an_earlier_log_aside(tmp_path):
    start(tmp_path).log({"loss": 1.0}, 5)
    start(tmp_path).log({"loss": 2.0}, 1)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [2.0]
    assert lines(tmp_path / "metrics.previous.jsonl") == [{"step": 5, "loss": 1.0}]


def test_run_json_describes_the_run(tmp_path):
    tracker = start(tmp_path, run_name="first")
    run = read_run(tmp_path)
    assert (run["algorithm"], run["name"], run["status"]) == ("ppo", "first", "running")
    assert (run["settings"], run["world_size"]) == (SETTINGS, 1)
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # of the build both may say more
    assert {"python", "transformers", "colossalai", "coati"} <= run["versions"].keys()
    tracker.finish("interrupted")
    tracker.finish("finished")
    first = read_run(tmp_path)
    assert first["status"] == "interrupted"
    start(tmp_path, resume_step=3)
    second = read_run(tmp_path)
    assert (second["start"], second["run_id"]) == (first["start"], first["run_id"])
    assert [session["resume_step"] for session in second["sessions"]] == [None, 3]
    assert second["sessions"][0]["end"] == first["sessions"][0]["end"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_session_ends_at_its_last_line(tmp_path):
    start(tmp_path).log({"loss": 1.0}, 1)
    last_sign = (tmp_path / "metrics.jsonl").stat().st_mtime
    start(tmp_path, resume_step=1)
    assert read_run(tmp_path)["sessions"][0]["end"] == last_sign


def test_misuse_is_refused(tmp_path):
    tracker = start(tmp_path)
    tracker.log({"loss": 1.0}, 5)
    with pytest.raises(ValueError, match="step 4 comes after step 5"):
        tracker.log({"loss": 1.0}, 4)
    with pytest.raises(ValueError, match="time"):
        tracker.log({"time": 1.0}, 6)
    assert len(read_metrics(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another run folder"):
        start(tmp_path / "file" / "run")


@pytest.mark.parametrize("module", ["wandb", "tensorboard", "mlflow", "trackio", "swanlab"])
def test_an_absent_library_is_named_with_its_remedy(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {module}"):
        start(tmp_path / "run", trackers=[module], tracking_mode="offline")
    assert not (tmp_path / "run").exists()


def test_only_rank_0_records(tmp_path, monkeypatch, capsys):
    # other tests of this process may have started a process group, which would be asked first
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    tracker = make_tracker(tmp_path / "run", TrackingConfig(), algorithm="sft", settings={})
    assert isinstance(tracker, NullTracker)
    tracker.log({"loss": 1.0}, 1)
    tracker.log_samples([{"prompt": "p"}], 1)
    tracker.finish("finished")
    with progress_bar(2, "sft", TrackingConfig(progress="plain")) as bar:
        bar.advance(tokens=10)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    make_tracker(tmp_path / "run", TrackingConfig(), algorithm="sft", settings={}).log({"loss": 1.0}, 1)
    assert read_run(tmp_path / "run")["world_size"] == 8


def test_memory_does_not_grow_with_the_steps(tmp_path):
    """PITFALL 37: a tracker keeps no history."""
    tracker = start(tmp_path)

    def log(first, last):
        for step in range(first, last):
            tracker.log({"loss": float(step), "kl": 0.1}, step)
            tracker.log_samples([{"prompt": f"prompt {step}", "response": "word " * 50}], step)

    log(0, 300)
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    log(300, 2300)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # 2,000 steps kept would be over 500,000 bytes.
    assert grown < 50_000


def test_options_come_from_the_command_line():
    words = ["--trackers", "wandb", "tensorboard", "--tracking_mode", "offline", "--run_name", "a"]
    config = parse_config(TrackingConfig, words)
    assert config == TrackingConfig(trackers=["wandb", "tensorboard"], tracking_mode="offline", run_name="a")


def test_plain_progress_prints_first_now_and_then_and_last(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 1))
    progress = importlib.import_module("coati.tracking.progress")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(30, "ppo", TrackingConfig(progress="auto"), initial=5) as bar:
        for _ in range(25):
            now[0] = float(next(clock)) + 1
            bar.advance(tokens=100, reward=0.5)
    out, err = capsys.readouterr()
    printed = err.splitlines()
    assert out == ""
    assert [line.split()[1] for line in printed] == ["6/30", "16/30", "26/30", "30/30"]
    assert printed[1] == "ppo 16/30  00:11<00:14  100 tokens/s  reward 0.5"
    assert printed[-1].startswith("ppo 30/30  00:25<00:00")


def test_plain_progress_says_where_an_interrupted_run_stopped(capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar(9, "sft", TrackingConfig(progress="plain")) as bar:
        for _ in range(3):
            bar.advance()
        raise KeyboardInterrupt
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/9", "3/9"]


def test_bar_shows_step_speed_and_metrics(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with progress_bar(3, "sft [1]", TrackingConfig(progress="bar")) as bar:
        for _ in range(3):
            bar.advance(tokens=1000, loss=2.5)
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("sft [1]", "3/3", "tokens/s", "loss 2.5"):
        assert part in err


def test_progress_off_prints_nothing(capsys):
    with progress_bar(1, "sft", TrackingConfig(progress="off")) as bar:
        bar.advance(tokens=1)
    assert capsys.readouterr() == ("", "")


def test_importing_is_light():
    heavy = ("torch", "wandb", "rich", "tensorboard", "mlflow", "trackio", "swanlab")
    code = f"import sys, coati.tracking; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
