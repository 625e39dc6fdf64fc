"""A question, and Python programs to answer it with, in the sandbox of the code rewards."""

from typing import Any

from coati.rewards.sandbox import check_sandbox, run_tests

SECONDS = 10.0


class PythonTool:
    """A row has `question`. What the policy says in the end is for the run's rewards to score, such as `math`.

    Every program runs by itself: nothing of an earlier one is left. Linux only, see docs/rewards.md.

    Raises:
        UserError: this machine can't isolate programs.
    """

    def __init__(self):
        check_sandbox()

    def reset(self, row: dict[str, Any]) -> str:
        return row["question"]

    def python(self, program: str) -> str:
        """Runs a Python program, and returns what it prints.

        Args:
            program: its text
        """
        return run_tests(program, "", SECONDS).output
