"""A real `coati label` process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT


@contextmanager
def served(*arguments: object, errors: Path) -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """The process, and links by name. It is killed at the end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "coati.cli", "label", *map(str, arguments), "--port", "0"]
    with errors.open("a") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        links = {}
        assert process.stdout
        for line in process.stdout:  # up to the last one, when it listens
            if match := re.fullmatch(r"(\S+) +(http://\S+/)\n", line):
                links[match[1]] = match[2]
            if line.startswith("Each link is a secret"):
                break
        assert links, errors.read_text()
        yield process, links
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
