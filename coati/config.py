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
        UserError: the file is missing, isn't a mapping, or has a key that is no field.
        SystemExit: `--help`, or a value of the wrong type (argparse's message names the flag).
    """
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; each key is the name of a flag below")
    path, rest = _take_config_path(argv)
    from_file = _as_flags(path, config_class) if path else []
    (config,) = parser.parse_args_into_dataclasses(args=from_file + rest)[:1]
    return config


def _take_config_path(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def _as_flags(path: str, config_class) -> list[str]:
    """The file's settings as flags, so that both are checked by the same parser."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must be a mapping of settings, such as `learning_rate: 1.0e-5`")
    names = [field.name for field in dataclasses.fields(config_class)]
    flags = []
    for key, value in settings.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            raise UserError(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(str(v) for v in values)]
    return flags
