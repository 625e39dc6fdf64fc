"""The exceptions that a user is meant to read."""

import errno
import os
import re
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
FORBIDDEN = (errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """Something the person who started the run can fix: a file, a line, a flag, a combination.

    Its message is one sentence that names the place and the remedy. Entry points print it without a traceback
    and exit with status 2.
    """


class RunError(RuntimeError):
    """Something went wrong around a run that nobody could know before, and what the run has done is safe.

    Its message is one sentence that says what is there and what to do. Entry points print it without a traceback and
    exit with status 1.
    """


def run_command(command: Callable[[], object]) -> int:
    """The exit status of a command: the number that it returns, else 0; 2 for a mistake of the user's, which goes to
    stderr."""
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def no_room(error: BaseException) -> str | None:
    """Why the disk is full, if that is what an error of Python, safetensors, tokenizers or torch says."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):  # of libraries in Rust
        number = int(match[1])
    if number in FULL:
        return os.strerror(number)
    if re.search(r"inline_container\.cc|PytorchStreamWriter|iostream error", str(error)):  # torch.save
        return "torch.save could not finish a file"
    return None


def unwritable(error: BaseException) -> str | None:
    """Why nothing can be written, if that is what an error says: there is no room, or no permission."""
    if isinstance(error, OSError) and error.errno in FORBIDDEN:
        return os.strerror(error.errno)
    return no_room(error)
