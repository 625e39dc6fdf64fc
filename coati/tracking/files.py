"""The files in a run folder: `metrics.jsonl`, `samples.jsonl` and `run.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.files import atomic_write

METRICS, SAMPLES, RUN = "metrics.jsonl", "samples.jsonl", "run.json"
SUMMARY = "summary.json"  # figures of an example, beside its runs
_NON_FINITE = ("nan", "inf", "-inf")


def run_folders(folder: Path) -> list[Path]:
    """The run folders anywhere below a folder, or the folder itself, sorted; folders that vanish meanwhile (a running
    run's old checkpoints) are no error."""
    return sorted(Path(found) for found, _, names in os.walk(folder) if RUN in names)


def to_json(value: Any) -> str:
    """One line of valid JSON: NaN and infinities as strings, 0-d tensors as numbers, the rest as text."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # A lone surrogate (from a "\ud800" in somebody's data) can't be written as UTF-8.
        return value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return _plain(value.item()) if hasattr(value, "item") else _plain(str(value))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; none if it is absent. A last line truncated by a crash is skipped.

    Raises:
        UserError: a line other than a truncated last one is not a JSON object.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            elif line.endswith(b"\n"):
                raise UserError(f"{path}:{number} is not a JSON object; delete that line.")


def drop_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, so that a resumed run's log equals an uninterrupted one's."""
    if not path.exists():
        return
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for record in read_lines(path):
            if record["step"] <= step:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The logged metrics, one dict a step in order: `{"step": int, "time": float, name: float, ...}`.

    What was logged in several calls at one step is one dict here. NaN and infinities are floats again.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in read_lines(Path(run_dir) / METRICS):
        values = {key: float(value) if value in _NON_FINITE else value for key, value in record.items()}
        steps.setdefault(record["step"], {}).update(values)
    return list(steps.values())


def read_samples(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The logged samples, one dict a row: `{"step": int, "name": str, "prompt": str, "response": str, ...}`.

    A NaN or infinite number is the text "nan", "inf" or "-inf": a response may read the same.
    """
    return list(read_lines(Path(run_dir) / SAMPLES))


def read_run(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The contents of `run.json`. Raises UserError if it is absent, broken or not ours."""
    run = read_object(Path(run_dir) / RUN)
    if "algorithm" not in run:
        raise UserError(f"{Path(run_dir) / RUN} was not written by coati; move it out of the folder.")
    return run


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if the file is absent or holds none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a folder that a coati run has written.") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fix it or remove it.")
    return value
