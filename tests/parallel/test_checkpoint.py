"""Atomic checkpoints, in one process without a process group."""

import errno
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from coati.errors import UserError, no_room
from coati.files import partial_path
from coati.parallel.checkpoint import Checkpoints
from coati.parallel.communication import Communicator
from coati.parallel.runtime import Runtime, random_state, restore_random_state, seed_everything
from coati.run_layout import MANIFEST, incomplete, read_manifest
from tests.kills import killed_before, was_killed


def alone(rank: int = 0, world_size: int = 1) -> Runtime:
    device = torch.device("cpu")
    return Runtime(rank, world_size, rank, device, Communicator(0, 1, device))


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", alone())


def write(folder):
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(b"0123456789")
    (folder / "state.json").write_text("{}")


def write_and_die(folder):
    write(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_saved_checkpoint_is_whole_and_found(checkpoints):
    folder = checkpoints.save(7, write, metric=0.5)
    assert folder == checkpoints.newest() == checkpoints.best() == checkpoints.find("auto")
    assert checkpoints.find(str(folder)) == folder
    assert incomplete(folder) is None
    manifest = read_manifest(folder)
    assert (manifest["step"], manifest["metric"]) == (7, 0.5)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert manifest["files"] == {name: size for name, size in sizes.items() if name != MANIFEST}
    assert manifest["files"]["model/weights.bin"] == 10


def test_no_checkpoint_at_all(checkpoints):
    assert checkpoints.newest() is checkpoints.best() is checkpoints.find("auto") is None


def test_an_interrupted_save_is_never_taken_and_is_cleared_by_the_next(checkpoints):
    """PITFALL 26: what a kill in the middle of a save leaves does not look whole."""
    first = checkpoints.save(1, write)
    assert was_killed(lambda: checkpoints.save(2, write_and_die))
    assert names(checkpoints) == ["step-00000001", "step-00000002.partial"]
    assert checkpoints.newest() == checkpoints.find("auto") == first
    with pytest.raises(UserError, match=r"step-00000002\.partial is not a complete checkpoint"):
        checkpoints.find(str(checkpoints.folder / "step-00000002.partial"))
    checkpoints.save(3, write)
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


def test_a_partial_folder_with_a_whole_manifest_is_not_taken_either(checkpoints):
    """PITFALL 26: killed between writing the manifest and the rename."""
    folder = checkpoints.save(1, write)
    folder.rename(folder.with_suffix(".partial"))
    assert incomplete(folder.with_suffix(".partial"))
    assert checkpoints.newest() is None


def delete_file(folder):
    (folder / "model" / "weights.bin").unlink()


def shorten_file(folder):
    (folder / "model" / "weights.bin").write_bytes(b"0123")


def delete_manifest(folder):
    (folder / MANIFEST).unlink()


def damage_with(content: bytes):
    return lambda folder: (folder / MANIFEST).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete_file, "model/weights.bin is missing"),
        (shorten_file, "model/weights.bin has 4 bytes instead of 10"),
        (delete_manifest, "manifest.json is missing: the save was interrupted"),
        (damage_with(b""), "manifest.json is damaged"),
        (damage_with(b'{"step": 2, "files": {'), "manifest.json is damaged"),
        (damage_with(b'{"step": 2}'), "manifest.json is damaged"),
        (damage_with(b"\0" * 40), "manifest.json is damaged"),
        pytest.param(damage_with(b"[]"), "manifest.json is damaged"),
        pytest.param(damage_with(b"\xff\xfe\xff"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(checkpoints, damage, reason):
    """PITFALL 26: `--resume auto` takes the newest whole one, `--resume PATH` says what is wrong."""
    whole, broken = checkpoints.save(1, write), checkpoints.save(2, write)
    damage(broken)
    assert incomplete(broken) == reason
    assert checkpoints.newest() == whole
    with pytest.raises(UserError, match="not a complete checkpoint") as error:
        checkpoints.find(str(broken))
    assert reason in str(error.value)
    assert str(broken) in str(error.value)


def test_resuming_from_a_missing_path_is_an_error(checkpoints):
    with pytest.raises(UserError, match=r"no such folder.*--resume auto"):
        checkpoints.find(str(checkpoints.folder / "step-00000009"))


def test_the_newest_two_and_the_best_stay(checkpoints):
    """PITFALL 37: old checkpoints go, the best one never."""
    for step, metric in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        checkpoints.save(step, write, metric)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoints.best().name == "step-00000002"
    assert checkpoints.newest().name == "step-00000005"
    checkpoints.save(6, write, 0.95)
    assert names(checkpoints) == ["step-00000005", "step-00000006"]


def test_without_metrics_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, alone(), keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, write)
    assert names(checkpoints) == ["step-00000003"]
    assert checkpoints.best() is None


def test_steps_are_in_numeric_order(checkpoints):
    for step in (9, 10, 100):
        checkpoints.save(step, write)
    assert checkpoints.newest().name == "step-00000100"


def test_a_step_that_is_saved_again_is_replaced(checkpoints):
    checkpoints.save(1, write)
    folder = checkpoints.save(1, lambda f: (f / "other.bin").write_bytes(b"1"))
    assert "other.bin" in read_manifest(folder)["files"]
    assert not (folder / "state.json").exists()


def test_a_metric_that_is_nan_is_never_the_best(checkpoints):
    """PITFALL 7: NaN compares as neither larger nor smaller."""
    checkpoints.save(1, write, float("nan"))
    good = checkpoints.save(2, write, 0.5)
    assert checkpoints.best() == good


@pytest.mark.parametrize(("step", "allowed"), [(4, {3, 4}), (3, {2, 3})], ids=["a new step", "a step again"])
def test_killed_before_any_operation_on_files_a_save_leaves_whole_ones(checkpoints, tmp_path, step, allowed):
    """PITFALL 26: every single one of them, the removal of old checkpoints included."""
    for number, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpoints.save(number, write, metric)
    for operation in range(200):
        copy = Checkpoints(tmp_path / "copy", alone())
        shutil.copytree(checkpoints.folder, copy.folder)
        killed = killed_before(operation, copy.folder, lambda copy=copy: copy.save(step, write, 0.3))
        newest = copy.newest()
        assert read_manifest(newest)["step"] in allowed and incomplete(newest) is None
        assert copy.best().name == "step-00000001"
        assert all(incomplete(folder) for folder in copy.folder.glob("*.partial"))
        if not killed:
            break
        copy.save(5, write, 0.4)
        copy.save(6, write, 0.4)
        assert names(copy) == ["step-00000001", "step-00000005", "step-00000006"]
        shutil.rmtree(copy.folder)
    assert 15 < operation < 199 and read_manifest(newest)["step"] == step


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(checkpoints):
    """Or `auto` would go back to them, and what the run saves now would be removed as the oldest."""
    for step in (1, 2, 3, 4):
        checkpoints.keep = 9
        checkpoints.save(step, write, step / 10)
    checkpoints.keep = 2
    checkpoints.set_aside_after(2)
    assert checkpoints.newest().name == checkpoints.best().name == "step-00000002"
    checkpoints.save(3, write)
    assert names(checkpoints) == ["step-00000002", "step-00000003", "step-00000003.previous", "step-00000004.previous"]
    previous = checkpoints.folder / "step-00000004.previous"
    assert checkpoints.find(str(previous)) == previous
    checkpoints.set_aside_after(2)
    assert checkpoints.newest().name == "step-00000002"


def test_every_rank_syncs_what_it_wrote_before_the_others_go_on(checkpoints, monkeypatch):
    """On a shared file system only the machine that wrote a file has its content in memory."""
    checkpoints.folder.mkdir()
    partial_path(checkpoints.folder / "step-00000001").mkdir()
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    runtime = alone(1, 2)
    monkeypatch.setattr(runtime.communicator, "barrier", lambda: calls.append("barrier"))
    Checkpoints(checkpoints.folder, runtime).save(1, lambda folder: None)
    assert calls == ["barrier", "random-1-of-2.safetensors", "barrier", "barrier"]


def full(folder):
    write(folder)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_leaves_nothing_behind(checkpoints):
    """A full disk has room for the logs again."""
    first = checkpoints.save(1, write)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, full)
    assert names(checkpoints) == ["step-00000001"] and checkpoints.newest() == first


