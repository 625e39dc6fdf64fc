"""`coati run`: one process per GPU of this machine. A short launcher that passes signals on and reports what failed.

It does what torchrun can't: arguments go to the script unchanged, every run has a port of its own, a failure is one
line, and Ctrl-C or SIGTERM ends with the workers' own exit status, 0 once they have saved.
"""

import os
import signal
import socket
import subprocess
import sys
import time

SECONDS_TO_END = 10  # for the other processes once one has failed; the reason is then on its way out


def run(processes: int, command: list[str]) -> int:
    """Starts a command `processes` times and waits; returns the exit status of the first to fail, or 0. The processes
    share the cores, unless OMP_NUM_THREADS is set.

    Args:
        command: what Python is started with: a script, or -m and a module, and arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    workers: list[subprocess.Popen] = []
    signals: list[int] = []

    def pass_on(number, frame):
        signals.append(number)
        _send(workers, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for rank in map(str, range(processes)):
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        # in a session of its own: a terminal's Ctrl-C arrives once, through us
        workers.append(subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True))
    for number in signals:  # came before the last one had started
        _send(workers, number)
    return _wait(workers)


def _wait(workers: list[subprocess.Popen]) -> int:
    while all(worker.poll() in (None, 0) for worker in workers):
        if all(worker.returncode == 0 for worker in workers):
            return 0
        time.sleep(0.1)
    # the others fail because one was killed, so that is the one to name
    rank, failed = min(((i, w) for i, w in enumerate(workers) if w.returncode), key=lambda pair: pair[1].returncode > 0)
    status = failed.returncode
    if status < 0:
        print(f"error: process {rank} was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
    _send(workers, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
    _send(workers, signal.SIGKILL)
    return status if status > 0 else 128 - status


def _send(workers: list[subprocess.Popen], number: int):
    """To the whole group of each living worker, its data loaders included."""
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, number)
