"""Scores samples one at a time in processes of their own, which can be ended, while generation goes on.

Each process belongs to a thread that sends it one sample after another, waits for the score up to a timeout,
and replaces it where it hangs or dies. The processes import neither torch nor the run's script.
"""

import contextlib
import ctypes
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from coati.rewards.base import Outcome, Reward
from coati.rewards.function import load_function
from coati.samples import Sample

SECONDS_TO_START = 120.0
PR_SET_PDEATHSIG = 1


def score_one(reward: Reward, sample: Sample) -> Outcome:
    """One sample's score, or None. Whatever the reward raises, and a score that isn't finite, is a failure."""
    try:
        [score] = reward.score([sample])
        if score is None:
            return Outcome(None)
        if not math.isfinite(score):
            raise ValueError(f"a reward must be finite, not {score}")
        return Outcome(float(score))
    except Exception as error:  # a user's function may fail in any way
        return Outcome(None, describe(error))


def describe(error: Exception) -> str:
    """The last line of its traceback."""
    return traceback.format_exception_only(error)[-1].strip()


class Pool:
    """Workers that share one queue.

    Args:
        rewards: by name: a reward that can be pickled, or the place of a function (`FILE.py:function`).
        timeout: seconds for one sample.
    """

    def __init__(self, rewards: dict[str, Any], workers: int, timeout: float):
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.workers = [_Worker(self.tasks, rewards, timeout) for _ in range(workers)]
        self.close = weakref.finalize(self, _close, self.tasks, self.workers)
        for worker in self.workers:
            worker.start()

    def submit(self, name: str, sample: Sample) -> "Future[Outcome]":
        """Has a sample scored by the reward of this name."""
        future: Future[Outcome] = Future()
        self.tasks.put((future, name, sample))
        return future


def _close(tasks: queue.SimpleQueue, workers: list["_Worker"]):
    for worker in workers:
        worker.closed = True
        worker.kill()
        tasks.put(None)


class _Worker(threading.Thread):
    """A thread and the process that it asks."""

    def __init__(self, tasks: queue.SimpleQueue, rewards: dict[str, Any], timeout: float):
        super().__init__(daemon=True, name="rewards")
        self.tasks, self.rewards, self.timeout, self.closed = tasks, rewards, timeout, False
        self.process: subprocess.Popen | None = None
        self.channel: Connection | None = None

    def run(self):
        self.ask(None)  # starts the process now, while the models load; if that fails, the first sample says how
        while (task := self.tasks.get()) is not None and not self.closed:
            future, *job = task
            future.set_result(self.ask(job))
        self.kill()

    def ask(self, job) -> Outcome:
        try:
            if self.process is None:
                self.begin()
            self.channel.send(job)
            if self.channel.poll(self.timeout):
                return self.channel.recv()
            error = f"TimeoutError: no score within {self.timeout:g} s, --reward_timeout"
        except Exception as odd:  # a process that dies, a column that can't be pickled, a file that is gone, ...
            error = f"{describe(odd)}; the process that scored it ended"
        self.kill()
        return Outcome(None, error)

    def begin(self):
        local_end, remote_end = socket.socketpair()
        with remote_end:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from coati.rewards.pool import work; work({remote_end.fileno()})"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # it finds what this process finds
                stdin=subprocess.DEVNULL,
                pass_fds=[remote_end.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer, which ends it later
            )
        self.channel = Connection(local_end.detach())
        self.channel.send((os.getpid(), self.rewards))
        if not self.channel.poll(SECONDS_TO_START):
            raise TimeoutError(f"it did not start within {SECONDS_TO_START:g} s")
        if failure := self.channel.recv():
            raise RuntimeError(failure)

    def kill(self):
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()


def work(fd: int):
    """What a worker's process does until the trainer is gone."""
    if sys.platform == "linux":  # even while it is stuck in a sample
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = Connection(fd)
    trainer, sent = channel.recv()
    if os.getppid() != trainer:
        return
    try:
        rewards = {name: load_function(x) if isinstance(x, str) else x for name, x in sent.items()}
        for reward in rewards.values():
            reward.load()
    except Exception as error:
        channel.send(describe(error))
        return
    channel.send("")
    with contextlib.suppress(EOFError):
        while True:
            job = channel.recv()
            if job is None:  # whether it has started
                channel.send(Outcome(None))
            else:
                name, sample = job
                channel.send(score_one(rewards[name], sample))
