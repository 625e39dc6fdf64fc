"""Outputs that are whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coati.errors import UserError


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output` if the block ends well, else it is removed.

    Raises:
        UserError: `output` is empty or exists, or its parent cannot be written.
    """
    if not output:
        raise UserError("No output folder is given; name one with --output.")
    target = Path(output)
    if target.exists():
        raise UserError(f"{target} exists; name another --output or remove it.")
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{aside} cannot be made ({error.strerror}); change --output.") from None
    try:
        yield aside
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
