"""Flags and `--help`, from the settings' names, types and help texts."""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from coati.config.options import is_common
from coati.config.schema import BOUNDS, Leaf, bounds_of, entry_classes, flags, leaves, paths_named
from coati.config.yaml12 import read_words
from coati.errors import UserError

METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


@dataclass(frozen=True)
class Given:
    """What flags say.

    Attributes:
        values: words, lists of words or mappings, by the settings' paths.
        flags: as errors call them, by the same paths.
    """

    values: dict[str, Any]
    flags: dict[str, str]


def read_flags(config_class: type, argv: list[str], description: str, defaults: Mapping[str, Any]) -> Given:
    """The settings that the flags give, as words.

    Raises:
        UserError: a flag is unknown, means several settings, or lacks its value.
        SystemExit: `--help`.
    """
    every = leaves(config_class)
    names = flags(every)
    shown = leaves(config_class, defaults.get("algorithm", {}).get("type"))
    parser = _parser(every, shown, names, description, defaults, config_class)
    known, rest = parser.parse_known_args([_canonical(word, every, names) for word in argv])
    if rest:
        raise UserError(f"{rest[0]!r} is no flag of this command: --help lists them")
    paths = {name: path for path, name in names.items()}
    values = {paths[name]: words for name, words in vars(known).items()}
    for path, words in values.items():
        if every[path].is_mapping:
            values[path] = read_words(words, f"--{names[path]}")
        elif every[path].is_list and len(words) == 1 and re.fullmatch(r"\[.*\]", words[0], re.DOTALL):
            values[path] = read_words(words[0], f"--{names[path]}")
        elif entry_classes(every[path].field.annotation):
            values[path] = [read_words(word, f"--{names[path]}") for word in words]
    return Given(values, {path: f"--{names[path]}" for path in values})


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings by name as the words of a command line."""
    words = []
    for name, value in values.items():
        entries = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in entries)]
    return words


def _canonical(word: str, found: dict[str, Leaf], names: dict[str, str]) -> str:
    """A flag by its shortest name: `--optimizer.learning-rate` is `--learning_rate`."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if not flag.startswith("--"):
        return word
    for no, bare in (("", name), ("no_", name.removeprefix("no_"))):
        paths = paths_named(bare, found)
        if len(paths) > 1:
            raise UserError(f"{flag} may be {' or '.join('--' + path for path in paths)}: say which")
        if paths and (not no or name.startswith(no)):
            return f"--{no}{names[paths[0]]}{equals}{value}"
    return word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A line instead of all flags."""
        raise UserError(message)


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        for action in parser._actions:
            action.help = getattr(action, "text", action.help)
        parser.print_help()
        parser.exit()


def _parser(
    every: dict[str, Leaf],
    shown: dict[str, Leaf],
    names: dict[str, str],
    description: str,
    defaults: Mapping[str, Any],
    config_class: type,
) -> argparse.ArgumentParser:
    """A parser that leaves the words of the flags that were given as they are."""
    usage = f"{program()} --config FILE.yaml [--SETTING VALUE ...]"
    options: dict[str, Any] = dict(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser = _Parser(description=description, usage=usage, **options)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-5 for a flag
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, in the sections below")
    has_common = any(is_common(leaf.field) for leaf in shown.values())
    parser.add_argument("-h", "--help", action="help", help=f"show {'the common' if has_common else 'all'} settings")
    if has_common:
        parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all settings")
    groups: dict[str, Any] = {}
    ordered = sorted(shown, key=lambda path: not is_common(shown[path].field))
    for path in [*ordered, *(path for path in every if path not in shown)]:
        leaf = shown.get(path, every[path])
        title = title_of(leaf.section, config_class)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = help_of(leaf, defaults) if path in shown else argparse.SUPPRESS
        hidden = has_common and not is_common(leaf.field)
        _add_flag(groups[title], names[path], leaf, argparse.SUPPRESS if hidden else text).text = text
    return parser


def program() -> str:
    """The command that was given, without settings: `coati ppo`, or a script."""
    script = Path(sys.argv[0]).name
    is_command = script in ("coati", "cli.py") and len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    return f"coati {sys.argv[1]}" if is_command else script


def title_of(section: str, config_class: type) -> str:
    """A section's name, and what is in it."""
    if not section:
        return "the run"
    field = config_class.__pydantic_fields__[section.partition(".")[0]]
    return f"{section}: {field.description}" if field.description else section


def _add_flag(group, name: str, leaf: Leaf, text: str) -> argparse.Action:
    """The flag, and `--no_` of it where the setting is on by default."""
    how: dict[str, Any] = {"help": text, "dest": name}
    if leaf.is_list:
        how["nargs"] = "+"
    if bool in leaf.kinds:
        how |= {"nargs": "?", "const": "true"}
    for kind in leaf.kinds:
        if get_origin(kind) is Literal:
            how["metavar"] = "{" + ",".join(get_args(kind)) + "}"
        elif get_origin(kind) is dict or entry_classes(leaf.field.annotation):
            how["metavar"] = "YAML"
        elif kind in METAVARS:
            how.setdefault("metavar", METAVARS[kind])
    how.setdefault("metavar", "TEXT")
    if leaf.field.default is True:
        off = dict(dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
        group.add_argument(f"--no_{name}", **off)
    return group.add_argument(f"--{name}", **how)


def range_of(field: FieldInfo) -> str:
    """The bounds of a setting in words, such as "at least 0 and below 1"; empty without any."""
    return " and ".join(f"{BOUNDS[name]} {bound}" for name, bound in bounds_of(field).items())


def help_of(leaf: Leaf, defaults: Mapping[str, Any]) -> str:
    """A setting's help with its bounds and its default."""
    default: Any = defaults
    for name in leaf.path.split("."):
        default = default.get(name, {}) if isinstance(default, Mapping) else {}
    if default == {}:
        default = leaf.field.get_default(call_default_factory=True)
    if default is PydanticUndefined or default is None or default == []:
        default = "none"
    words = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    facts = [fact for fact in (range_of(leaf.field), f"default: {words}") if fact]
    return f"{leaf.field.description} ({'; '.join(facts)})".replace("%", "%%")
