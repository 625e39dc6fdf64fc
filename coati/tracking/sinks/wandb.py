"""Weights & Biases."""

from __future__ import annotations

import os
import sys
from typing import Any

import wandb

from coati.tracking.config import Status
from coati.tracking.sinks.base import RunInfo
from coati.tracking.sinks.tables import table_of

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 255}


class WandbSink:
    """A W&B run. Resumed under its id, W&B itself ignores the steps that it has already seen."""

    def __init__(self, run: RunInfo) -> None:
        if "weave" not in sys.modules:  # where openai is imported, as by an evaluation, W&B would advertise it
            os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        self._run = wandb.init(
            mode="online" if run.online else "offline",
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            job_type=run.algorithm,
            settings=wandb.Settings(silent=True, console="off"),
        )
        if run.online:
            print(f"wandb: {self._run.url}", file=sys.stderr)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        # Two rows may hold 1 and 0.5 in one column, or a number and none: W&B's type check refuses that.
        self._run.log({name: wandb.Table(**table_of(rows), allow_mixed_types=True)}, step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=EXIT_CODES[status])
