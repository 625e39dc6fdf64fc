"""Calls of tools in what a policy says: the formats that models write them in, and which of them a template writes.

| Format | A call of `find` |
|---|---|
| `hermes` (Hermes, Qwen 2.5 and 3) | `<tool_call>{"name": "find", "arguments": {"what": "tea"}}</tool_call>` |
| `llama3` (Llama 3.1) | `{"name": "find", "parameters": {"what": "tea"}}` |
| `mistral` | `[TOOL_CALLS][{"name": "find", "arguments": {"what": "tea"}}]`, `[TOOL_CALLS]find[ARGS]{"what": "tea"}` |
| `pythonic` (Llama 3.2 and 4, Olmo) | `[find(what="tea")]` |
| `harmony` (gpt-oss) | ` to=functions.find<|channel|>commentary json<|message|>{"what": "tea"}<|call|>` |

A reader returns the calls of a text, none for a text that only says something. It raises `MalformedCall` where a text
begins a call that can't be read.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from coati.data.messages import Messages
from coati.data.templates import ChatTemplate, template_errors
from coati.errors import UserError

Call = tuple[str, dict[str, Any]]  # the name of a tool, and its arguments

PROBED: Call = ("find", {"what": "tea"})
TOO_DEEP = (RecursionError, MemoryError)  # what parsers raise for brackets in brackets in brackets


class MalformedCall(ValueError):
    """A text begins a call that can't be read; the message is for the policy."""


def read_hermes(text: str) -> list[Call]:
    found = re.findall(r"<tool_call>(.*?)(</tool_call>|\Z)", text, re.DOTALL)
    if any(not end for _, end in found):
        raise MalformedCall("a <tool_call> has no </tool_call>")
    return [_call(_from_json(inner)) for inner, _ in found]


def read_llama3(text: str) -> list[Call]:
    _, tag, said = text.rpartition("<|python_tag|>")
    said = said.strip()
    if not tag and not said.startswith("{"):
        return []
    objects = []
    while said:
        try:
            value, end = json.JSONDecoder().raw_decode(said)
        except (ValueError, *TOO_DEEP):
            if objects or tag or re.match(r'\{\s*"(name|type)"', said):
                raise MalformedCall("a call is no JSON") from None
            return []  # a text may begin with a bracket
        objects.append(value)
        said = said[end:].lstrip("; \n")
    is_call = all(isinstance(value, dict) and "name" in value for value in objects)
    return [_call(value) for value in objects] if is_call else []


def read_mistral(text: str) -> list[Call]:
    _, *parts = text.split("[TOOL_CALLS]")
    calls = []
    for part in parts:
        named = re.match(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)", part)
        if named:
            calls.append(_call({"name": named[1], "arguments": _from_json(part[named.end() :])}))
        else:
            value = _from_json(part)
            calls += [_call(one) for one in (value if isinstance(value, list) else [value])]
    return calls


def read_pythonic(text: str) -> list[Call]:
    said = text.replace("<|python_start|>", "").replace("<|python_end|>", "").strip()
    if not re.match(r"\[\s*[A-Za-z_][\w.]*\(", said):
        return []
    try:
        tree = ast.parse(said, mode="eval").body
        if not isinstance(tree, ast.List):
            raise ValueError
        return [_python_call(node) for node in tree.elts]
    except (ValueError, TypeError, SyntaxError, *TOO_DEEP):
        raise MalformedCall("the calls are no Python list of calls with constant arguments by name") from None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(part.arg is None for part in node.keywords):
        raise ValueError
    return ast.unparse(node.func), {str(part.arg): ast.literal_eval(part.value) for part in node.keywords}


def read_harmony(text: str) -> list[Call]:
    found = re.findall(r"to=functions\.([\w.-]+)(.*?)(?=<\|call\|>|\Z)", text, re.DOTALL)
    calls = []
    for name, rest in found:
        _, has_message, arguments = rest.partition("<|message|>")
        if not has_message:
            raise MalformedCall(f"a call of {name} has no <|message|>")
        calls.append(_call({"name": name, "arguments": _from_json(arguments)}))
    return calls


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, *TOO_DEEP):
        raise MalformedCall("a call is no JSON") from None


def _call(value: Any) -> Call:
    """Of `{"name": text, "arguments" or "parameters": object}`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise MalformedCall("a call has no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise MalformedCall(f"the arguments of {value['name']} are no object")
    return value["name"], arguments


FORMATS: dict[str, Callable[[str], list[Call]]] = {
    "hermes": read_hermes,
    "llama3": read_llama3,
    "mistral": read_mistral,
    "pythonic": read_pythonic,
    "harmony": read_harmony,
}


def read_response(text: str, call_format: str | None = None) -> dict[str, Any]:
    """The message that a sampled text is.

    Args:
        call_format: of `FORMATS`; None where there are no tools. The message has `tool_calls`, as chat templates take
            them, where the text has calls, and the reason as `malformed_call` where it begins one that can't be read.
            What is thought, up to `</think>`, calls nothing.
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if call_format is None:
        return message
    _, _, said = text.rpartition("</think>")
    try:
        calls = FORMATS[call_format](said)
    except MalformedCall as error:
        return message | {"malformed_call": str(error)}
    if calls:
        message["tool_calls"] = as_tool_calls(calls)
    return message


def as_tool_calls(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """Calls as chat templates take them. Ids have the nine characters that Mistral's templates ask for."""
    return [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]


def format_of(template: ChatTemplate, ends: Iterable[str]) -> str:
    """The name of the format that a chat template writes calls in.

    Args:
        template: with tools; ends: texts that end a response.

    Raises:
        UserError: it writes none, or in a format of which there is no reader.
    """
    asked: Messages = [{"role": "user", "content": "Is there tea?"}]
    called = {"role": "assistant", "content": "", "tool_calls": as_tool_calls([PROBED])}
    fix = f"name one of {', '.join(FORMATS)} with --call_format, or give --chat_template another"
    try:
        before, prompt = template.render(asked), template.render(asked, add_generation_prompt=True)
        written = template.render([*asked, called])
    except template_errors() as error:
        raise UserError(f"the chat template refuses calls of tools: {error}; give --chat_template another") from None
    # the prompt of a response may open a thought, which a call in a written conversation need not have
    for start in (before, prompt):
        said = re.split("|".join(map(re.escape, ends)), written.removeprefix(start))[0]
        for name, read in FORMATS.items():
            try:
                if written.startswith(start) and read(said) == [PROBED]:
                    return name
            except MalformedCall:
                continue
    raise UserError(f"the chat template writes a call of a tool as {said!r}, which coati doesn't read: {fix}")
