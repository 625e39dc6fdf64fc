"""YAML 1.2's reading of words, on PyYAML. That one reads YAML 1.1: `off` is a boolean, `1:30` a number, `1e-5` a text.

A setting's type says what a word is, so words are kept as they are written: a text setting may be `1.10` or `off`.
"""

import re
from pathlib import Path
from typing import ClassVar

import yaml

from coati.errors import UserError

WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
WHOLE = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Word(str):
    """An unquoted word of a YAML file, as it is written."""

    @property
    def value(self) -> bool | int | float | str | None:
        """What YAML 1.2's core schema (section 10.3.2) reads it as."""
        if self in WORDS:
            return WORDS[self]
        if WHOLE.fullmatch(self):
            bases = {"0o": 8, "0x": 16}
            return int(self, bases.get(self[:2], 10))
        if NUMBER.fullmatch(self):
            return float(self)
        if NOT_FINITE.fullmatch(self):
            return float(self.replace(".", ""))
        return str(self)


class _Loader(yaml.SafeLoader):
    """Makes dicts, lists, `Word`s, None for what is empty or null, and texts of what is in quotes."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_word(self, node):
        text = self.construct_scalar(node)
        if node.style is not None:
            return text
        word = Word(text)
        return None if word.value is None else word


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_word)


def plain(value):
    """What was read from a file, with each word as YAML 1.2 reads it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Word) else value


def read_yaml(path: str) -> dict:
    """The file's settings: dicts and lists of `Word`s, texts and None.

    Raises:
        UserError: it is missing, isn't a mapping, or names a key twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    found = read_words(text, f"--config {path}")
    if not isinstance(found, dict):
        raise UserError(f"--config {path} must be a mapping of settings, such as `batch_size: 64`")
    return found


def read_words(text: str, origin: str):
    """YAML text as dicts and lists of `Word`s, texts and None.

    Args:
        origin: what errors call it.

    Raises:
        UserError: it isn't YAML, or names a key twice.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{origin} is not YAML (line {error.problem_mark.line + 1}): {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
