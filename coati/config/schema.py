"""The names of all settings of a class: `optimizer.learning_rate`, and the flags that stand for them.

A flag is the shortest end of a setting's name that no other setting has: `--learning_rate`. A section's main setting
has the section's name: `--model` is `model.path`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as pydantic names them, and as we do


@dataclass(frozen=True)
class Leaf:
    """A setting that has no settings of its own.

    Attributes:
        path: its name with those of its sections, such as `optimizer.learning_rate`.
        field: its type, help, bounds and default.
    """

    path: str
    field: FieldInfo

    @property
    def section(self) -> str:
        """Empty at the top."""
        return self.path.rpartition(".")[0]

    @property
    def kinds(self) -> list[Any]:
        """The types it may have, without None."""
        return alternatives(self.field.annotation)

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is list for kind in self.kinds)

    @property
    def is_mapping(self) -> bool:
        return any(get_origin(kind) is dict for kind in self.kinds)


def bounds_of(field: FieldInfo) -> dict[str, float]:
    """The bounds of a setting, by the names of `BOUNDS`."""
    kinds = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    return {kinds[type(one)]: getattr(one, kinds[type(one)]) for one in field.metadata if type(one) in kinds}


def by_path(config, prefix: str = "") -> dict[str, Any]:
    """The values of all settings, by path; the entries of lists of settings are mappings."""
    plain, found = dataclasses.asdict(config), {}
    for name in plain:
        value = getattr(config, name)
        found |= by_path(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: plain[name]}
    return found


def alternatives(annotation) -> list[Any]:
    """The types of a union, or the one type; without None."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [kind for one in get_args(annotation) if one is not NoneType for kind in alternatives(one)]


def section_classes(annotation) -> list[type]:
    """The settings classes that a section may have; none where it is no section."""
    return [kind for kind in alternatives(annotation) if dataclasses.is_dataclass(kind)]


def entry_classes(annotation) -> list[type]:
    """The settings classes of a list's entries; none where it is no such list."""
    lists = [kind for kind in alternatives(annotation) if get_origin(kind) is list]
    return [kind for one in lists for kind in section_classes(get_args(one)[0])]


def main_setting(settings_class: type) -> str:
    """What a section is that is written as one word: `model: FOLDER` is `model: {path: FOLDER}`."""
    return "type" if "type" in settings_class.__pydantic_fields__ else next(iter(settings_class.__pydantic_fields__))


def leaves(settings_class: type, chosen: str | None = None) -> dict[str, Leaf]:
    """All settings by path.

    Args:
        chosen: the `type` whose settings a union has; None for those of all its alternatives.
    """
    found: dict[str, Leaf] = {}
    for leaf in _leaves(settings_class, "", chosen):
        found.setdefault(leaf.path, leaf)
    return found


def _leaves(settings_class: type, prefix: str, chosen: str | None) -> Iterator[Leaf]:
    for name, field in settings_class.__pydantic_fields__.items():
        classes = section_classes(field.annotation)
        for one in classes:
            if chosen is None or len(classes) == 1 or chosen in types_of(one):
                yield from _leaves(one, f"{prefix}{name}.", chosen)
        if not classes:
            yield Leaf(prefix + name, field)


def types_of(settings_class: type) -> tuple[str, ...]:
    """The words that `type` may be in one alternative of a union."""
    [kind] = alternatives(settings_class.__pydantic_fields__["type"].annotation)
    assert get_origin(kind) is Literal
    return get_args(kind)


def flags(found: dict[str, Leaf]) -> dict[str, str]:
    """The flag of each path, without its dashes."""
    return {path: _shortest(path, found) for path in found}


def _shortest(path: str, found: dict[str, Leaf]) -> str:
    words = path.split(".")
    if len(words) > 1 and words[-1] in ("type", "path"):
        return ".".join(words[:-1])
    ends = [".".join(words[-n:]) for n in range(1, len(words) + 1)]
    return next(end for end in ends if paths_named(end, found) == [path])


def paths_named(name: str, found: dict[str, Leaf]) -> list[str]:
    """The settings that a flag may mean: the one of that path, else those whose path ends so; of a section its main
    setting."""
    if name in found:
        return [name]
    for main in ("type", "path"):
        if f"{name}.{main}" in found:
            return [f"{name}.{main}"]
    return [path for path in found if path.endswith(f".{name}")]
