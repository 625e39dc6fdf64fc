"""`Tracker` records a run: settings and versions once, metrics and samples as they come."""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import coati
from coati.errors import UserError
from coati.files import replace_file
from coati.tracking.config import Status, TrackingConfig, rank_and_world_size
from coati.tracking.files import METRICS, RUN, read_run, to_json
from coati.tracking.sinks import JsonlSink, RunInfo, Sink, check_installed, open_sink

_RESERVED = {"step", "time", "name"}


class Tracker:
    """Writes a run's metrics, samples and settings to `run_dir` and the trackers. For rank 0 only.

    A tracker that can't start is an error. One that fails later is left out from there, with a line that says so: the
    files in `run_dir` have everything, and training goes on.

    Args:
        run_dir: the run's folder, made if absent. An earlier run's logs there are set aside, unless resumed.
        algorithm: "sft", "reward", "ppo", ...: the stage under which the report shows the run.
        settings: all of the run's options, nested as they are in its YAML.
        resume_step: the last step of the checkpoint that the run resumes from; later log lines are dropped.

    Raises:
        UserError: `run_dir` can't be written; a tracker is not installed or can't start.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TrackingConfig,
        *,
        algorithm: str,
        settings: dict[str, Any],
        resume_step: int | None = None,
    ) -> None:
        check_installed(config.trackers)
        self.run_dir = Path(run_dir)
        self._last_step = -1
        self._finished = False
        self._sinks: dict[str, Sink] = {}
        settings = json.loads(to_json(settings))
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._run = self._describe(config, algorithm, settings, resume_step)
            self._files = JsonlSink(self.run_dir, resume_step)
            self._save_run()
        except OSError as error:
            raise UserError(f"{self.run_dir} can't be written ({error.strerror}); name another run folder.") from error
        run = RunInfo(
            folder=self.run_dir,
            name=self._run["name"],
            project=config.project,
            id=self._run["run_id"],
            algorithm=algorithm,
            online=config.tracking_mode == "online",
            settings=settings,
            resume_step=resume_step,
        )
        try:
            for name in config.trackers:
                self._sinks[name] = open_sink(name, run)
        except BaseException:
            self.finish("failed")
            raise

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers (Python, NumPy or 0-d tensors; kept as Python floats) at `step`.

        Raises:
            ValueError: `step` is lower than the last one, or a metric is called "step", "time" or "name".
        """
        self._check(step, metrics)
        values = {name: float(value) for name, value in metrics.items()}
        self._files.log(values, step)
        self._tell(lambda sink: sink.log(values, step))

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str = "samples") -> None:
        """Record samples: rows such as `{"prompt": ..., "response": ..., "reward": ...}`.

        Raises:
            ValueError: as for `log`.
        """
        for row in rows:
            self._check(step, row)
        rows = [json.loads(to_json(row)) for row in rows]
        self._files.log_samples(rows, step, name)
        self._tell(lambda sink: sink.log_samples(rows, step, name))

    def finish(self, status: Status) -> None:
        """Close the logs and note how the run ended. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._tell(lambda sink: sink.finish(status))
        self._files.finish(status)
        self._run["status"] = status
        self._run["sessions"][-1]["end"] = time.time()
        self._save_run()

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Calls each tracker; one that fails is left out from there."""
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever a library raises must not end a training run
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"{name} failed ({reason}): it is left out from here, {METRICS} has all", file=sys.stderr)
                del self._sinks[name]

    def _check(self, step: int, names: dict[str, Any]) -> None:
        if step < self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}")
        if taken := _RESERVED & names.keys():
            raise ValueError(f"{sorted(taken)} are the tracker's own names")
        self._last_step = step

    def _describe(
        self, config: TrackingConfig, algorithm: str, settings: dict[str, Any], resume_step: int | None
    ) -> dict[str, Any]:
        resumed = resume_step is not None and (self.run_dir / RUN).exists()
        earlier = read_run(self.run_dir) if resumed else {}
        sessions = earlier.get("sessions", [])
        if sessions and sessions[-1]["end"] is None and (self.run_dir / METRICS).exists():
            # That session was killed; its last log line is the last known sign of life.
            sessions[-1]["end"] = (self.run_dir / METRICS).stat().st_mtime
        return {
            "algorithm": algorithm,
            "name": config.run_name or self.run_dir.resolve().name,
            "status": "running",
            "settings": settings,
            "versions": package_versions(),
            "command": shlex.join(sys.argv),
            "host": platform.node(),
            "world_size": rank_and_world_size()[1],
            "run_id": earlier.get("run_id") or secrets.token_hex(4),
            "start": earlier.get("start", time.time()),
            "sessions": [*sessions, {"start": time.time(), "end": None, "resume_step": resume_step}],
        }

    def _save_run(self) -> None:
        replace_file(self.run_dir / RUN, json.dumps(self._run, indent=2, ensure_ascii=False) + "\n")


class NullTracker:
    """`Tracker` for the ranks that record nothing."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    log = log_samples = finish = _nothing


def make_tracker(
    run_dir: str | Path,
    config: TrackingConfig,
    *,
    algorithm: str,
    settings: dict[str, Any],
    resume_step: int | None = None,
) -> Tracker | NullTracker:
    """A `Tracker` on rank 0, a `NullTracker` on the others."""
    if rank_and_world_size()[0] != 0:
        return NullTracker()
    return Tracker(run_dir, config, algorithm=algorithm, settings=settings, resume_step=resume_step)


def package_versions() -> dict[str, str]:
    """Of Python, coati and what it stands on."""
    versions = {"python": platform.python_version(), "coati": coati.__version__}
    for package in ("torch", "transformers", "colossalai", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
