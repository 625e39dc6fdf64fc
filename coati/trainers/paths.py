"""Says which files of a run's settings are missing, before anything is loaded."""

import dataclasses
from pathlib import Path

from coati.data.sources import check_source
from coati.errors import UserError


def check_paths(config):
    """Looks for what the settings name on this machine; names on the hub are left to those who load them.

    Raises:
        UserError: one line that names everything that is missing.
    """
    problems = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.metadata.get("path")
        for name in value if isinstance(value, list) else [value]:
            try:
                if kind is not None and name is not None:
                    _check_path(kind, name)
            except UserError as error:
                problems.append(f"--{field.name} {name}: {str(error).rstrip('.')}")
    if problems:
        raise UserError("; ".join(problems))


def _check_path(kind: str, name: str):
    """Raises a UserError if what a setting of this `PathKind` names isn't there."""
    if kind == "data":
        check_source(name)
    elif kind == "model" and _is_local(name) and not Path(name).exists():
        raise UserError(f"there is no such folder or file (looked in {Path.cwd()})")
    elif kind == "checkpoint" and name not in ("never", "auto") and not Path(name).is_dir():
        raise UserError("there is no such folder; auto takes the newest whole checkpoint")
    elif kind == "function" and (file := name.rpartition(":")[0]).endswith(".py"):
        _check_path("file", file)
    elif kind == "file" and not Path(name).is_file():
        raise UserError(f"there is no such file (looked in {Path.cwd()})")


def _is_local(name: str) -> bool:
    """Whether a model's name can only be a path: on the hub it is NAME or OWNER/NAME."""
    return name.startswith((".", "/")) or name.count("/") > 1
