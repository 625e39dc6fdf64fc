"""Atomic outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coati.errors import UserError
from coati.files import atomic_write


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
    with atomic_write(target) as folder:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{folder} can't be created ({error.strerror}); change --output.") from None
        yield folder
