"""Runs a program that nobody has read, with its tests, where it can do no harm; docs/rewards.md says what that means.

Linux only. Where the kernel offers no namespaces nothing is run: there is no weaker mode.
"""

import json
import math
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from coati.errors import UserError

MB = 1 << 20
# the hash seed is fixed, so that a program which depends on the order of a set gets the same result on every process
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT |= {"HOME": "/sandbox", "TMPDIR": "/sandbox"}
# of `resource`: bytes of address space a process, processes and threads at a time, bytes of a file, open files
LIMITS = {"AS": 1024 * MB, "NPROC": 8, "FSIZE": 16 * MB, "NOFILE": 64, "CORE": 0}
DISK = 64 * MB  # bytes of all files together
OUTPUT = 1 << 16  # bytes of output that are kept


@dataclass(frozen=True)
class SandboxResult:
    """Whether all tests passed, and the first bytes of what was printed, tracebacks included."""

    passed: bool
    output: str


def run_tests(program: str, tests: str, seconds: float = 10.0) -> SandboxResult:
    """Runs the program and then the tests, in one namespace named `program`; both are Python texts.

    Args:
        seconds: by the clock, and of CPU time a process.

    Raises:
        OSError: the sandbox could not be set up.
    """
    inside = (Path(__file__).parent / "sandboxed.py").read_text(encoding="utf-8")
    job = dict(program=program, tests=tests, limits=LIMITS | {"CPU": math.ceil(seconds)}, disk=DISK)
    token = secrets.token_bytes(32)
    local_end, remote_end = socket.socketpair()
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryFile("w+") as file, local_end, remote_end:
        file.write(json.dumps(job))
        file.seek(0)
        local_end.send(token)
        local_end.setblocking(False)
        process = subprocess.Popen(
            # as a text: from its folder, our http.py would hide the standard library's
            [sys.executable, "-s", "-B", "-c", inside, str(remote_end.fileno())],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=ENVIRONMENT,
            pass_fds=[remote_end.fileno()],
            start_new_session=True,
        )
        remote_end.close()
        try:
            output = _read(process.stdout.fileno(), time.monotonic() + seconds)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it has not been waited for, so the number is still its own
            status = process.wait()
            process.stdout.close()
        if status > 0:
            raise OSError(f"the sandbox could not be set up: {output.strip()[-300:]}")
        return SandboxResult(_received(local_end) == token, output)


def _read(pipe: int, deadline: float) -> str:
    """What comes until the last writer is gone or time is up: all is read, the first bytes are kept."""
    output = b""
    while (left := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        if not (block := os.read(pipe, 1 << 16)):
            break
        output += block[: OUTPUT - len(output)]
    return output.decode("utf-8", "replace")


def _received(channel: socket.socket) -> bytes:
    try:
        return channel.recv(64)
    except OSError:  # nothing was sent
        return b""


@cache
def check_sandbox():
    """Runs a program that must pass and one that must not.

    Raises:
        UserError: this machine can't isolate programs.
    """
    try:
        works = run_tests("x = 1", "assert x == 1").passed and not run_tests("x = 1", "assert x == 2").passed
        reason = "its own check failed"
    except OSError as error:
        works, reason = False, str(error)
    if not works:
        raise UserError(
            f"the verifier python needs Linux 5.12 or newer and user namespaces ({reason}): allow them (sysctl "
            "kernel.unprivileged_userns_clone=1; docker run --security-opt seccomp=unconfined), or leave it out"
        )
