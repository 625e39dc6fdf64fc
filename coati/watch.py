"""Ends this process when its launcher is gone, so that no run hangs or continues unseen. See docs/launching.md.

A thread watches, since the main thread may sit in a collective call for minutes. It starts before torch is imported,
which takes seconds, and so imports nothing heavy.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from coati.variables import LAUNCHER, SECONDS_TO_SAVE

POLL = 0.5
SECONDS_WITHOUT_WORKERS = 10.0
STOPS = (signal.SIGINT, signal.SIGTERM)
SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}
_watching = threading.Event()


def watch_launcher():
    """Starts the watch, once per process; from the main thread. What happens then:

    - A launcher goes away: SIGTERM to ourselves, which asks for a checkpoint; exit status 1 if that takes over 8 s
      (or what COATI_SECONDS_TO_SAVE says).
    - SIGINT or SIGTERM before `launch`: the process ends at once, there is nothing to save.
    - After SIGINT another signal, or no launcher: it ends at once.
    """
    if _watching.is_set():
        return
    _watching.set()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # signals arrive there without the main thread
    for number in STOPS:  # after it, or a signal in between would be lost
        signal.signal(number, _nothing_to_save)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # those of a child don't count
    chain = launchers()
    if LAUNCHER in os.environ and int(os.environ[LAUNCHER]) not in [p.pid for p in psutil.Process().parents()]:
        os._exit(1)  # it was killed while this process started
    threading.Thread(target=_watch, args=(chain, _left_behind(chain), reader), daemon=True).start()


def launchers() -> list[psutil.Process]:
    """The processes from our parent up to the command that started the run; none under plain `python`.

    Shells between launchers count. What started the first launcher (a terminal, make, nohup) may go away.
    """
    chain: list[psutil.Process] = []
    between: list[psutil.Process] = []
    for process in psutil.Process().parents():
        try:
            between.append(process)
            if _is_launcher(process):
                chain, between = chain + between, []
            elif not (process.name() in SHELLS and "-c" in process.cmdline()):
                break
        except psutil.Error:  # gone, or another user's and hidden: not a launcher of ours
            break
    return chain


def _is_launcher(process: psutil.Process) -> bool:
    names = _names(process)
    if names & {"torchrun", "torch.distributed.run", "torch.distributed.launch", "slurmstepd"}:
        return True
    return bool(names & {"colossalai", "coati", "coati.cli"}) and "run" in names


def _names(process: psutil.Process) -> set[str]:
    """The program and the first words of its command line: `python -u -m torch.distributed.run`."""
    return {process.name(), *(Path(word).name for word in process.cmdline()[:5])}


def _left_behind(chain: list[psutil.Process]) -> list[int]:
    """`colossalai run`'s children: after Ctrl-C, or without their parent, they wait forever for a message from it.

    Every rank ends them: the first to notice has all stop, and another may be gone before it looks.
    """
    tops = [process for process in chain if "colossalai" in _names(process)]
    return [child.pid for child in tops[-1].children()] if tops else []


def _watch(chain: list[psutil.Process], left_behind: list[int], signals: int):
    interrupted = False
    while all(map(lives, chain)):
        if not select.select([signals], [], [], POLL)[0]:
            continue
        for number in os.read(signals, 64):
            if number not in STOPS:
                continue
            if number == signal.SIGINT and not interrupted:
                _end_after(chain, left_behind)
            if interrupted:  # a second Ctrl-C, of which torchrun makes SIGTERM
                os._exit(128 + signal.SIGINT)
            if signal.getsignal(number) is _nothing_to_save:
                os._exit(128 + number)
            interrupted = number == signal.SIGINT
    if interrupted:  # the second Ctrl-C ended the launcher, which didn't pass it on
        os._exit(128 + signal.SIGINT)
    _end_after(chain, left_behind)
    os.kill(os.getpid(), signal.SIGTERM)
    seconds = float(os.environ.get(SECONDS_TO_SAVE, "8"))
    time.sleep(seconds)
    with contextlib.suppress(OSError):  # the launcher may have been what read our output
        if seconds:
            print(
                "error: the launcher is gone, and so is this process before it could save", file=sys.stderr, flush=True
            )
    os._exit(1)


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and waits for its parent to notice does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, but there
        return True


def _end_after(chain: list[psutil.Process], left_behind: list[int]):
    """Has a process of its own session end those once our parent, torchrun, is done with its workers.

    Interrupted a second time while it shuts down, torchrun now and then runs on forever without any worker.
    """
    if left_behind:
        words = [sys.executable, __file__, *map(str, [chain[0].pid, *left_behind])]
        nowhere = subprocess.DEVNULL  # the launcher waits until nobody can write to its pipes any more
        subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def clean_up(torchrun: int, *others: int):
    """Waits until torchrun has ended, or has had no worker for 10 s and is killed; then sends SIGTERM to the others."""
    idle_since = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(torchrun)
        while lives(process):
            if any(map(lives, process.children())):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > SECONDS_WITHOUT_WORKERS:
                process.kill()
            time.sleep(0.2)
    time.sleep(1)  # for the last lines of output to get through
    for pid in others:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGTERM)


def _nothing_to_save(number, frame):
    """Marks the time before `launch`; the watch ends the process."""


if __name__ == "__main__":
    clean_up(*map(int, sys.argv[1:]))
