"""What all tracking libraries have in common, and which there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from coati.errors import UserError
from coati.tracking.config import Status


@dataclass(frozen=True)
class RunInfo:
    """What a tracking library is told of a run.

    Attributes:
        folder: the run's folder; what is tracked offline lies in it.
        id: stays the same when the run is resumed, and tells it from others of its name.
        online: whether the library's server is told at once.
        settings: all of the run's options, as JSON has them.
        resume_step: the last step of the checkpoint that the run goes on from; None for a new run.
    """

    folder: Path
    name: str
    project: str
    id: str
    algorithm: str
    online: bool
    settings: dict[str, Any]
    resume_step: int | None = None


class Sink(Protocol):
    """A place for a run's record; made with a `RunInfo`."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers at a step; a step may come in several calls."""

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        """A table of texts and numbers at a step; rows may differ in their columns."""

    def finish(self, status: Status) -> None:
        """Ends the record."""


@dataclass(frozen=True)
class Library:
    """A tracking library.

    Attributes:
        sink: its class, as `module:name`.
        modules: what must be importable.
        online: what must be done once before it can log to its server.
    """

    sink: str
    modules: tuple[str, ...]
    online: str


LIBRARIES = {
    "wandb": Library("coati.tracking.sinks.wandb:WandbSink", ("wandb",), "run `wandb login`"),
    "tensorboard": Library("coati.tracking.sinks.tensorboard:TensorBoardSink", ("tensorboard",), ""),
    "mlflow": Library(
        "coati.tracking.sinks.mlflow:MlflowSink",
        ("mlflow", "sqlalchemy", "alembic"),
        "set MLFLOW_TRACKING_URI to a server that runs",
    ),
    "trackio": Library(
        "coati.tracking.sinks.trackio:TrackioSink",
        ("trackio",),
        "run `hf auth login` and set TRACKIO_SPACE_ID, or TRACKIO_SERVER_URL of a server of your own",
    ),
    "swanlab": Library("coati.tracking.sinks.swanlab:SwanlabSink", ("swanlab",), "run `swanlab login`"),
}


def check_installed(names: Iterable[str]) -> None:
    """Raises a UserError that names all libraries that are missing, and how to install them. Imports none."""
    missing = [name for name in names if any(find_spec(module) is None for module in LIBRARIES[name].modules)]
    if missing:
        words = " ".join(missing)
        raise UserError(f"trackers: {words} can't be imported; `pip install {words}`, or leave out of trackers.")


def open_sink(name: str, run: RunInfo) -> Sink:
    """Starts a library's record of a run.

    Raises:
        UserError: it can't start.
    """
    library = LIBRARIES[name]
    module, _, sink = library.sink.partition(":")
    try:
        return getattr(import_module(module), sink)(run)
    except Exception as error:  # whatever a library raises: a run that is not tracked as asked should not start
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        remedy = f"{library.online}, set tracking_mode to offline" if run.online and library.online else "repair that"
        raise UserError(f"{name} could not start ({reason}); {remedy}, or leave it out of trackers.") from error
