"""What of a dialogue is not in the text that a chat template wrote for it.

Templates drop fields that they don't know, earlier reasoning, or what tools have said. Nothing else would tell.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from coati.data.messages import Messages
from coati.data.templates import ChatTemplate, template_errors

Place = tuple[int | str, ...]


def left_out(template: ChatTemplate, messages: Messages, text: str, *, is_prompt: bool, start: int = 0) -> list[str]:
    """What of the messages from `start` on, and of the tools, is not in `text`, which the template wrote for them.

    Every value gets a mark in its middle, and the template is rendered again: what it writes completely surrounds its
    mark. Blanks may differ, and characters may be escaped as in JSON.
    """
    marked, values = _mark(messages, start, None)
    rendered = _squeezed(template, marked, is_prompt)
    missing = []
    for place, value in values.items():
        if _is_written(value, place, rendered):
            continue
        # The marks of other values may have changed what the template does with this one.
        alone = _squeezed(template, _mark(messages, start, place)[0], is_prompt)
        # A value that a template refuses once it is changed is read.
        if alone is not None and not _is_written(value, place, alone):
            missing.append(_describe(messages, place, value, text))
    if template.tools and _squeezed(replace(template, tools=None), messages, is_prompt) == "".join(text.split()):
        missing.append("`tools`")
    return [f"the chat template leaves out or rewrites {what}" for what in dict.fromkeys(missing)]


def _mark(messages: Messages, start: int, only: Place | None) -> tuple[Messages, dict[Place, Any]]:
    """The messages with their values marked (all or only one), and the values by where they are."""
    values: dict[Place, Any] = {}

    def mark(value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: mark(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [mark(inner, (*place, i)) for i, inner in enumerate(value)]
        is_ours = place[1] in ("role", "weight") or (place[-1] == "type" and value == "function")
        if is_ours or (isinstance(value, str) and not value.strip()) or only not in (None, place):
            return value
        values[place] = value
        if isinstance(value, str):
            return _sign(place).join(_halves(value))
        return _sign(place)

    marked = [mark(message, (i,)) if i >= start else message for i, message in enumerate(messages)]
    return marked, values


def _halves(value: str) -> tuple[str, str]:
    """Split in the middle, or behind the tag that is there: templates look for an intact `</think>`."""
    middle = len(value) // 2
    opened = value.rfind("<", 0, middle)
    closed = value.find(">", opened) + 1
    if opened >= 0 and closed > middle:
        middle = closed
    return value[:middle], value[middle:]


def _sign(place: Place) -> str:
    """A marker that no data should contain, of characters that neither JSON nor Python escapes."""
    return "⟦" + ".".join(map(str, place)) + "⟧"


def _squeezed(template: ChatTemplate, messages: Messages, is_prompt: bool) -> str | None:
    """The rendered text without blanks; None where the template refuses the messages."""
    try:
        return "".join(template.render(messages, is_prompt).split())
    except template_errors():
        return None


def _is_written(value: Any, place: Place, rendered: str | None) -> bool:
    """Whether the rendered text has the complete value around its mark."""
    sign = "".join(_sign(place).split())
    at = -1 if rendered is None else rendered.find(sign)
    if rendered is None or at < 0:
        return False
    if not isinstance(value, str):
        return True
    for write in (str, lambda text: json.dumps(text, ensure_ascii=False)[1:-1]):
        before, after = ("".join(write(half).split()) for half in _halves(value))
        if rendered.endswith(before, 0, at) and rendered.startswith(after, at + len(sign)):
            return True
    return False


def _describe(messages: Messages, place: Place, value: Any, text: str) -> str:
    names = [part for part in place[1:] if isinstance(part, str)]
    if "arguments" in names:
        names = names[: names.index("arguments") + 1]
    role = messages[int(place[0])]["role"]
    if names == ["content"] and "</think>" in value and value.rpartition("</think>")[2].strip() in text:
        return f"the reasoning (up to </think>) in `content` of {role} messages"
    return f"`{'.'.join(names)}` of {role} messages"
