"""The run folder's own files, which every run has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from coati.tracking.config import Status
from coati.tracking.files import METRICS, SAMPLES, drop_after, to_json


class JsonlSink:
    """`metrics.jsonl` and `samples.jsonl`, flushed at each call: a crash loses at most the last line."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        for name in (METRICS, SAMPLES):
            path = run_dir / name
            if resume_step is not None:
                drop_after(path, resume_step)
            elif path.exists():
                path.replace(run_dir / f"{path.stem}.previous.jsonl")
        # Open until `finish`.
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._samples = open(run_dir / SAMPLES, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._metrics.write(to_json({"step": step, "time": time.time(), **metrics}) + "\n")
        self._metrics.flush()

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        self._samples.writelines(to_json({"step": step, "name": name, **row}) + "\n" for row in rows)
        self._samples.flush()

    def finish(self, status: Status) -> None:
        self._metrics.close()
        self._samples.close()
