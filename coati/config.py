"""One dataclass a command: its fields are the YAML keys, the flags and the text of `--help`."""

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TypeVar

from coati.errors import UserError

Config = TypeVar("Config")


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
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; each key is the name of a flag below")
    path, rest = _take_config_path(argv)
    flags, emptied = _as_flags(path, config_class) if path else ([], [])
    config, *_, unknown = parser.parse_args_into_dataclasses(args=flags + rest, return_remaining_strings=True)
    if unknown:
        raise UserError(f"{unknown[0]!r} is no flag of this script: --help lists them")
    for name in emptied:  # argparse has no flag for an empty list
        if not any(word.split("=")[0] == f"--{name}" for word in rest):
            setattr(config, name, [])
    return config


def _take_config_path(argv: list[str]) -> tuple[str | None, list[str]]:
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


def _as_flags(path: str, config_class) -> tuple[list[str], list[str]]:
    """The file's settings as flags, so that both are checked by the same parser, and the lists it empties."""
    names = [field.name for field in dataclasses.fields(config_class)]
    flags: list[str] = []
    emptied: list[str] = []
    for key, value in _read(path).items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            raise UserError(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if isinstance(value, dict):
            raise UserError(f"--config {path}: {key} is a mapping; it takes a plain value or a list")
        if value == []:
            emptied.append(key)
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags, emptied


def _read(path: str) -> dict:
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
