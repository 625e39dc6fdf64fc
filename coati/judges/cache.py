"""Verdicts on disk, so that a run that is resumed asks nothing twice.

Each process appends to a file of its own, a line per verdict, and all files of the folder are read at the start. So
processes share a folder without locks, and what a killed process leaves torn is the last line of a file that nobody
appends to any more.
"""

import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class VerdictCache:
    """The verdicts in a folder, `verdicts-HOST-PID-RANDOM.jsonl`.

    Args:
        folder: made with the first verdict.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.verdicts = {record["key"]: record["verdict"] for record in read_records(folder)}
        self.file: int | None = None

    def __contains__(self, key: str) -> bool:
        return key in self.verdicts

    def __getitem__(self, key: str) -> Any:
        return self.verdicts[key]

    def append(self, key: str, verdict: Any, **about: Any):
        """Keeps a verdict.

        Args:
            verdict, about: as JSON; `about` is for people who read the file.

        Raises:
            OSError: nothing can be written.
        """
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"verdicts-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            self.file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        record = {"key": key, "verdict": verdict} | about
        line = (json.dumps(record) + "\n").encode()
        while line:  # what the kernel has taken survives a kill of this process
            line = line[os.write(self.file, line) :]
        self.verdicts[key] = verdict


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of all files; a line that is torn is left out, and its question asked again."""
    for path in sorted(folder.glob("verdicts-*.jsonl")):
        with path.open("rb") as file:
            for line in file:
                record = parse(line)
                if isinstance(record, dict) and record.keys() >= {"key", "verdict"}:
                    yield record


def parse(line: bytes) -> Any:
    """A line's value, None if it is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None
