"""What a setting carries beside its name and type: help text, the values that make sense, whether it is a path.

Settings are pydantic dataclasses: pydantic converts what a file or a flag says to a setting's type, and lists all that
is wrong at once.
"""

import functools
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import dataclass_transform

from coati.config.problems import in_words
from coati.config.schema import bounds_of
from coati.errors import UserError

# data: a file, or the name of a data set; model: a folder, or a name on the hub; file: a file that is read;
# function: FILE.py:name or module:name; checkpoint: never, auto or a folder; output: a folder that is written
PathKind = Literal["data", "model", "file", "function", "checkpoint", "output"]
Entry = TypeVar("Entry")
# a list, or what is its only entry
ListOf = Annotated[list[Entry], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]


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
    """A field of a settings class that carries its own help text; a tuple stands for the default of a list.

    Args:
        ge, gt, le, lt: the bounds of a number: at least, above, at most, below.
        path: what a text names; `~` at its beginning is the home folder then.
        common: whether `--help` shows it; `--help-all` shows the others too.
    """
    about: dict[str, Any] = {"path": path, "common": common}
    bounds = dict(ge=ge, gt=gt, le=le, lt=lt)
    if isinstance(default, tuple):
        return Field(default_factory=lambda: list(default), description=help, json_schema_extra=about, **bounds)
    return Field(default=default, description=help, json_schema_extra=about, **bounds)


def inherited(base: type, name: str, default):
    """The field of a base class with another default."""
    field = base.__pydantic_fields__[name]
    return option(default, field.description, path=path_kind(field), common=is_common(field), **bounds_of(field))


def section(settings_class, help: str | None = None):
    """A field that holds settings of its own, those of their class if nothing is given."""
    return Field(default_factory=settings_class, description=help)


@dataclass_transform(field_specifiers=(option, section), kw_only_default=True)
def settings(cls):
    """Makes a class a pydantic dataclass that refuses unknown names, infinities and NaN, with a UserError."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    made = pydantic.dataclasses.dataclass(cls, config=config, kw_only=True)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self, **values):
        try:
            validate(self, **values)
        except ValidationError as error:
            raise UserError(in_words(error, type(self))) from None

    made.__init__ = __init__
    return made


@settings
class Settings:
    """The base of all settings.

    Raises:
        UserError: values of a wrong type or out of range, or that contradict each other; one line names all.
    """

    def __post_init__(self):
        expand_home(self)
        if found := list(self.problems()):
            raise ValueError("; ".join(found))

    def problems(self) -> Iterator[str]:
        """What these settings contradict each other in, each with its remedy."""
        yield from ()


def path_kind(field) -> PathKind | None:
    """What the text of a setting names (`cls.__pydantic_fields__`)."""
    return (field.json_schema_extra or {}).get("path")


def is_common(field) -> bool:
    """Whether `--help` shows a setting."""
    return (field.json_schema_extra or {}).get("common", False)


def expand_home(config):
    """Writes out `~` at the beginning of the paths in `config`: a shell does so only where it stands alone, and a YAML
    file never."""
    for name, field in type(config).__pydantic_fields__.items():
        value = getattr(config, name)
        if path_kind(field) is None or not value:
            continue
        if isinstance(value, list):
            setattr(config, name, [os.path.expanduser(path) for path in value])
        elif isinstance(value, dict):
            setattr(config, name, {key: os.path.expanduser(path) for key, path in value.items()})
        else:
            setattr(config, name, os.path.expanduser(value))
