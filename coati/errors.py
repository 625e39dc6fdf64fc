"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the person who started the run can mend: a file, a line, a flag, a combination.

    Its message is one sentence that names the place and the remedy. Entry points print it without a traceback
    and exit with status 2.
    """
