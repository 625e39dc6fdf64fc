"""The one exception that a user is meant to read."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the person who started the run can mend: a file, a line, a flag, a combination.

    Its message is one sentence that names the place and the remedy. Entry points print it without a traceback
    and exit with status 2.
    """


def refuse(mistakes: dict[str, bool]):
    """Raises the first of these messages that is true."""
    for message, is_made in mistakes.items():
        if is_made:
            raise UserError(message)


def run_command(command: Callable[[], object]) -> int:
    """The exit status of a command: the number that it returns, else 0; 2 for a mistake of the user's, which goes to
    stderr."""
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
