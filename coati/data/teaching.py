"""What a row says of teachers: which one it has, and the prompt that this one reads instead of the student's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from coati.data.messages import Messages, read_turns
from coati.data.records import LAST_RESPONSE, PromptRecord, Record

PLACE = "\ue000success\ue000"  # in a text, where a successful response will stand: characters for private use


@dataclass(frozen=True)
class Teaching:
    """How teachers read the rows of a data set.

    Attributes:
        prompt: the text of the prompt's last message as a teacher reads it, with names of fields in braces; None where
            it reads what the student does.
        column: the field that names a row's teacher, of `names`; None where all rows have the same.
        setting: what `prompt` is called where it is set.
        has_place: `{success}` in `prompt` is no field, but a place for a response that is sampled later.
    """

    prompt: str | None = None
    column: str | None = None
    names: tuple[str, ...] = ()
    setting: str = "teacher_prompt"
    has_place: bool = False

    def teacher_of(self, row: Any) -> str | None:
        """The name of a row's teacher.

        Raises `ValueError`, as all of `coati.data.messages`, where the row names none of the teachers.
        """
        if self.column is None:
            return None
        value = row.get(self.column) if isinstance(row, dict) else None
        if value is None:
            raise ValueError(f"no field `{self.column}`, which names the row's teacher")
        if str(value) not in self.names:
            raise ValueError(f"`{self.column}` is {str(value)[:40]!r}, and the teachers are {', '.join(self.names)}")
        return str(value)

    def add_to(self, record: Record) -> Record:
        """The record with its teacher's prompt.

        Raises `ValueError` where the row lacks a field that the prompt names.
        """
        unused = tuple(part for part in record.unused if part != f"`{self.column}`")
        if self.prompt is None or not isinstance(record, PromptRecord):
            return replace(record, unused=unused)
        if "response" in fields_of(self.prompt, self.setting):
            unused = tuple(part for part in unused if part != LAST_RESPONSE)
        later = {"success": PLACE} if self.has_place else {}
        return replace(record, teacher_prompt=filled_prompt(self.prompt, record, self.setting, later), unused=unused)


def fields_of(template: str, setting: str = "teacher_prompt") -> list[str]:
    """The names in braces.

    Args:
        setting: what the template is called in errors.

    Raises `ValueError` for braces that hold more or less than a name, and for a text without any.
    """
    remedy = "write the name of a field alone in braces, such as {prompt}, and {{ or }} for a brace"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{setting} can't be read ({error}): {remedy}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ValueError(f"{setting} has {{{name}}} with more or less in its braces than a name: {remedy}")
    if not names:
        raise ValueError(f"{setting} names no field of the rows: {remedy}")
    return list(dict.fromkeys(names))


def filled_prompt(
    template: str, record: PromptRecord, setting: str = "teacher_prompt", later: dict[str, str] | None = None
) -> Messages:
    """The record's prompt with another last message: `template`, with the values of the row's fields. `{prompt}` is the
    text of the last message itself, `{response}` the row's response, unless it has a field of that name; `later` has
    values that go before all fields."""
    last = record.prompt[-1]
    if last["role"] != "user":
        raise ValueError(f"the prompt ends with a tool's message, and {setting} replaces the user's")
    values = {"response": record.response} | record.columns | {"prompt": last["content"]} | (later or {})
    texts = {name: _text(values.get(name), name, setting) for name in fields_of(template, setting)}
    text = template.format_map(texts)
    if not text.strip():
        raise ValueError(f"{setting} gives an empty prompt")
    return [*record.prompt[:-1], {**last, "content": text}]


def _text(value: Any, name: str, setting: str) -> str:
    """A field's value as a text: of messages the last one, of a list of texts its lines."""
    if value is None:
        raise ValueError(f"no field `{name}`, which {setting} names")
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    messages, _ = read_turns(value, "assistant", name)
    if not messages:
        raise ValueError(f"`{name}` is empty")
    return messages[-1]["content"]
