"""What a setting carries beside its name and type: help text, the values that make sense, whether it is a path."""

import dataclasses
import math
import operator
import os
from typing import Literal

from coati.errors import UserError

# data: a file, or the name of a data set; model: a folder, or a name on the hub; file: a file that is read;
# function: FILE.py:name or module:name; checkpoint: never, auto or a folder; output: a folder that is written
PathKind = Literal["data", "model", "file", "function", "checkpoint", "output"]
BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


def option(
    default,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    path: PathKind | None = None,
    common: bool = False,
):
    """A dataclass field that carries its own help text; a tuple stands for the default of a list.

    Args:
        ge, gt, le, lt: the bounds of a number, or of each number of a list: at least, above, at most, below.
        path: what a text names; `~` at its beginning is the home folder then.
        common: whether `--help` shows it; `--help-all` shows the others too.
    """
    given = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "path": path, "common": common or None}
    metadata = {name: value for name, value in given.items() if value is not None}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """The base of all settings.

    Raises:
        UserError: numbers that are out of range; one line names all of them.
    """

    def __post_init__(self):
        expand_home(self)
        check_ranges(self)


def range_of(field: dataclasses.Field) -> str:
    """The bounds of a setting in words, such as "at least 0 and below 1"; empty without any."""
    return " and ".join(f"{words} {field.metadata[b]}" for b, (words, _) in BOUNDS.items() if b in field.metadata)


def check_ranges(config):
    """Raises a UserError that names every number of `config`, a dataclass, that isn't finite or is out of range."""
    problems = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool) and not _in_range(number, field):
                problems.append(f"{field.name} is {number}: it must be {range_of(field) or 'finite'}")
    if problems:
        raise UserError("; ".join(problems))


def _in_range(number: float, field: dataclasses.Field) -> bool:
    if not math.isfinite(number):
        return False
    bounds = [(compare, field.metadata[bound]) for bound, (_, compare) in BOUNDS.items() if bound in field.metadata]
    return all(compare(number, bound) for compare, bound in bounds)


def expand_home(config):
    """Writes out `~` at the beginning of the paths in `config`, a dataclass: a shell does so only where it stands
    alone, and a YAML file never."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "path" not in field.metadata or not value:
            continue
        if isinstance(value, list):
            setattr(config, field.name, [os.path.expanduser(path) for path in value])
        else:
            setattr(config, field.name, os.path.expanduser(value))
