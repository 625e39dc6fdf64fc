"""`coati run`: one process per GPU of this machine. A short launcher that passes signals on and reports what failed.

It does what torchrun can't: arguments go to the script unchanged, every run has a port of its own, a failure is one
line, and Ctrl-C or SIGTERM ends with the workers' own exit status, 0 once they have saved. Beside the processes that
train it may start generators, which sample for them (docs/asynchronous.md); one that dies is started again.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from coati.variables import GENERATOR, GENERATORS, GENERATORS_FOLDER, LAUNCHER, SECONDS_TO_SAVE

SECONDS_TO_END = 10  # for the other processes once one has failed; the reason is then on its way out
STARTS = 3  # of a generator that dies each time before it is ready


def run(processes: int, command: list[str], generators: int = 0) -> int:
    """Starts a command `processes` times and waits; returns the exit status of the first to fail, or 0. The processes
    share the cores, unless OMP_NUM_THREADS is set.

    Args:
        command: what Python is started with: a script, or -m and a module, and arguments.
        generators: how often it is started besides, to sample for the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // (processes + generators))
    workers: list[subprocess.Popen] = []
    signals: list[int] = []

    def pass_on(number, frame):
        signals.append(number)
        _send(workers, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    with _folder_of_addresses(generators) as environment:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, LAUNCHER: str(os.getpid()), **environment}
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in map(str, range(processes)):
            workers.append(_start(command, environment | group | {"RANK": rank, "LOCAL_RANK": rank}))
        for number in signals:  # came before the last one had started
            _send(workers, number)
        helpers = [Generator(i, processes + i, command, environment) for i in range(generators)]
        try:
            return _wait(workers, helpers)
        finally:
            _send([helper.process for helper in helpers], signal.SIGKILL)  # they have nothing to save


class Generator:
    """A process that samples for those that train.

    Args:
        number: its own; gpu: of this machine's, or of those that CUDA_VISIBLE_DEVICES names.
    """

    def __init__(self, number: int, gpu: int, command: list[str], environment: dict[str, str]):
        own = {
            GENERATOR: str(number),
            SECONDS_TO_SAVE: "0",
            "CUDA_VISIBLE_DEVICES": _visible(gpu, environment.get("CUDA_VISIBLE_DEVICES")),
        }
        self.number, self.command, self.environment = number, command, environment | own
        self.address = Path(environment[GENERATORS_FOLDER]) / f"{number}.json"
        self.failed_starts = 0
        self.process = _start(command, self.environment)

    def keep_alive(self) -> int | None:
        """Starts it again if it has died. Returns its exit status if that makes no sense: after a mistake of the
        user's, or where it dies again and again before it is ready."""
        status = self.process.poll()
        if status is None:
            return None
        self.failed_starts = 0 if self.address.exists() else self.failed_starts + 1
        if status == 2 or self.failed_starts == STARTS:
            return status or 1
        print(f"generator {self.number} {_ended(status)}: it is started again", file=sys.stderr, flush=True)
        self.address.unlink(missing_ok=True)
        self.process = _start(self.command, self.environment)
        return None


def _visible(gpu: int, visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a process to see one GPU.

    Args:
        visible: what it is; empty where all are hidden.
    """
    if visible is None:
        return str(gpu)
    names = [name for name in visible.split(",") if name]
    return names[gpu] if gpu < len(names) else ("" if not names else str(gpu))


@contextmanager
def _folder_of_addresses(generators: int):
    """The variables that have trainers and generators find each other; none without generators."""
    if not generators:
        yield {}
        return
    folder = tempfile.mkdtemp(prefix="coati-generators-")
    try:
        yield {GENERATORS_FOLDER: folder, GENERATORS: str(generators)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    # in a session of its own: a terminal's Ctrl-C arrives once, through us
    return subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True)


def _wait(workers: list[subprocess.Popen], generators: list[Generator]) -> int:
    while all(worker.poll() in (None, 0) for worker in workers):
        if all(worker.returncode == 0 for worker in workers):
            return 0
        for generator in generators:
            status = generator.keep_alive()
            if status is not None:
                print(f"error: generator {generator.number} {_ended(status)}", file=sys.stderr, flush=True)
                _end(workers)
                return status if status > 0 else 128 - status
        time.sleep(0.1)
    # the others fail because one was killed, so that is the one to name
    rank, failed = min(((i, w) for i, w in enumerate(workers) if w.returncode), key=lambda pair: pair[1].returncode > 0)
    status = failed.returncode
    if status < 0:
        print(f"error: process {rank} {_ended(status)}", file=sys.stderr, flush=True)
    _end(workers)
    return status if status > 0 else 128 - status


def _ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _end(processes: list[subprocess.Popen]):
    """SIGTERM, and SIGKILL to what is left after a while."""
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    _send(processes, signal.SIGKILL)


def _send(workers: list[subprocess.Popen], number: int):
    """To the whole group of each living worker, its data loaders included."""
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, number)
