"""Messages as chat templates take them, from the ways in which data sets write them.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": text}` with whatever else the row gives it:
`reasoning_content`, `name`, `tool_call_id`, ... go to the chat template as they are. `tool_calls` have one shape,
`{"type": "function", "function": {"name": text, "arguments": object}}`. `weight` is there and 0 where the assistant's
message is not to be learned; the template does not see it.
"""

from __future__ import annotations

import json
import re
from typing import Any

Messages = list[dict[str, Any]]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
# Roles whose content is the JSON of a call, or of a list of them.
CALLS = ("function_call", "tool_call")
# What says of an assistant's message whether it is learned.
TRAINED = ("weight", "train", "training")
TEXT_PARTS = ("text", "input_text", "output_text")
MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_turns(value: Any, role: str, name: str) -> tuple[Messages, list[str]]:
    """Messages from a message list, one message, an HH-RLHF text, or a plain text (which is one message of `role`);
    and the names of what they hold that was not read.

    `name` is the field's. Raises `ValueError`, as all functions here do for what they cannot read.
    """
    if isinstance(value, list | dict):
        return read_messages([value] if isinstance(value, dict) else value, name)
    text = read_text(value, name)
    if not text.startswith("\n\nHuman:"):
        return [{"role": role, "content": text}], []
    turns = _hh_turns(text)
    # An HH-RLHF prompt ends in "Assistant:", the start of a turn that the responses fill.
    open_turn = role == "user" and turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if open_turn else turns, []


def read_messages(value: Any, name: str) -> tuple[Messages, list[str]]:
    """As `read_turns`, of a message list."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"`{name}` is not a list of messages")
    messages: Messages = []
    unread: list[str] = []
    for fields in value:
        message = _message({key: part for key, part in fields.items() if part is not None}, name, unread)
        calls_before = bool(messages) and set(messages[-1]) == {"role", "content", "tool_calls"}
        if fields.get("role", fields.get("from")) in CALLS and calls_before and not messages[-1]["content"]:
            # Calls made at once, each written as a message of its own.
            messages[-1] = {**messages[-1], "tool_calls": messages[-1]["tool_calls"] + message["tool_calls"]}
        else:
            messages.append(message)
    return messages, unread


def _message(fields: dict[str, Any], name: str, unread: list[str]) -> dict[str, Any]:
    role_key = "role" if "role" in fields else "from"
    content_key = "content" if "content" in fields else "value"
    role, content = fields.pop(role_key, None), fields.pop(content_key, None)
    if not isinstance(role, str) or role.lower() not in (*ROLES, *CALLS):
        known = "it is none of system, user, assistant and tool"
        raise ValueError(f"`{name}` has a role {str(role)[:40]!r}; {known}, nor another name for one")
    if role.lower() in CALLS:
        fields = {**fields, "tool_calls": read_text(content, name)}
        role, content = "assistant", ""
    role = ROLES[role.lower()]
    if "function_call" in fields and "tool_calls" not in fields:
        fields["tool_calls"] = fields.pop("function_call")
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], name)
        if not fields["tool_calls"]:
            del fields["tool_calls"]
    learned = _is_learned(fields, role, name, unread)
    text = _content(content, role, "tool_calls" in fields, name, unread)
    _check_unicode(fields, name)
    message = {"role": role, "content": text, **fields}
    return message if learned else {**message, "weight": 0}


def _content(content: Any, role: str, calls: bool, name: str, unread: list[str]) -> str:
    """The text of a message's content. A tool may return any JSON, and a call needs no text."""
    if content is None and (calls or role == "tool"):
        return ""
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if all(part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str) for part in parts):
            more = {key for part in parts for key, value in part.items() if value is not None} - {"type", "text"}
            unread += [f"`{key}` of content parts" for key in sorted(more)]
            return read_text("".join(part["text"] for part in parts), name)
    if role == "tool" and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False, default=str)
    return read_text(content, name)


def _is_learned(fields: dict[str, Any], role: str, name: str, unread: list[str]) -> bool:
    """Takes what says so out of the message."""
    learned = True
    for key in TRAINED:
        if key not in fields:
            continue
        value = fields.pop(key)
        if value not in (0, 1):
            raise ValueError(f"`{name}` has a `{key}` that is neither 0 nor 1, false nor true")
        if not value:
            learned = False
        if value and role != "assistant":
            unread.append(f"`{key}` of {role} messages (only the assistant's are learned)")
    return learned or role != "assistant"


def _tool_calls(value: Any, name: str) -> list[dict]:
    calls = _from_json(value, f"`{name}` has tool calls that are")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"`{name}` has tool calls that are not a list of objects")
    return [_tool_call({key: part for key, part in call.items() if part is not None}, name) for call in calls]


def _tool_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    function = call.pop("function", None)
    if function is None:
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"`{name}` has a tool call without the name of a function")
    arguments = function.get("arguments")
    # Templates write objects; in OpenAI's format these are JSON texts.
    arguments = _from_json(arguments, f"`{name}` has arguments of a tool call that are") if arguments else {}
    if not isinstance(arguments, dict):
        raise ValueError(f"`{name}` has arguments of a tool call that are not an object")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def read_tools(value: Any) -> list[dict] | None:
    """Descriptions of tools as chat templates take them, `{"type": "function", "function": {...}}`; None for none."""
    tools = _from_json(value, "`tools` is") if value else []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` is not a list of objects that describe tools")
    _check_unicode(tools, "tools")
    bare = [tool if "function" in tool or "name" not in tool else {"function": tool} for tool in tools]
    return [{"type": "function", **tool} for tool in bare] or None


def read_history(value: Any) -> Messages:
    """Earlier turns from pairs of texts (LLaMA-Factory)."""
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError("`history` is not a list of pairs of texts")
    messages: Messages = []
    for asked, response in value:
        messages.append({"role": "user", "content": read_text(asked, "history")})
        messages.append({"role": "assistant", "content": read_text(response, "history")})
    return messages


def read_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` has content that is not text")
    _check_unicode(value, name)
    return value


def _check_unicode(value: Any, name: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` has text that is not valid Unicode") from None


def _from_json(value: Any, what: str) -> Any:
    """The object that a JSON text holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} not valid JSON") from None


def _hh_turns(text: str) -> Messages:
    parts = HH_TURN.split(text)
    messages: Messages = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = ROLES[speaker.lower()], content.strip()
        if messages and messages[-1]["role"] == role:
            content = messages.pop()["content"] + "\n\n" + content
        messages.append({"role": role, "content": content})
    return messages


def check_turns(messages: Messages, last: str) -> Messages:
    """Raise `ValueError` unless roles are [system] user assistant ..., with tools' messages between two of the
    assistant's, the user's and the assistant's say something, and the last is from `last` ("user" takes a tool too).
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("there are no messages")
    before: str | None = None
    for message in turns:
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            raise ValueError(
                "the roles do not alternate user, assistant (after an optional system message; tools answer the "
                "assistant)"
            )
        if not message["content"].strip():
            if role == "assistant" and "tool_calls" not in message:
                raise ValueError("a response is empty")
            if role == "user":
                raise ValueError("a prompt is empty")
        before = role
    if before != last and not (last == "user" and before == "tool"):
        raise ValueError(f"the last message is not from the {last}")
    return messages
