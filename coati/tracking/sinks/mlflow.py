"""MLflow."""

from __future__ import annotations

import logging
import re
import time
from typing import Any
from urllib.parse import quote

import mlflow
from mlflow.entities import Metric, Param

from coati.tracking.config import Status
from coati.tracking.sinks.base import RunInfo
from coati.tracking.sinks.tables import table_of

STATUSES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
OUR_ID = "coati.run_id"


class MlflowSink:
    """An MLflow run on the server of MLFLOW_TRACKING_URI, offline in `mlflow/mlflow.db`. A resumed run goes on under
    its id; a step that is logged again is there twice, the later one shown. Parameters can't change: those of a resumed
    run are in the artifact `settings.json`."""

    def __init__(self, run: RunInfo) -> None:
        self._client, experiment = _connect(run)
        self._id = _find_run(self._client, experiment, run)
        if self._id is None:
            tags = {OUR_ID: run.id, "algorithm": run.algorithm}
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            params = [Param(key, value) for key, value in _flat(run.settings).items()]
            self._client.log_batch(self._id, params=params)
        else:
            self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, run.settings, "settings.json")

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_name(key), value, now, step) for key, value in metrics.items()])

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        self._client.log_dict(self._id, table_of(rows), f"{_name(name)}/{step:08d}.json")

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._id, STATUSES[status])


def _connect(run: RunInfo) -> tuple[mlflow.MlflowClient, str]:
    """A client, and the id of the project's experiment, made if absent."""
    place = None
    if run.online:
        if not mlflow.is_tracking_uri_set():
            raise ValueError("no server is named")
        client = mlflow.MlflowClient()
    else:
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells each table that it makes
        folder = run.folder.resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        client = mlflow.MlflowClient(f"sqlite:///{quote(str(folder / 'mlflow.db'))}")
        place = (folder / "artifacts").as_uri()
    experiment = client.get_experiment_by_name(run.project)
    return client, experiment.experiment_id if experiment else client.create_experiment(run.project, place)


def _find_run(client: mlflow.MlflowClient, experiment: str, run: RunInfo) -> str | None:
    """MLflow's own id of a run that is resumed; None if it has not seen it."""
    found = client.search_runs([experiment], f"tags.`{OUR_ID}` = '{run.id}'")
    return found[0].info.run_id if found else None


def _name(text: str) -> str:
    """A name without what MLflow refuses in names."""
    return re.sub(r"[^\w\-. :/]", "_", text)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by names joined with dots, as MLflow's parameters are flat texts."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[_name(prefix + key)] = str(value)
    return flat
