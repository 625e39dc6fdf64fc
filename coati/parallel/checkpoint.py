"""Atomic checkpoints.

A checkpoint is written into `step-N.partial`, listed with the size of every file in `manifest.json`, and renamed. A
folder without a manifest, or whose files don't match it, is never loaded. Removal renames to `.partial` first.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from coati.errors import UserError
from coati.files import atomic_write, partial_path, remove_folder, remove_partials, sync
from coati.parallel.runtime import Runtime, random_state, restore_random_state
from coati.run_layout import (
    best_checkpoint,
    checkpoint_of_step,
    incomplete,
    list_checkpoints,
    list_complete,
    newest_checkpoint,
    previous_name,
    random_state_name,
    step_of,
    write_manifest,
)


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
            write: fills the folder it is given, and syncs what it has written; called on every rank.
            metric: higher is better; None where there is nothing to compare.
        """
        target = checkpoint_of_step(self.folder, step)
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partials(self.folder)
        with atomic_write_by_all(target, self.runtime) as partial:
            if self.runtime.is_main:
                partial.mkdir()
            self.runtime.communicator.barrier()
            write(partial)
            self._save_random_state(partial)
            self.runtime.communicator.barrier()
            if self.runtime.is_main:
                write_manifest(partial, step, metric)
        if self.runtime.is_main:
            self._remove_old()
        self.runtime.communicator.barrier()
        return target

    def set_aside_after(self, step: int):
        """Renames the checkpoints of later steps, which a run that resumes from `step` abandons: `auto` must not find
        them, and they are not the newest."""
        if not self.runtime.is_main:
            return
        for folder in list_checkpoints(self.folder):
            if step_of(folder) > step:
                shutil.rmtree(previous_name(folder), ignore_errors=True)
                folder.rename(previous_name(folder))

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_checkpoint(self.folder)

    def best(self) -> Path | None:
        """The complete checkpoint with the highest metric."""
        return best_checkpoint(self.folder)

    def find(self, resume: str) -> Path | None:
        """What `--resume` asks for: `auto` the newest or None, a path exactly that one.

        Raises:
            UserError: the path is missing or incomplete.
        """
        if resume == "auto":
            return self.newest()
        folder = Path(resume)
        problem = incomplete(folder)
        if problem:
            raise UserError(
                f"{folder} is not a complete checkpoint ({problem}); use --resume auto for the newest complete one"
            )
        return folder

    def restore_random_state(self, folder: Path) -> bool:
        """Restores this rank's random generators; False if the checkpoint was written by another number of ranks."""
        from safetensors.torch import load_file

        path = folder / random_state_name(self.runtime.rank, self.runtime.world_size)
        if not path.exists():
            return False
        restore_random_state(load_file(path))
        return True

    def _save_random_state(self, folder: Path):
        from safetensors.torch import save_file

        path = folder / random_state_name(self.runtime.rank, self.runtime.world_size)
        save_file(random_state(), path)
        sync(path)

    def _remove_old(self):
        best = self.best()
        for folder in list_complete(self.folder)[: -self.keep]:
            if folder != best:
                remove_folder(folder)


def atomic_write_by_all(target: Path, runtime: Runtime) -> AbstractContextManager[Path]:
    """`atomic_write` for a folder that several ranks write into. They enter and leave together: rank 0 alone creates
    it, and renames it when all have synced what they wrote."""
    return atomic_write(target) if runtime.is_main else nullcontext(partial_path(target))
