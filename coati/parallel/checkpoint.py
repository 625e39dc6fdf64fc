"""Checkpoints that are whole or not there.

A checkpoint is written into `step-N.partial`, listed with the size of every file in `manifest.json`, and renamed. A
folder without a manifest, or whose files don't match it, is never loaded. What is removed becomes `.partial` first.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from coati.errors import UserError
from coati.parallel.runtime import Runtime, random_state, restore_random_state

MANIFEST, LOCK = "manifest.json", ".lock"
NAME = "step-" + "[0-9]" * 8


class Checkpoints:
    """The checkpoints of one run: `folder/step-00000020/`, the newest `keep` of them and the best.

    Args:
        keep: how many of the newest stay; the best one (by the metric given to `save`) stays beside them.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep: int = 2):
        self.folder, self.runtime, self.keep = folder, runtime, keep

    def save(self, step: int, write: Callable[[Path], None], metric: float | None = None) -> Path:
        """Writes one checkpoint on all ranks.

        Args:
            write: fills the folder it is given; called on every rank.
            metric: higher is better; None where there is nothing to compare.
        """
        target = self.folder / f"step-{step:08d}"
        partial = target.with_suffix(".partial")
        try:
            self._write(partial, write)
            if self.runtime.is_main:
                _write_manifest(partial, step, metric)
                if target.exists():
                    _remove(target)
                os.replace(partial, target)
                _sync(self.folder)
        except Exception:
            if self.runtime.is_main:  # room for the logs, if the disk is full
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.runtime.is_main:
            self._remove_old()
        self.runtime.communicator.barrier()
        return target

    def set_aside_after(self, step: int):
        """Renames the checkpoints of later steps, which a run that goes on from `step` leaves behind: `auto` must not
        find them, and they are not the newest."""
        for folder in self.folder.glob(NAME) if self.runtime.is_main else ():
            if int(folder.name.removeprefix("step-")) > step:
                aside = folder.with_suffix(".previous")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        for folder in reversed(self._complete()):
            return folder
        return None

    def best(self) -> Path | None:
        """The complete checkpoint with the highest metric."""
        scored = [(read_manifest(folder)["metric"], folder) for folder in self._complete()]
        scored = [(metric, folder) for metric, folder in scored if metric is not None and math.isfinite(metric)]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    def find(self, resume: str) -> Path | None:
        """What `--resume` asks for: `auto` the newest or None, a path exactly that one.

        Raises:
            UserError: the path is missing or incomplete.
        """
        if resume == "auto":
            return self.newest()
        folder = Path(resume)
        if problem := incomplete(folder):
            raise UserError(
                f"{folder} is not a complete checkpoint ({problem}); --resume auto takes the newest whole one"
            )
        return folder

    def restore_random_state(self, folder: Path) -> bool:
        """This rank's generators as they were; False if the checkpoint was written by another number of ranks."""
        from safetensors.torch import load_file

        path = folder / self._random_name()
        if not path.exists():
            return False
        restore_random_state(load_file(path))
        return True

    def _write(self, partial: Path, write: Callable[[Path], None]):
        if self.runtime.is_main:
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        self.runtime.communicator.barrier()
        write(partial)
        self._save_random_state(partial)
        self.runtime.communicator.barrier()

    def _save_random_state(self, folder: Path):
        from safetensors.torch import save_file

        save_file(random_state(), folder / self._random_name())

    def _random_name(self) -> str:
        return f"random-{self.runtime.rank}-of-{self.runtime.world_size}.safetensors"

    def _complete(self) -> list[Path]:
        return [folder for folder in sorted(self.folder.glob(NAME)) if incomplete(folder) is None]

    def _remove_old(self):
        best = self.best()
        for folder in self._complete()[: -self.keep]:
            if folder != best:
                _remove(folder)


def lock_folder(folder: Path):
    """A lock on a run's folder, held until it is released or this process ends; None where the file system has none.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another run is writing to {folder}: wait for its end, or name another folder with --output_dir"
        ) from error
    except (OSError, NotImplementedError):  # some network file systems can't lock
        return None
    return lock


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def incomplete(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint; None if it is."""
    if not folder.is_dir():
        return "no such folder"
    if folder.suffix == ".partial" or not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing: the save was interrupted"
    try:
        files = dict(read_manifest(folder)["files"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, size in files.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return None


def write_json(path: Path, value):
    """Aside and renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def _write_manifest(folder: Path, step: int, metric: float | None):
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / MANIFEST, {"step": step, "metric": metric, "files": files})
    for path in (folder, *folder.rglob("*")):  # on disk before the rename makes them count
        _sync(path)


def _sync(path: Path):
    """A file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(folder: Path):
    """A kill in the middle leaves a partial folder, which the next save clears."""
    doomed = folder.with_suffix(".removed.partial")
    folder.rename(doomed)
    shutil.rmtree(doomed)
