"""One dataclass a command: its fields are the YAML keys, the flags and the text of `--help`."""

import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import TypeVar

from coati.errors import UserError

Config = TypeVar("Config")
MAPPINGS = ("chat_template_kwargs",)  # settings that are mappings in a file, and JSON as flags


def option(default, help: str):
    """A dataclass field that carries its own help text; a tuple stands for the default of a list."""
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse_config(config_class: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """Reads `--config FILE.yaml` (keys are the flags' names) and the flags; a flag wins over the file.

    Args:
        argv: the command line, `sys.argv[1:]` if None.

    Raises:
        UserError: the file is missing, isn't a mapping, or has a key that is no field; a flag is unknown.
        SystemExit: `--help`, or a value of the wrong type (argparse's message names the flag).
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
    from transformers import HfArgumentParser

    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; each key is the name of a flag below")
    flags, emptied = _as_flags(settings, origin, config_class)
    config, *_, unknown = parser.parse_args_into_dataclasses(args=flags + argv, return_remaining_strings=True)
    if unknown:
        raise UserError(f"{unknown[0]!r} is no flag of this script: --help lists them")
    for name in emptied:  # argparse has no flag for an empty list
        if not any(word.split("=")[0] == f"--{name}" for word in argv):
            setattr(config, name, [])
    return config


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


def _as_flags(settings: dict, origin: str, config_class) -> tuple[list[str], list[str]]:
    """The settings as flags, so that both are checked by the same parser, and the lists it empties."""
    names = [field.name for field in dataclasses.fields(config_class)]
    flags: list[str] = []
    emptied: list[str] = []
    for key, value in settings.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            raise UserError(f"{origin}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if isinstance(value, dict) and key not in MAPPINGS:
            raise UserError(f"{origin}: {key} is a mapping; it takes a plain value or a list")
        if value == []:
            emptied.append(key)
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value, default=str)}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags, emptied


def read_yaml(path: str) -> dict:
    """The file's settings.

    Raises:
        UserError: it is missing, or isn't a mapping.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must be a mapping of settings, such as `learning_rate: 1.0e-5`")
    return settings
