"""Settings from a YAML file and flags."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from coati.config.flags import read_flags
from coati.config.problems import in_words, unknown
from coati.config.schema import entry_classes, leaves, main_setting, paths_named, section_classes, types_of
from coati.config.yaml12 import plain, read_yaml
from coati.errors import UserError

Config = TypeVar("Config")


def parse_config(
    config_class: type[Config],
    argv: list[str] | None = None,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    of_file: Collection[str] | None = None,
) -> Config:
    """Reads `--config FILE.yaml` and the flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` if None.
        defaults: settings, nested as in a file, that win over those of the class, and no others.
        of_file: the settings that are read of the file, which may be one of another command; None for all.

    Raises:
        UserError: the file is missing or isn't a mapping; a flag is unknown; or one line that names all unknown
            settings, values of a wrong type or out of range, and contradictions of a section.
        SystemExit: `--help`.
    """
    path, rest = take_config_path(sys.argv[1:] if argv is None else list(argv))
    found = read_yaml(path) if path else {}
    if of_file is not None:
        found = {name: value for name, value in found.items() if name in of_file}
    return parse_settings(config_class, found, rest, f"--config {path}", description, defaults)


def parse_settings(
    config_class: type[Config],
    found: dict,
    argv: list[str],
    origin: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """As `parse_config`, with the file's settings as a mapping.

    Args:
        argv: the flags, without `--config`.
        origin: what errors call the settings.
    """
    given = read_flags(config_class, argv, description, defaults or {})
    values = merge(config_class, merge(config_class, dict(defaults or {}), found), in_sections(given.values))
    return validated(config_class, values, lambda path: given.flags.get(path.partition("[")[0]) or f"{origin}: {path}")


def configure(config_class: type[Config], **values) -> Config:
    """Settings by the names that their flags have: `configure(SFTConfig, model="gpt2", learning_rate=1e-4)`.

    Raises:
        UserError: as `parse_config`.
    """
    return validated(config_class, written_out(nested(config_class, values), config_class))


def reconfigure(config: Config, **values) -> Config:
    """A copy of settings with others for some, by the names that their flags have.

    Raises:
        UserError: as `parse_config`.
    """
    kind = type(config)
    changes = written_out(nested(kind, values), kind, keep_none=True)
    return validated(kind, _merge(asdict(config), changes, [kind]))


def validated(config_class: type[Config], values: dict[str, Any], named=str) -> Config:
    """The settings of nested values.

    Args:
        named: what errors call the setting of a path.

    Raises:
        UserError: one line that names all that is wrong.
    """
    try:
        return TypeAdapter(config_class).validate_python(_with_types(values, config_class))
    except ValidationError as error:
        raise UserError(in_words(error, config_class, named)) from None


def _with_types(values: dict[str, Any], config_class) -> dict[str, Any]:
    """The values, with the default type of each union that is given without one."""
    complete = dict(values)
    for name, value in values.items():
        field = config_class.__pydantic_fields__.get(name)
        if field is not None and len(section_classes(field.annotation)) > 1 and isinstance(value, dict):
            complete[name] = {"type": types_of(field.default_factory)[0]} | value
    return complete


def take_config_path(argv: list[str]) -> tuple[str | None, list[str]]:
    """The word after `--config`, and the other words."""
    paths, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:  # nothing follows: the parser of the flags says so
                rest.append(word)
            else:
                paths.append(path)
        elif word.startswith("--config="):
            paths.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    if len(paths) > 1:
        raise UserError(f"--config is given twice ({', '.join(paths)}): put the settings into one file")
    return (paths[0] if paths else None), rest


# --- nested values


def nested(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that their flags have, as a file has them.

    Raises:
        UserError: a name is unknown, or means several settings.
    """
    found = leaves(config_class)
    by_path = {}
    for name, value in values.items():
        paths = paths_named(name, found)
        if len(paths) != 1:
            raise UserError(unknown(name, found) if not paths else f"{name!r} may be {' or '.join(paths)}")
        by_path[paths[0]] = value
    return in_sections(by_path)


def in_sections(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    values: dict[str, Any] = {}
    for path, value in by_path.items():
        *sections, name = path.split(".")
        into = values
        for one in sections:
            into = into.setdefault(one, {})
        into[name] = value
    return values


def merge(config_class: type, values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Nested values of which `others` win. Sections are merged; one of another `type` starts anew."""
    values, others = written_out(values, config_class), written_out(others, config_class)
    return _merge(values, others, [config_class])


def _merge(values: dict[str, Any], others: dict[str, Any], classes: list[type]) -> dict[str, Any]:
    fields = {name: field for one in classes for name, field in one.__pydantic_fields__.items()}
    merged = dict(values)
    for name, value in others.items():
        before = merged.get(name)
        inner = section_classes(fields[name].annotation) if name in fields else []
        both = bool(inner) and isinstance(before, dict) and isinstance(value, dict)
        if both and value.get("type", before.get("type")) == before.get("type"):
            merged[name] = _merge(before, value, inner)
        else:
            merged[name] = value
    return merged


def written_out(values: dict, config_class: type, *, keep_none: bool = False) -> dict:
    """Nested values of a file: sections that are one word are written as mappings, what is empty is left out."""
    found = {}
    for name, value in values.items():
        field = config_class.__pydantic_fields__.get(name)
        if value is None and not keep_none:
            continue
        if field is not None:
            value = _written_out(value, field.annotation, keep_none)
        found[name] = value
    return found


def _written_out(value, annotation, keep_none: bool):
    classes = section_classes(annotation)
    if classes:
        return _section(value, classes, keep_none)
    entries = entry_classes(annotation)
    if entries and value is not None:
        listed = value if isinstance(value, list) else [value]
        return [_section(entry, entries, keep_none) for entry in listed]
    if isinstance(value, dict):
        return plain(value)
    return value


def _section(value, classes: list[type], keep_none: bool):
    """A section as a mapping; of a union, by the alternative that has most of its names."""
    if isinstance(value, str):
        return {main_setting(classes[0]): value}
    if not isinstance(value, dict):
        return value
    chosen = max(classes, key=lambda one: len(value.keys() & one.__pydantic_fields__.keys()))
    return written_out(value, chosen, keep_none=keep_none)
