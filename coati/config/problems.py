"""What is wrong with settings, in words: pydantic's errors, each as one clause that names the setting."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from coati.config.schema import BOUNDS, entry_classes, leaves, section_classes, types_of
from coati.config.yaml12 import plain

# what pydantic's types of errors begin with
TAKES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "dict": "a mapping",
    "dataclass": "settings of its own",
    "model": "settings of its own",
}


def in_words(error: ValidationError, settings_class: type, named: Callable[[str], str] = str) -> str:
    """All problems of an error in one line.

    Args:
        named: what they call the setting of a path.
    """
    problems = [_in_words(one, settings_class, named) for one in error.errors(include_url=False)]
    return "; ".join(dict.fromkeys(problems))


def unknown(name, paths: Iterable[str]) -> str:
    """A name that no setting has, with the one that it may have meant."""
    by_last = {path.rpartition(".")[2]: path for path in paths}
    near = difflib.get_close_matches(str(name).rpartition(".")[2], by_last, 1)
    return f"unknown setting {plain(name)!r}" + (f"; did you mean {by_last[near[0]]!r}?" if near else "")


def _in_words(error: dict[str, Any], settings_class: type, named: Callable[[str], str]) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    path = _path_of(error["loc"], settings_class)
    if kind == "value_error":  # of a whole section, whose text names its settings
        return str(context["error"])
    if kind == "unexpected_keyword_argument":
        return _unexpected(path, error["loc"], settings_class, named)
    if kind == "missing":
        return f"{named(path)} is missing"
    if kind == "union_tag_not_found":
        return f"{named(path)} has no type"
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        return f"{named(path)}: there is no type {context['tag']!r}; it is one of {tags}"
    for name in BOUNDS.keys() & context.keys():
        bound = int(context[name]) if context[name] == int(context[name]) else context[name]
        return f"{named(path)} is {_shown(value)}: it must be {BOUNDS[name]} {bound}"
    if kind == "finite_number":
        return f"{named(path)} is {_shown(value)}: it must be finite"
    if kind == "literal_error":
        takes = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    else:
        takes = TAKES.get(kind.split("_")[0], error["msg"])
    return f"{named(path)} is {_shown(value)}; it takes {takes}"


def _unexpected(path: str, loc: tuple, settings_class: type, named: Callable[[str], str]) -> str:
    """A name that this section, or this type of section, doesn't have."""
    known = leaves(settings_class)
    origin = named(path).removesuffix(path)
    section, _, last = path.rpartition(".")
    if path in known:  # another type has it
        return f"{origin}{loc[-2]} has no {last}: leave {path} out"
    here = [other for other in known if other.rpartition(".")[0] == section]
    has_near = difflib.get_close_matches(last, [other.rpartition(".")[2] for other in here], 1)
    return origin + unknown(path, here if has_near else known)


def _shown(value) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(str(value) if isinstance(value, str) else value)


def _path_of(loc: tuple, settings_class: type) -> str:
    """Where an error is, as a file names it: without the types of unions, which pydantic puts in."""
    path, classes = "", [settings_class]
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        fields = {name: field for one in classes for name, field in one.__pydantic_fields__.items()}
        chosen = [one for one in classes if "type" in one.__pydantic_fields__ and part in types_of(one)]
        if chosen and part not in fields:
            classes = chosen
            continue
        path += f".{part}" if path else str(part)
        annotation = fields[part].annotation if part in fields else None
        classes = section_classes(annotation) or entry_classes(annotation)
    return path
