"""The same function over many tasks, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from coati.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
Run = Callable[[Callable[[Task], Result], Sequence[Task]], Iterator[Result]]
"""A function and tasks to the results, in the order of the tasks."""


@contextmanager
def workers(count: int) -> Iterator[Run]:
    """`count` processes (none but this one for 1) that run functions; the results do not depend on their number.

    Raises `UserError` when a process is killed, as by the system when memory runs out.
    """
    if count == 1:
        yield map
        return
    # a forked child would inherit the locks of libraries' threads, which nothing would ever release there
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_end_with_parent)
    try:
        yield pool.map
    except BrokenProcessPool:
        raise UserError(
            "One of the processes was killed (out of memory?); run the same command again, with fewer --processes: "
            "it continues where it stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Otherwise a process whose parent is killed would wait for its next task forever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
