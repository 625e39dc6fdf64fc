"""Stands between an MCP server and its client, as a process: passes on what the server writes, within limits.

    python mcp_guard.py MOST_BYTES COMMAND ...

The client would hold a line of any length in memory. A line longer than the limit ends the server. Of lines that are no
messages, and of what is written to standard error, the first bytes come through and the rest is dropped.

Only the standard library is imported: there is one guard per episode.
"""

import subprocess
import sys
import threading
from typing import BinaryIO

PASSED_ON = 1 << 16  # bytes that are no messages


def pass_messages(server: subprocess.Popen, most_bytes: int):
    """Lines of the server's output, until one is too long."""
    others = 0
    while line := server.stdout.readline(most_bytes):
        if len(line) == most_bytes and not line.endswith(b"\n"):
            print(f"the MCP server wrote a line of more than {most_bytes} bytes, and was ended", file=sys.stderr)
            server.kill()
            return
        if line.startswith(b"{"):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        else:
            others = pass_some(line, others)


def pass_errors(errors: BinaryIO):
    """The server's standard error."""
    passed = 0
    while block := errors.read1(1 << 16):
        passed = pass_some(block, passed)


def pass_some(block: bytes, passed: int) -> int:
    """To standard error, unless so much has been passed on. Returns how much it is now."""
    sys.stderr.buffer.write(block[: max(PASSED_ON - passed, 0)])
    sys.stderr.buffer.flush()
    return min(passed + len(block), PASSED_ON)


def main(most_bytes: int, command: list[str]) -> int:
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # it reads our input itself
    threading.Thread(target=pass_errors, args=(server.stderr,), daemon=True).start()
    pass_messages(server, most_bytes)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
