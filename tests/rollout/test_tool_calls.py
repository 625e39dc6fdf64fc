"""Calls of tools in what a policy says: every format is read as templates write it, and nothing else is a call."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.data import prepare_tokenizer
from coati.data.templates import ChatTemplate
from coati.errors import UserError
from coati.rollout.tool_calls import FORMATS, MalformedCall, as_tool_calls, format_of, read_response
from tests.data.families import FAMILIES
from tests.rollout.test_conversation import TOOLS

NAMES = st.text("abcdef_", min_size=1, max_size=8).filter(lambda name: name not in ("if", "as", "def"))
TEXTS = st.text(max_size=20).filter(lambda text: not any(mark in text for mark in MARKS))
MARKS = ("<tool_call>", "</tool_call>", "</think>", "[TOOL_CALLS]", "<|call|>", "<|message|>", "<|python_")
VALUES = st.one_of(TEXTS, st.integers(), st.booleans(), st.lists(st.integers(), max_size=2))
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)


def write(name: str, calls) -> str:
    """The calls in a format, as models write them."""
    match name:
        case "hermes":
            objects = [json.dumps({"name": call, "arguments": given}) for call, given in calls]
            return "I look.\n" + "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "llama3":
            return "; ".join(json.dumps({"name": call, "parameters": given}) for call, given in calls)
        case "mistral":
            return "[TOOL_CALLS]" + json.dumps([{"name": call, "arguments": given} for call, given in calls])
        case "pythonic":
            calls = [f"{call}({', '.join(f'{k}={v!r}' for k, v in given.items())})" for call, given in calls]
            return f"[{', '.join(calls)}]"
        case "harmony":
            head = "<|channel|>commentary to=functions."
            return "".join(
                f"{head}{call} <|constrain|>json<|message|>{json.dumps(given)}<|call|>" for call, given in calls
            )


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(calls=CALLS)
def test_written_calls_are_read(name, calls):
    assert FORMATS[name](write(name, calls)) == calls
    message = read_response(write(name, calls), name)
    assert message["tool_calls"] == as_tool_calls(calls) and "malformed_call" not in message
    assert message["content"] == write(name, calls)
    thought = read_response(f"<think>{write(name, calls)}</think>No.", name)
    assert "tool_calls" not in thought and "malformed_call" not in thought


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(TEXTS, st.text("{}[]()\"':,;=<>/_ abftool_call0", max_size=40)))
def test_any_text_is_read_or_refused(name, text):
    """Nothing but MalformedCall is raised, and what is called has a name and arguments."""
    try:
        calls = FORMATS[name](text)
    except MalformedCall:
        return
    assert all(isinstance(call, str) and isinstance(given, dict) for call, given in calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "find", "arguments": {}}'),
        ("hermes", "<tool_call>find tea</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "find", "arguments": "tea"}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        ("llama3", '{"name": "find", "parameters": {'),
        ("llama3", '<|python_tag|>{"find"'),
        ("llama3", "<|python_tag|>find(tea)"),
        ("llama3", '{"name": "find", "parameters": {}} and {"name": "find"}'),
        ("mistral", "[TOOL_CALLS]find"),
        ("mistral", '[TOOL_CALLS]find[ARGS]{"what": '),
        ("pythonic", "[find('tea')]"),
        ("pythonic", "[find(what=tea)]"),
        ("pythonic", "[find(what='tea')"),
        ("pythonic", "[find(**{'what': 'tea'})]"),
        ("pythonic", "[find(what=__import__('os').system('id'))]"),
        ("pythonic", "[find(what=" + "(" * 1000 + ")" * 1000 + ")]"),
        ("harmony", "to=functions.find<|channel|>commentary"),
        ("harmony", "to=functions.find<|message|>tea<|call|>"),
    ],
)
def test_a_call_that_cannot_be_read_is_malformed(name, text):
    with pytest.raises(MalformedCall):
        FORMATS[name](text)
    message = read_response(text, name)
    assert message["malformed_call"] and "tool_calls" not in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "I could use find."),
        ("llama3", '{"answer": 3}'),
        ("llama3", "{tea}"),
        ("mistral", "find[ARGS]{}"),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[tea] is what I found (cold)."),
        ("harmony", "<|channel|>final<|message|>No.<|return|>"),
    ],
)
def test_what_only_looks_like_a_call_is_said(name, text):
    assert read_response(text, name) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("family", "expected"),
    {"qwen2_5": "hermes", "qwen3": "hermes", "llama3": "llama3", "mistral": "mistral", "gpt_oss": "harmony"}.items(),
)
def test_the_format_of_a_template_is_found(family, expected):
    assert format_of(template_of(family), [FAMILIES[family].eos_token]) == expected


def template_of(family: str, text: str | None = None) -> ChatTemplate:
    tokenizer = FAMILIES[family].tokenizer()
    if text is None:
        tokenizer, _ = prepare_tokenizer(tokenizer)
    else:
        tokenizer.chat_template = text
    return ChatTemplate(tokenizer, TOOLS)


def test_a_template_that_writes_no_calls_or_others_is_refused():
    with pytest.raises(UserError, match="writes a call of a tool as ''"):
        format_of(template_of("gemma3"), ["<end_of_turn>"])
    other = "{% for m in messages %}{% for call in m.tool_calls %}CALL find{% endfor %}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match=r"'CALL find', which coati doesn't read: name one of hermes, .*call_format"):
        format_of(template_of("qwen2_5", other), ["<|im_end|>"])
    refuses = "{% for m in messages %}{{ raise_exception('no tools') if m.tool_calls }}{% endfor %}"
    with pytest.raises(UserError, match="refuses calls of tools: no tools"):
        format_of(template_of("qwen2_5", refuses), ["<|im_end|>"])
