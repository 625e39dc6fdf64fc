"""Token ids of conversations: what was sampled stays as it was, and what follows is what the template writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.data import prepare_tokenizer
from coati.errors import UserError
from coati.rollout.conversation import MARK, ConversationRenderer, check_conversations
from tests.data.families import FAMILIES, Refused

TOOLS = [{"type": "function", "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}}}]
TEXTS = st.text(alphabet="abcXYZ 019.,!?{}<>\n'\"éß你🙂", min_size=1, max_size=30).filter(str.strip)
RENDERERS = {}


def renderer_of(family, tools=None) -> ConversationRenderer:
    key = family.name, tools is not None
    if key not in RENDERERS:
        tokenizer, _ = prepare_tokenizer(family.tokenizer())
        RENDERERS[key] = ConversationRenderer(tokenizer, [tokenizer.eos_token_id], tools=tools)
    return RENDERERS[key]


@st.composite
def conversations(draw, with_tools: bool) -> list[dict]:
    """Messages that end with one for the policy; the responses before it may have thoughts and calls of tools."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    messages.append({"role": "user", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 3))):
        response = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.booleans()):
            response["reasoning_content"] = draw(TEXTS)
        if with_tools and draw(st.booleans()):
            function = {"name": "find", "arguments": {"what": draw(TEXTS)}}
            response["tool_calls"] = [{"id": "abcdefghi", "type": "function", "function": function}]
            response["content"] = ""
            answer = {"role": "tool", "content": draw(TEXTS), "tool_call_id": "abcdefghi"}
        else:
            answer = {"role": "user", "content": draw(TEXTS)}
        messages += [response, answer]
    return messages


def expected_between(family, messages: list[dict], i: int, tools) -> str:
    """What the family's second writer puts after the i-th message, up to the next response, without its end."""
    written = family.write(messages, tools, True)
    last = max(place for place, (_, who) in enumerate(written) if who == i)
    return "".join(text for text, _ in written[last + 1 :]).removeprefix(family.eos_token)


CASES = [(name, with_tools) for name, family in FAMILIES.items() for with_tools in (False, True)[: 1 + family.tools]]


@pytest.mark.parametrize(("name", "with_tools"), CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_tokens_after_a_response_are_those_the_template_writes(name, with_tools, data):
    compare_with_the_second_writer(name, with_tools, data)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_tools"), CASES)
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_the_tokens_after_a_response_of_a_thousand_conversations(name, with_tools, data):
    compare_with_the_second_writer(name, with_tools, data)


def compare_with_the_second_writer(name: str, with_tools: bool, data):
    """It is written in Python, and knows which text is whose."""
    family = FAMILIES[name]
    tools = TOOLS if with_tools else None
    renderer, messages = renderer_of(family, tools), data.draw(conversations(with_tools))
    [i] = [i for i, m in enumerate(messages) if m["role"] == "assistant"][-1:]
    before, response, after = messages[:i], messages[i], messages[i + 1 :]
    try:
        expected = expected_between(family, messages, i, tools)
    except Refused:
        with pytest.raises(UserError, match="refuses a conversation"):
            renderer.between(before, response, after, is_ended=True)
        return
    ids = renderer.between(before, response, after, is_ended=True)
    assert renderer.tokenizer.decode(ids) == expected
    assert ids == renderer.tokenizer(expected, add_special_tokens=False)["input_ids"]
    end, *rest = renderer.between(before, response, after, is_ended=False)
    assert rest == ids and end in renderer.tokenizer.added_tokens_decoder


REWRITES = {"qwen3", "mistral", "deepseek_r1", "deepseek_v3_1", "qwq", "gpt_oss"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_rewrites_earlier_turns_is_noticed(name):
    notes = check_conversations(renderer_of(FAMILIES[name]))
    assert bool(notes) == (name in REWRITES)


def test_a_message_that_has_the_renderers_own_mark_changes_nothing():
    renderer = renderer_of(FAMILIES["qwen2_5"])
    before = [{"role": "user", "content": f"what is {MARK}?"}]
    response, after = {"role": "assistant", "content": MARK}, [{"role": "user", "content": f"a {MARK}{MARK}"}]
    ids = renderer.between(before, response, after, is_ended=True)
    text = f"\n<|im_start|>user\na {MARK}{MARK}<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.tokenizer.decode(ids) == text


def test_a_template_that_loses_or_never_ends_responses_is_refused():
    family = FAMILIES["qwen2_5"]
    for template, what in (
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "nothing of a response"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no token that ends a response"),
    ):
        tokenizer = family.tokenizer()
        tokenizer.chat_template = template
        renderer = ConversationRenderer(tokenizer, [tokenizer.eos_token_id])
        with pytest.raises(UserError, match=what):
            check_conversations(renderer)
