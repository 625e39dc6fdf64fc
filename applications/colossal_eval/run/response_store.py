"""Responses on disk: appended as they come, so that a run that was killed resumes where it stopped.

Each rank writes its own `answers-RANK.jsonl`; all of them are read, whatever the number of ranks is now. A line has the
response (as `answer`), and the hash of all that it depends on: the model's files, how it is run, the whole request.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coati.tracking.files import read_lines


def digest(*parts: Any) -> str:
    """A hash of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


class ResponseStore:
    """The responses in a folder.

    Args:
        folder: made if it isn't there.
        rank: of this process.

    Attributes:
        reused, added: responses of this process's run, by where they came from.
    """

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._responses: dict[str, Any] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            self.merge(read_lines(path))
        self._path = folder / f"answers-{rank}.jsonl"
        _cut_torn_line(self._path)
        self.reused = self.added = 0

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def __getitem__(self, key: str) -> Any:
        return self._responses[key]

    def append(self, records: Iterable[dict]) -> None:
        """Keep responses, `{"key", "answer", ...}` each, and have them on disk when this returns."""
        new = [record for record in records if record["key"] not in self._responses]
        if not new:
            return
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new))
            file.flush()
            os.fsync(file.fileno())
        self.merge(new)
        self.added += len(new)

    def merge(self, records: Iterable[dict]) -> None:
        """Take responses that are on disk. The first of a key stays: of a question that is there twice, the ranks in
        their order give what one rank alone would."""
        for record in records:
            self._responses.setdefault(record["key"], record["answer"])


def _cut_torn_line(path: Path) -> None:
    """A process that was killed may have left a part of a line; appending to it would corrupt the next one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
