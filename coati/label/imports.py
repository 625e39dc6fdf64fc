"""Labels from exports of Argilla and Label Studio.

What is read of an export, and no more:

- Argilla 2, `dataset.records.to_json(...)`: a record's `fields`, and of `responses` those to one question,
  `{"value", "user_id"}`. The value is an option of a label question, or of a ranking question the options from the best
  to the worst, as texts or as `{"value", "rank"}`.
- Label Studio, JSON: a task's `data`, and of each of `annotations` that wasn't canceled `completed_by` and the `result`
  of a `pairwise` ("left" or "right") or `choices` control.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.label.items import Item, make_item, rows_of
from coati.label.results import VALUES


@dataclass(frozen=True)
class Fields:
    """Where an export has what.

    Attributes:
        prompt, responses: names of fields.
        question: the name of Argilla's question or Label Studio's control; None if a record has one only.
        values: our choice ("first", "second", "tie", "both_bad") by the value that stands for it.
        models: of the two responses.
    """

    prompt: str
    responses: tuple[str, str]
    question: str | None
    values: Mapping[str, str]
    models: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Imported:
    """Somebody's label of an item's two responses; `choice` is one of `VALUES`."""

    key: str
    person: str
    choice: str


def known_values(responses: tuple[str, str], words: list[str]) -> dict[str, str]:
    """Choices by value: left and right, the responses' field names, tie, both_bad, and what `CHOICE=VALUE` words say.

    Raises:
        UserError: a word is wrong.
    """
    values = {"left": "first", "right": "second", "tie": "tie", "both_bad": "both_bad"}
    values |= {responses[0]: "first", responses[1]: "second"}
    for word in words:
        choice, separator, value = word.partition("=")
        if choice not in VALUES or not separator or not value:
            raise UserError(f"--values has {word!r}; write CHOICE=VALUE, with a choice of {', '.join(VALUES)}")
        values[value] = choice
    return values


def read_export(tool: str, path: Path, fields: Fields) -> tuple[list[Item], list[Imported]]:
    """Items and labels of an export.

    Args:
        tool: "argilla" or "label_studio".

    Raises:
        UserError: a record can't be read (with its line; in a list its number).
    """
    items: dict[str, Item] = {}
    labels: list[Imported] = []
    for place, row in rows_of(path):
        texts = row.get("fields" if tool == "argilla" else "data")
        if not isinstance(texts, dict):
            raise UserError(f"{place}: no record of {tool}; export it as the docs say")
        for name in (fields.prompt, *fields.responses):
            if name not in texts:
                raise UserError(f"{place}: no field {name!r}, only {', '.join(map(repr, texts))}; name one of these")
        both = zip((texts[name] for name in fields.responses), fields.models, strict=True)
        item = make_item(place, texts[fields.prompt], [{"text": text, "model": model} for text, model in both])
        items[item.key] = item
        given = argilla_values(place, row, fields) if tool == "argilla" else label_studio_values(place, row, fields)
        for person, value in given:
            if value not in fields.values:
                known = ", ".join(fields.values)
                raise UserError(f"{place}: {value!r} is none of {known}; say what it means with --values CHOICE=VALUE")
            labels.append(Imported(item.key, f"{tool}:{person}", fields.values[value]))
    twice = [key for key, count in Counter((label.key, label.person) for label in labels).items() if count > 1]
    if twice:
        raise UserError(
            f"{path} has two labels of {twice[0][1]} for one prompt and its responses; leave one of them out"
        )
    return list(items.values()), labels


def argilla_values(place: str, row: dict[str, Any], fields: Fields) -> Iterator[tuple[str, str]]:
    """User and value of each response to the question."""
    responses = row.get("responses")
    if not isinstance(responses, dict):
        raise UserError(f"{place}: no `responses` by question; export the records with to_json")
    if fields.question is None and len(responses) > 1:
        raise UserError(f"{place}: several questions, {', '.join(responses)}; name one with --question")
    given = (
        responses.get(fields.question, []) if fields.question else [one for all in responses.values() for one in all]
    )
    for response in given:
        if not isinstance(response, dict) or "value" not in response:
            raise UserError(f"{place}: a response has no `value`")
        if response.get("status", "submitted") == "submitted":
            yield str(response.get("user_id")), best_ranked(place, response["value"])


def best_ranked(place: str, value: Any) -> str:
    """The value itself, or the first of a ranking; "tie" if several are first."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(option, str) for option in value):
        return value[0]
    try:
        least = min(option["rank"] for option in value)
        first = [option["value"] for option in value if option["rank"] == least]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{place}: a response is neither a text nor a ranking") from None
    return str(first[0]) if len(first) == 1 else "tie"


def label_studio_values(place: str, row: dict[str, Any], fields: Fields) -> Iterator[tuple[str, str]]:
    """Person and value of each annotation that wasn't canceled."""
    annotations = row.get("annotations")
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise UserError(f"{place}: no `annotations`; export as JSON, not JSON-MIN")
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            continue
        by = annotation.get("completed_by")
        person = by.get("email", by.get("id")) if isinstance(by, dict) else by
        found = [
            result["value"]
            for result in annotation.get("result", [])
            if result.get("type") in ("pairwise", "choices") and fields.question in (None, result.get("from_name"))
        ]
        if len(found) > 1:
            raise UserError(f"{place}: several results of one annotation; name one with --question")
        for value in found:
            chosen = [value["selected"]] if "selected" in value else value.get("choices", [])
            if len(chosen) != 1 or not isinstance(chosen[0], str):
                raise UserError(f"{place}: an annotation has not one choice")
            yield str(person), chosen[0]
