"""Says which files of a run's settings are missing, before anything is loaded."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

from coati.config.options import PathKind, path_kind
from coati.data.sources import check_source
from coati.errors import UserError


def check_paths(config):
    """Looks for what the settings name on this machine; names on the hub are left to those who load them.

    Raises:
        UserError: one line that names everything that is missing.
    """
    problems = []
    for setting, kind, name in named_paths(config):
        try:
            _check_path(kind, name)
        except UserError as error:
            problems.append(f"{setting} {name}: {str(error).rstrip('.')}")
    if problems:
        raise UserError("; ".join(problems))


def named_paths(config, prefix: str = "") -> Iterator[tuple[str, PathKind, str]]:
    """What the settings and their sections name: the setting, the kind of path, and the path."""
    for name, field in type(config).__pydantic_fields__.items():
        value, kind = getattr(config, name), path_kind(field)
        if isinstance(value, dict):
            value = list(value.values())
        for one in value if isinstance(value, list) else [value]:
            if is_dataclass(one):
                yield from named_paths(one, f"{prefix}{name}.")
            elif kind is not None and one is not None:
                yield prefix + name, kind, one


def _check_path(kind: PathKind, name: str):
    """Raises a UserError if what a setting names isn't there."""
    if kind == "data":
        check_source(name)
    elif kind == "model" and _is_local(name) and not Path(name).exists():
        raise UserError(f"there is no such folder or file (looked in {Path.cwd()})")
    elif kind == "checkpoint" and name not in ("never", "auto") and not Path(name).is_dir():
        raise UserError("there is no such folder; auto takes the newest complete checkpoint")
    elif kind == "function" and (file := name.rpartition(":")[0]).endswith(".py"):
        _check_path("file", file)
    elif kind == "file" and not Path(name).is_file():
        raise UserError(f"there is no such file (looked in {Path.cwd()})")


def _is_local(name: str) -> bool:
    """Whether a model's name can only be a path: on the hub it is NAME or OWNER/NAME."""
    return name.startswith((".", "/")) or name.count("/") > 1
