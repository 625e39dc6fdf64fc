"""Checkpoints that are whole or not there.

A checkpoint is written into `step-N.partial`, listed with the size of every file in `manifest.json`, and renamed. A
folder without a manifest, or whose files don't match it, is never loaded.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from coati.errors import UserError
from coati.parallel.launch import Runtime, random_state, restore_random_state

MANIFEST = "manifest.json"


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
        if self.runtime.is_main:
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        self.runtime.communicator.barrier()
        write(partial)
        self._save_random_state(partial)
        self.runtime.communicator.barrier()
        if self.runtime.is_main:
            _write_manifest(partial, step, metric)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            self._remove_old()
        self.runtime.communicator.barrier()
        return target

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

    def _save_random_state(self, folder: Path):
        from safetensors.torch import save_file

        save_file(random_state(), folder / self._random_name())

    def _random_name(self) -> str:
        return f"random-{self.runtime.rank}-of-{self.runtime.world_size}.safetensors"

    def _complete(self) -> list[Path]:
        return [folder for folder in sorted(self.folder.glob("step-*")) if incomplete(folder) is None]

    def _remove_old(self):
        best = self.best()
        for folder in self._complete()[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder)


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
    for name in files:  # on disk before the rename makes them count
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    write_json(folder / MANIFEST, {"step": step, "metric": metric, "files": files})