def by_torch(path):
    torch.save(torch.zeros(10**5), path)


def by_safetensors(path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(10**5)}, path)


def by_python(path):
    path.write_text("x" * 10**5)


@pytest.mark.parametrize("write_much", [by_torch, by_safetensors, by_python])
def test_every_librarys_error_when_there_is_no_room_is_known_as_one(write_much, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, before[1]))
    try:
        with pytest.raises(Exception) as error:
            write_much(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert no_room(error.value)


def test_so_is_torchs_other_one():
    """It comes when a small file is cut."""
    assert no_room(RuntimeError("basic_ios::clear: iostream error"))


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection closed by peer"), FileNotFoundError(errno.ENOENT, "x"), ValueError("os error")]
)
def test_other_errors_are_not(error):
    assert no_room(error) is None


def draw():
    return (
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist() + np.random.randn(2).tolist(),
        torch.rand(3).tolist() + torch.randn(20).tolist() + torch.randn(3).tolist(),
    )


@pytest.fixture
def own_random_state():
    """The test may do with all generators what it likes."""
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_random_states_come_back_bit_by_bit(checkpoints, own_random_state):
    """PITFALL 25, PITFALL 26: python's, numpy's and torch's generators go on as if nothing had happened."""
    seed_everything(5)
    _ = [random.random() for _ in range(700)], np.random.rand(701), torch.rand(702)
    folder = checkpoints.save(1, write)
    expected = draw()
    seed_everything(6)
    assert draw() != expected
    assert checkpoints.restore_random_state(folder)
    assert draw() == expected


@pytest.mark.parametrize("generator", ["python", "numpy"])
def test_random_states_come_back_in_the_middle_of_a_gaussian_pair(generator, own_random_state):
    """PITFALL 25: after an odd number of Gaussian draws, too."""
    gauss = {"python": lambda: random.gauss(0, 1), "numpy": np.random.randn}[generator]
    seed_everything(5)
    gauss()
    state = random_state()
    expected = [gauss() for _ in range(3)]
    restore_random_state(state)
    assert [gauss() for _ in range(3)] == expected


def test_another_number_of_ranks_has_no_random_state_to_restore(checkpoints, own_random_state):
    """PITFALL 4: a rank never takes the state of another one."""
    folder = checkpoints.save(1, write)
    before = random_state()
    for runtime in (alone(0, 2), alone(1, 2)):
        assert not Checkpoints(checkpoints.folder, runtime).restore_random_state(folder)
    torch.testing.assert_close(random_state(), before, rtol=0, atol=0, equal_nan=True)


def test_the_random_state_is_no_pickle(checkpoints):
    """PITFALL 30."""
    from safetensors.torch import load_file

    folder = checkpoints.save(1, write)
    assert {"python", "numpy", "torch"} <= load_file(folder / "random-0-of-1.safetensors").keys()
