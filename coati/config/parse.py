"""Settings from a YAML file and flags."""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coati.config.options import range_of
from coati.config.yaml12 import plain, read_yaml
from coati.errors import UserError

Config = TypeVar("Config")
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
SWITCH = dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True)
SWITCH |= dict.fromkeys(("false", "no", "off", "n", "f", "0"), False)


def parse_config(
    config_class: type[Config],
    argv: list[str] | None = None,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Reads `--config FILE.yaml` (keys are the flags' names) and the flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` if None.
        defaults: settings that win over those of the class, and no others.

    Raises:
        UserError: the file is missing or isn't a mapping; one line that names all unknown keys, all values of a wrong
            type, or all numbers that are out of range; a flag is unknown.
        SystemExit: `--help`.
    """
    path, rest = take_config_path(sys.argv[1:] if argv is None else list(argv))
    settings = read_yaml(path) if path else {}
    return parse_settings(config_class, settings, rest, f"--config {path}", description, defaults)


def parse_settings(
    config_class: type[Config],
    settings: dict,
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
    hints = get_type_hints(config_class)
    parser = _parser(config_class, hints, description, defaults or {})
    flags, unknown = parser.parse_known_args([_with_underscores(word, hints) for word in argv])
    if unknown:
        raise UserError(f"{unknown[0]!r} is no flag of this command: --help lists them")
    values: dict[str, Any] = dict(defaults or {})
    problems: list[str] = []
    names = [field.name for field in dataclasses.fields(config_class)]
    for key, value in settings.items():
        if key not in names:
            problems.append(f"{origin}: {_unknown(key, names)}")
        elif value is not None:
            _convert(str(key), value, hints[key], f"{origin}: {key}", values, problems)
    for name, words in vars(flags).items():
        _convert(name, words, hints[name], f"--{name}", values, problems)
    if problems:
        raise UserError("; ".join(problems))
    return config_class(**values)


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


def _unknown(key, names: list[str]) -> str:
    near = difflib.get_close_matches(str(key), names, 1)
    return f"unknown key {plain(key)!r}" + (f"; did you mean {near[0]!r}?" if near else "")


# --- from what is written to what a setting's type says


def _convert(name: str, value, hint, place: str, values: dict[str, Any], problems: list[str]):
    """Puts the value into `values`, or what is wrong with it into `problems`."""
    try:
        values[name] = _read(value, hint)
    except ValueError as error:
        problems.append(f"{place} {error}")


def _read(value, hint):
    """A value of a file (see `read_yaml`), or the words of a flag, as a setting of this type.

    Raises:
        ValueError: it can't be one; the message goes on after the setting's name.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = [kind for kind in kinds if kind is not NoneType]
    if isinstance(value, dict):
        if any(get_origin(kind) is dict for kind in kinds):
            return plain(value)
        raise ValueError("is a mapping; it takes a plain value or a list")
    [kind] = [kind for kind in kinds if get_origin(kind) is not dict]
    if get_origin(kind) is list:
        [entry] = get_args(kind)
        words = value if isinstance(value, list) else [value]
        return [_read_word(word, entry) for word in words]
    if isinstance(value, list):
        raise ValueError(f"is a list; it takes {_words_for(kind)}")
    return _read_word(value, kind)


def _read_word(word, kind):
    """One word of a file or flag as text, number, switch or choice."""
    if word is None or isinstance(word, dict | list | bytes):
        raise ValueError(f"has the entry {plain(word)!r}; it takes {_words_for(kind)}")
    text, read = str(word), {int: int, float: float, str: str}
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is bool and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    try:
        return read[kind](text)
    except (KeyError, ValueError):
        raise ValueError(f"is {text!r}; it takes {_words_for(kind)}") from None


def _words_for(kind) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


# --- flags


def _with_underscores(word: str, names: Container[str]) -> str:
    """A setting's flag as the setting is written: `--learning-rate` is `--learning_rate`."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    is_flag = flag.startswith("--") and name.removeprefix("no_") in names
    return f"--{name}{equals}{value}" if is_flag else word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A line instead of all flags."""
        raise UserError(message)


def _parser(config_class, hints: dict[str, Any], description: str, defaults) -> argparse.ArgumentParser:
    """A parser that leaves the words of the flags that were given as they are."""
    usage = f"{Path(sys.argv[0]).name} --config FILE.yaml [--SETTING VALUE ...]"
    options = dict(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser = _Parser(description=description, usage=usage, **options)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-5 for a flag
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; each key is the name of a flag below")
    some = [field for field in dataclasses.fields(config_class) if "common" in field.metadata]
    parser.add_argument("-h", "--help", action="help", help=f"show {'the common' if some else 'all'} settings")
    if some:
        parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all settings")
    for title, fields in _grouped(config_class):
        group = parser.add_argument_group(title)
        for field in fields:
            how = _kind_of_flag(hints[field.name])
            hidden = some and field not in some
            text = _help(field, defaults)
            _add_flag(group, field, how | {"help": argparse.SUPPRESS if hidden else text}).text = text
    return parser


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        for action in parser._actions:
            action.help = getattr(action, "text", action.help)
        parser.print_help()
        parser.exit()


def _grouped(config_class) -> list[tuple[str, list[dataclasses.Field]]]:
    """The settings by the class that declares them, a class's own before those of its bases; common ones first."""
    left = {field.name: field for field in dataclasses.fields(config_class)}
    groups = []
    for cls in config_class.__mro__:
        names = [name for name in vars(cls).get("__annotations__", {}) if name in left]
        fields = sorted((left.pop(name) for name in names), key=lambda field: "common" not in field.metadata)
        if fields:
            title = (cls.__doc__ or cls.__name__).partition("\n")[0].partition(";")[0]
            groups.append((title.rstrip("."), fields))
    return groups


def _kind_of_flag(hint) -> dict[str, Any]:
    """What argparse must know of a setting's type."""
    kinds = [kind for kind in (hint, *get_args(hint)) if kind is not NoneType]
    how: dict[str, Any] = {}
    if any(get_origin(kind) is list for kind in kinds):
        how["nargs"] = "+"
    if bool in kinds:
        how |= {"nargs": "?", "const": "true"}
    for kind in kinds:
        if get_origin(kind) is Literal:
            how["metavar"] = "{" + ",".join(get_args(kind)) + "}"
        elif kind in METAVARS:
            how.setdefault("metavar", METAVARS[kind])
    return how


def _add_flag(group, field: dataclasses.Field, how: dict[str, Any]) -> argparse.Action:
    """The flag, and `--no_` of it where the setting is on by default."""
    if field.default is True:
        off = dict(dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS)
        group.add_argument(f"--no_{field.name}", **off)
    return group.add_argument(f"--{field.name}", **how)


def _help(field: dataclasses.Field, defaults: Mapping[str, Any]) -> str:
    default = defaults.get(field.name, field.default)
    if default is dataclasses.MISSING:
        default = field.default_factory()
    words = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    facts = [fact for fact in (range_of(field), f"default: {words}") if fact]
    return f"{field.metadata['help']} ({'; '.join(facts)})".replace("%", "%%")
