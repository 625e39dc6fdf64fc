"""Processes that are killed at a moment of the test's choice."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def was_killed(action: Callable[[], object]) -> bool:
    """Runs the action in a process of its own; whether it got SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def killed_before(operation: int, folder: Path, action: Callable[[], object]) -> bool:
    """Runs the action in a process that gets SIGKILL before its n-th operation on files below the folder; False if it
    came to the end before."""

    def counted():
        left = operation

        def count(event, arguments):
            nonlocal left
            if event in OPERATIONS:
                left -= event.startswith("shutil") or str(folder) in str(arguments) or "dir_fd" in str(arguments)
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()

    return was_killed(counted)
