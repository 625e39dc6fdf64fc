"""Trackio."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import Any

import trackio

from coati.tracking.config import Status
from coati.tracking.sinks.base import RunInfo
from coati.tracking.sinks.tables import table_of

SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
LEVELS = {
    "finished": trackio.AlertLevel.INFO,
    "interrupted": trackio.AlertLevel.WARN,
    "failed": trackio.AlertLevel.ERROR,
}


class TrackioSink:
    """A Trackio run in the Space or on the server that the environment names, offline in this machine's database, which
    `trackio show` reads (TRACKIO_DIR, or the folder `trackio` in Hugging Face's cache). Trackio knows runs by their
    names, so ours end in the run's id. It has no status: an alert tells how the run ended. A step that is logged again
    after a resume is there twice."""

    def __init__(self, run: RunInfo) -> None:
        named = [name for name in SERVERS if os.environ.get(name)]
        if run.online and not named:
            raise ValueError("no Space or server is named")
        if named and not run.online:
            raise ValueError(f"tracking_mode is offline, but {named[0]} is set: unset it")
        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=run.project,
                name=f"{run.name}-{run.id}",
                config={**run.settings, "algorithm": run.algorithm},
                resume="never" if run.resume_step is None else "allow",
                embed=False,
            )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        self._run.log({name: trackio.Table(**table_of(rows))}, step=step)

    def finish(self, status: Status) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.alert(f"run {status}", level=LEVELS[status])
            trackio.finish()
