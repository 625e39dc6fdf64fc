"""SwanLab."""

from __future__ import annotations

import io
import signal
from contextlib import nullcontext, redirect_stdout
from typing import Any

import swanlab

from coati.tracking.config import Status
from coati.tracking.sinks.base import RunInfo
from coati.tracking.sinks.tables import text_of

STATES = {"finished": "success", "failed": "crashed", "interrupted": "aborted"}


class SwanlabSink:
    """A SwanLab run, offline in `swanlab/` for `swanlab sync`. Resumed under its id; offline each session has a folder
    of its own. SwanLab ignores a step that is logged again."""

    def __init__(self, run: RunInfo) -> None:
        self._online = run.online
        stop = signal.getsignal(signal.SIGINT)
        with self._quiet():
            self._run = swanlab.init(
                mode="online" if run.online else "offline",
                log_dir=str(run.folder / "swanlab"),
                project=run.project,
                name=run.name,
                id=run.id,
                resume="allow",
                job_type=run.algorithm,
                config=run.settings,
                settings=swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")),
            )
        signal.signal(signal.SIGINT, stop)  # SwanLab ends the process on Ctrl-C; a run saves first

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        self._run.log({name: [swanlab.Text(text_of(row)) for row in rows]}, step=step)

    def finish(self, status: Status) -> None:
        with self._quiet():
            self._run.finish(state=STATES[status], error="see the run's output" if status == "failed" else None)

    def _quiet(self):
        """Leaves out the greetings, but for the run's address."""
        return nullcontext() if self._online else redirect_stdout(io.StringIO())
