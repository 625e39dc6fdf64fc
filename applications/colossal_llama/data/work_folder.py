"""The folder in which an output is made: OUTPUT.partial, until it is complete and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coati.errors import UserError
from coati.files import partial_path, remove_partials, replace_file, sync_entry
from coati.tracking.files import read_object

SETTINGS, MANIFEST, LOCK = "settings.json", "manifest.json", "lock"


@dataclass(frozen=True)
class WorkFolder:
    """Paths in the folder; what has its final name in it is complete."""

    path: Path
    output: Path

    @property
    def documents(self) -> Path:
        return self.path / "documents"

    def bucket(self, number: int) -> Path:
        """The folder of a bucket."""
        return self.path / f"bucket_{number:05d}"

    def write(self, name: str, text: str) -> Path:
        """Write a file atomically; returns its path."""
        replace_file(self.path / name, text)
        return self.path / name

    def read_manifest(self) -> dict | None:
        """The manifest of a run that was killed just before its end; else None."""
        return read_object(self.path / MANIFEST) if (self.path / MANIFEST).exists() else None

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path)

    def finish(self, manifest: dict) -> None:
        """Add the manifest, remove what only the work needed, and give the folder its final name."""
        self.write(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        shutil.rmtree(self.documents, ignore_errors=True)
        for name in ("tokenizer.json", LOCK):
            (self.path / name).unlink(missing_ok=True)
        os.rename(self.path, self.output)
        sync_entry(self.output.parent)
        (self.output / SETTINGS).unlink()


@contextmanager
def open_work_folder(output: Path, settings: dict) -> Iterator[WorkFolder]:
    """OUTPUT.partial, new or as a run with the same settings has left it; no other process uses it meanwhile.

    Raises `UserError` if another process does, if it was begun with other settings, or if it is not ours.
    """
    from filelock import FileLock, Timeout

    work = WorkFolder(partial_path(output), output)
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        with FileLock(work.path / LOCK, timeout=0):
            _begin_or_resume(work, settings)
            work.documents.mkdir(exist_ok=True)
            for folder in (work.path, work.documents):
                remove_partials(folder)
            yield work
    except Timeout:
        raise UserError(f"Another process is writing {work.path}; wait for it or give another --output.") from None
    except OSError as error:
        raise UserError(f"{error.filename or work.path} cannot be written ({error.strerror}).") from error


def _begin_or_resume(work: WorkFolder, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))
    if not (work.path / SETTINGS).exists():
        foreign = sorted({path.name for path in work.path.iterdir()} - {LOCK, partial_path(work.path / SETTINGS).name})
        if foreign:
            raise UserError(f"{work.path} holds {foreign[0]}, which is not ours; move it or give another --output.")
        work.write(SETTINGS, json.dumps(settings))
        return
    begun = read_object(work.path / SETTINGS)
    changed = [name for name in settings if begun.get(name) != settings[name]]
    if changed or begun.keys() != settings.keys():
        differences = ", ".join(f"{name} was {begun.get(name)}, is {settings[name]}" for name in changed)
        raise UserError(
            f"{work.path} was begun with other settings ({differences}); give the same ones to continue, or remove it."
        )
