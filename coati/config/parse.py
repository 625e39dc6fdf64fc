"""Settings from a YAML file and flags."""

import argparse
import dataclasses
import difflib
import re
import sys
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coati.config.options import range_of
from coati.config.yaml12 import plain, read_yaml
from coati.errors import UserError

Config = TypeVar("Config")
SWITCH = dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True)
SWITCH |= dict.fromkeys(("false", "no", "off", "n", "f", "0"), False)


def parse_config(config_class: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """Reads `--config FILE.yaml` (keys are the flags' names) and the flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` if None.

    Raises:
        UserError: the file is missing or isn't a mapping; one line that names all unknown keys, all values of a wrong
            type, or all numbers that are out of range; a flag is unknown.
        SystemExit: `--help`.
    """
    path, rest = take_config_path(sys.argv[1:] if argv is None else list(argv))
    return parse_settings(config_class, read_yaml(path) if path else {}, rest, f"--config {path}", description)


def parse_settings(
    config_class: type[Config], settings: dict, argv: list[str], origin: str, description: str = ""
) -> Config:
    """As `parse_config`, with the file's settings as a mapping.

    Args:
        argv: the flags, without `--config`.
        origin: what errors call the settings.
    """
    hints = get_type_hints(config_class)
    flags, unknown = _parser(config_class, hints, description).parse_known_args(argv)
    if unknown:
        raise UserError(f"{unknown[0]!r} is no flag of this script: --help lists them")
    values: dict[str, Any] = {}
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
        if word == "--config" and (path := next(words, None)) is not None:
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
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in (get_args(hint) if is_union else [hint]) if kind is not NoneType]
    if isinstance(value, dict):
        if any(get_origin(kind) is dict for kind in kinds):
            return plain(value)
        raise ValueError("is a mapping; it takes a plain value or a list")
    [kind] = [kind for kind in kinds if get_origin(kind) is not dict]
    if get_origin(kind) is list:
        [entry] = get_args(kind)
        return [_read_word(word, entry) for word in (value if isinstance(value, list) else [value])]
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A line instead of all flags."""
        raise UserError(message)


def _parser(config_class, hints: dict[str, Any], description: str) -> argparse.ArgumentParser:
    """A parser that leaves the words of the flags that were given as they are."""
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-5 for a flag
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; each key is the name of a flag below")
    for field in dataclasses.fields(config_class):
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        kinds = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if kind is not NoneType]
        how: dict[str, Any] = {"help": _help(field)}
        if any(get_origin(kind) is list for kind in kinds):
            how["nargs"] = "+"
        if bool in kinds:
            how |= {"nargs": "?", "const": "true"}
        choices = [kind for kind in kinds if get_origin(kind) is Literal]
        if choices:
            how["metavar"] = "{" + ",".join(get_args(choices[0])) + "}"
        parser.add_argument(*names, dest=field.name, **how)
        if field.default is True:
            opposite = dict.fromkeys([f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"])
            parser.add_argument(*opposite, dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS)
    return parser


def _help(field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    facts = [range_of(field), f"default: {' '.join(map(str, default)) if isinstance(default, list) else default}"]
    return f"{field.metadata['help']} ({'; '.join(filter(None, facts))})".replace("%", "%%")
