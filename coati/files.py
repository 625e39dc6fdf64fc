"""Atomic writes of files and folders: written to a `.partial` path, synced to disk, renamed.

The next write to the same path removes what a killed process has left.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
REMOVED = f".removed{PARTIAL}"


def partial_path(target: Path) -> Path:
    """Where `atomic_write` has its caller write."""
    return target.with_name(target.name + PARTIAL)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A path to write a file at, or to make a folder at, which becomes `target` once all of it is on disk.

    If the block raises, what it has written is removed, and `target` is as it was. After a kill `target` is the old one
    or the new one, complete; a folder that is replaced is absent for a moment between two renames. Processes that may
    write to the same target must lock it themselves.
    """
    partial = partial_path(target)
    for left in (partial, _removed(target)):
        _delete(left)
    try:
        yield partial
        sync(partial)
        if target.is_dir():
            target.rename(_removed(target))
        os.replace(partial, target)
        sync_entry(target.parent)
    except BaseException:
        _delete(partial)
        raise
    _delete(_removed(target))


def replace_file(path: Path, text: str):
    """Writes a text file atomically: a reader sees the old file or the new one."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Any):
    """Writes a JSON file atomically.

    Raises:
        TypeError: JSON has no such value.
    """
    replace_file(path, json.dumps(value, indent=2) + "\n")


def remove_folder(folder: Path):
    """Renames a folder before it is removed, so that a kill in the middle leaves nothing that looks complete."""
    doomed = _removed(folder)
    _delete(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_partials(folder: Path):
    """Removes what processes that were killed have left directly in `folder`."""
    for partial in folder.glob(f"*{PARTIAL}"):
        _delete(partial)


def sync(path: Path):
    """Returns when a file, or a folder and everything in it, is on disk."""
    for entry in (path, *path.rglob("*")):
        sync_entry(entry)


def sync_entry(path: Path):
    """Returns when a file is on disk, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems sync files alone
            raise
    finally:
        os.close(number)


def _removed(target: Path) -> Path:
    return target.with_name(target.name + REMOVED)


def _delete(path: Path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
