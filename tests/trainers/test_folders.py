"""The folder of a run: one run at a time, free again where nothing has been done, and a cache that can't be written."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coati.config import configure
from coati.config.parse import nested
from coati.data.dataset import cache_write_errors
from coati.errors import UserError
from coati.run_layout import LOCK
from coati.tracking import read_metrics, read_run
from coati.trainers import loop, reference
from coati.trainers.config import SFTConfig
from coati.trainers.folder import holds_work, lock_folder
from tests.conftest import ROOT, settings_for, trainer_classes

ALGORITHMS = ["sft", "reward", "preference", "ppo", "grpo", "distill"]


def make(algorithm: str, world, runtime, output: Path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


class Died(Exception):
    pass


def die(*arguments, **keywords):
    raise Died


# --- a run that has done nothing


@pytest.mark.parametrize("method", ["evaluate", "step"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_died_before_its_first_step_does_not_block_the_next(
    method, algorithm, tiny_world, runtime, tmp_path, monkeypatch
):
    """REPORT 31: in its first evaluation or step, which is when wrong settings show."""
    output = tmp_path / "run"
    trainer = make(algorithm, tiny_world, runtime, output, steps=2)
    monkeypatch.setattr(trainer, method, die)
    with pytest.raises(Died):
        trainer.train()
    assert read_run(output)["status"] == "failed" and not (output / LOCK).exists()
    make(algorithm, tiny_world, runtime, output, steps=2).train()
    assert read_run(output)["status"] == "finished"
    assert [row["step"] for row in read_metrics(output)] == [0, 1, 2]


def test_nor_does_one_that_died_while_it_loaded(tiny_world, runtime, tmp_path):
    """REPORT 31."""
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text('{"unknown": 1}\n')
    with pytest.raises(UserError):
        make("sft", tiny_world, runtime, tmp_path / "run", train_data=[str(wrong)])
    assert not any((tmp_path / "run").iterdir())
    make("sft", tiny_world, runtime, tmp_path / "run", steps=1).train()


@pytest.mark.parametrize("left", ["a logged step", "a checkpoint", "a model"])
def test_one_that_has_done_something_does(left, tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 31: what could be lost is not touched without being asked."""
    output = tmp_path / "run"
    trainer = make("sft", tiny_world, runtime, output, steps=2, save_every=1)
    if left == "a logged step":
        monkeypatch.setattr(trainer, "save", die)
    elif left == "a checkpoint":
        monkeypatch.setattr(loop, "is_due", lambda trainer, every: every == 1 and trainer.steps_done == 1)
        monkeypatch.setattr(trainer.config, "log_every", 3)
        monkeypatch.setattr(trainer.folder, "export", die)
    else:
        monkeypatch.setattr(loop, "is_due", lambda trainer, every: False)
    try:
        trainer.train()
    except Died:
        assert left != "a model"
    found = [any(row["step"] > 0 for row in read_metrics(output)), any((output / "checkpoints").glob("step-*"))]
    assert [*found, (output / "model").exists()] == [left == "a logged step", left == "a checkpoint", left == "a model"]
    assert holds_work(output)
    with pytest.raises(UserError, match="already contains a run: use --resume auto"):
        make("sft", tiny_world, runtime, output, steps=2)
    monkeypatch.undo()
    make("sft", tiny_world, runtime, output, steps=2, resume="auto").train()


# --- two runs in one folder


def test_a_folder_that_another_run_writes_to_is_refused(tiny_world, runtime, tmp_path):
    """REPORT 28: by one line, from the start of the first run to its end, with --resume auto too; nothing is left."""
    output = tmp_path / "run"
    first = make("sft", tiny_world, runtime, output, steps=1)
    for resume in ("never", "auto"):
        with pytest.raises(UserError, match=f"another run is writing to {output}: wait .*--output_dir") as error:
            make("sft", tiny_world, runtime, output, resume=resume)
        assert "\n" not in str(error.value)
    first.train()
    assert not (output / LOCK).exists()
    make("sft", tiny_world, runtime, output, resume="auto")


def test_two_runs_started_at_once_are_one_run_and_one_line(tiny_world, tmp_path):
    """REPORT 28: as processes, each under a launcher of its own."""
    output = tmp_path / "run"
    settings = settings_for("sft", tiny_world, output_dir=str(output), steps=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(nested(SFTConfig, settings)))
    words = [sys.executable, str(ROOT / "examples" / "train_sft.py"), "--config", str(tmp_path / "run.yaml")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    runs = [subprocess.Popen(words, **pipes) for _ in range(2)]
    texts = [run.communicate(timeout=300) for run in runs]
    statuses = sorted(run.returncode for run in runs)
    assert statuses == [0, 2], texts
    [refusal] = [err for run, (_, err) in zip(runs, texts, strict=True) if run.returncode == 2]
    assert "another run is writing to" in refusal or "already contains a run" in refusal
    assert "Traceback" not in refusal
    assert [row["step"] for row in read_metrics(output)] == [0, 1, 2, 3]


def test_a_killed_run_gives_its_folder_back(tmp_path):
    """REPORT 28: the lock is the process's, not the file's."""
    code = "from pathlib import Path; from coati.trainers.folder import lock_folder\nimport time\n"
    code += f"lock = lock_folder(Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another run"):
        lock_folder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    lock_folder(tmp_path).release()


# --- the cache

READ_ONLY = "/sys"  # in which nobody, root included, makes files


@pytest.mark.parametrize("cache", [READ_ONLY, f"{READ_ONLY}/cache"])
def test_a_read_only_cache_is_one_line(cache, tiny_world, runtime, tmp_path):
    """REPORT 28."""
    with pytest.raises(
        UserError, match=rf"The cache folder {cache} can(no|')t be (created|written) \(.*--cache_dir"
    ) as error:
        make("sft", tiny_world, runtime, tmp_path / "run", cache_dir=cache)
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "run").iterdir())


@pytest.fixture
def no_room():
    """Files can't grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_cache_is_one_line_and_leaves_nothing_half_written(tiny_world, runtime, tmp_path, no_room):
    """REPORT 28."""
    with pytest.raises(UserError, match=r"The cache folder .* can't be written \(File too large\)"):
        make("sft", tiny_world, runtime, tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_so_is_one_that_is_full_when_the_references_log_probs_come(tiny_world, runtime, tmp_path, monkeypatch, no_room):
    """REPORT 28: they are kept there too."""
    write = reference._write
    small, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_without_room(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (small // 10, most))
        write(*arguments)

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    monkeypatch.setattr(reference, "_write", write_without_room)
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match=rf"The cache folder {cache} can't be written"):
        make("preference", tiny_world, runtime, tmp_path / "run", cache_reference=True, cache_dir=cache)


def test_what_is_in_a_read_only_cache_is_used(tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 28: it needs no lock and no write."""
    cache = tmp_path / "cache"
    make("sft", tiny_world, runtime, tmp_path / "first", cache_dir=str(cache))
    before = sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*"))
    monkeypatch.setattr("coati.data.dataset._build", die)
    monkeypatch.setattr("filelock.FileLock.acquire", lambda self, *a, **k: None if "run" in self.lock_file else die())
    make("sft", tiny_world, runtime, tmp_path / "run", cache_dir=str(cache))
    assert sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*")) == before


def test_errors_of_other_files_are_not_put_down_to_the_cache(tmp_path):
    """REPORT 28: such as a data file without permission."""
    with pytest.raises(PermissionError), cache_write_errors(tmp_path / "cache"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError), cache_write_errors(tmp_path / "cache"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "cache" / "x.lock"))
    with pytest.raises(ValueError, match="os error"), cache_write_errors(tmp_path / "cache"):
        raise ValueError("os error")


# --- samples


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_samples_are_kept_if_none_are_asked_for(algorithm, tiny_world, runtime, tmp_path):
    """REPORT 27: 0 makes sense."""
    make(algorithm, tiny_world, runtime, tmp_path / "run", samples=0, steps=1).train()
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1]
