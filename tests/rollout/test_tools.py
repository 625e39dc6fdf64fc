"""Environments whose methods are tools: what the policy is told of them, what it reads, and what is counted."""

import asyncio
import json

import pytest

from coati.data import prepare_tokenizer
from coati.environments.calculator import Calculator
from coati.environments.python import PythonTool
from coati.errors import UserError
from coati.rollout import Observation, describe_tools, has_tools
from coati.rollout.conversation import ConversationRenderer, check_conversations
from tests.data.families import FAMILIES
from tests.rewards.test_sandbox import available
from tests.rollout.test_episodes import parts, play


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Shop:
    """Sells tea; its tools misbehave in every way."""

    closed = 0

    def reset(self, row):
        self.row = row
        return "What does tea cost?"

    async def price(self, item: str, count: int = 1) -> int:
        """What an item costs.

        Args:
            item: its name
            count: how many
        """
        await asyncio.sleep(0)
        return {"tea": 3}[item] * count

    def story(self) -> str:
        """A long one."""
        return "x" * 50

    def buy(self, item: str):
        """Buys an item.

        Args:
            item: its name
        """
        return Observation(f"Here is your {item}.", reward=0.5, done=item == "tea", metrics={"bought": 1.0})

    def hang(self):
        """Waits forever."""
        import time

        time.sleep(30)

    def leave(self):
        """Ends the process."""
        raise SystemExit(3)

    def pair(self):
        """Returns messages."""
        return Observation([{"role": "user", "content": "no"}])

    def _secret(self):
        return "secret"

    async def close(self):
        Shop.closed += 1


class Graded(Shop):
    def answer(self, message):
        if message["content"] == "3":
            return Observation(reward=1.0, done=True)
        return Observation("Look again.")


def played(tokenizer, environment, *texts, rows=({},), **limits):
    limits = {"max_tokens": 4096, "max_turns": len(texts)} | limits
    tools = describe_tools(environment)
    renderer = ConversationRenderer(tokenizer, [tokenizer.eos_token_id], tools=tools)
    [sample], _ = play(tokenizer, environment, *texts, rows=rows, renderer=renderer, call_format="hermes", **limits)
    return sample


def results(sample) -> list[str]:
    return [message["content"] for message in sample.messages if message["role"] == "tool"]


def test_methods_are_described_by_their_hints_and_docstrings():
    described = {tool["function"]["name"]: tool["function"] for tool in describe_tools(Shop)}
    assert list(described) == ["buy", "hang", "leave", "pair", "price", "story"]
    assert described["price"]["description"] == "What an item costs."
    assert described["price"]["parameters"] == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "its name"},
            "count": {"type": "integer", "description": "how many"},
        },
        "required": ["item"],
    }
    assert has_tools(Shop) and not has_tools(type("Steps", (), {"step": lambda self: None}))


class Undescribed:
    def reset(self, row): ...

    def look(self, where: str):
        """Looks."""


class Bare:
    def reset(self, row): ...


def test_a_tool_without_a_description_is_refused():
    with pytest.raises(UserError, match=r"Undescribed: .*'where'.*begin its name with an underscore"):
        describe_tools(Undescribed)
    with pytest.raises(UserError, match="no method step, and no public method as a tool"):
        describe_tools(Bare)


def test_the_policy_calls_reads_and_answers(tokenizer):
    sample = played(tokenizer, Graded, call("price", item="tea"), "4", "3")
    assert sample.finish_reason == "done" and sample.score == 1.0 and results(sample) == ["3"]
    assert parts(tokenizer, sample, True) == f"|{call('price', item='tea')}<|im_end|>|4<|im_end|>|3<|im_end|>"
    read = parts(tokenizer, sample, False)
    assert "<tools>" in read and "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>" in read
    assert sample.metrics == {"tool_calls": 1, "tool_errors": 0, "malformed_calls": 0}
    assert [message["role"] for message in sample.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    before = Shop.closed
    played(tokenizer, Shop, "3")
    assert Shop.closed == before + 1


def test_without_an_answer_method_a_message_without_calls_ends_the_episode(tokenizer):
    sample = played(tokenizer, Shop, "3", max_turns=4)
    assert sample.finish_reason == "done" and len(sample.turns) == 1 and sample.response == "3"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (call("price", item="milk"), "error: KeyError: 'milk'"),
        (call("price"), "error: item: Missing required argument"),
        (call("price", item="tea", count="two"), "error: count: Input should be a valid integer"),
        (call("price", item="tea", size=3), "error: size: Unexpected keyword argument"),
        (call("price", item="tea", count="2"), "6"),
        (call("reset", row={}), "error: LookupError: no tool is called reset, there are buy, hang"),
        (call("_secret"), "error: LookupError: no tool is called _secret"),
        (call("__class__"), "error: LookupError"),
        (call("story"), "xxxxxxxxxx ... (cut, 50 characters in all)"),
    ],
)
def test_errors_are_read_by_the_policy(text, told, tokenizer):
    sample = played(tokenizer, Shop, text, "ok", max_turns=2, max_result_characters=10 if "story" in text else 400)
    assert sample.finish_reason == "done"
    [result] = results(sample)
    assert result.startswith(told)
    assert sample.metrics["tool_errors"] == float(told.startswith("error")) and sample.metrics["tool_calls"] == 1


def test_a_call_that_cannot_be_read_is_told_and_counted(tokenizer):
    sample = played(tokenizer, Shop, "<tool_call>tea</tool_call>", "ok")
    assert sample.messages[2] == {"role": "user", "content": "error: a call is no JSON"}
    assert sample.metrics == {"tool_calls": 0, "tool_errors": 0, "malformed_calls": 1}


def test_several_calls_of_a_message_are_made_in_order_up_to_the_one_that_ends(tokenizer):
    text = call("buy", item="milk") + call("price", item="tea") + call("buy", item="tea") + call("story")
    sample = played(tokenizer, Shop, text)
    assert sample.finish_reason == "done" and sample.score == 1.0
    assert sample.metrics == {"tool_calls": 3, "tool_errors": 0, "malformed_calls": 0, "bought": 1.0}


@pytest.mark.parametrize(
    ("name", "reason"), [("hang", "no result within 0.2 s"), ("leave", r"SystemExit\(3\)"), ("pair", "not a text")]
)
def test_what_hangs_exits_or_returns_something_else_fails_the_episode(name, reason, tokenizer):
    with pytest.raises(UserError, match=reason):  # the only one
        played(tokenizer, Shop, call(name), "ok", timeout=0.2)


class Flood(Shop):
    def story(self) -> str:
        """A very long one."""
        return "x" * 10_000_000


def test_a_result_that_cannot_fit_ends_the_episode_before_it_is_tokenized(tokenizer):
    sample = played(tokenizer, Flood, call("story"), "ok", max_result_characters=10**9, max_tokens=1200)
    assert sample.finish_reason == "length" and len(sample.turns) == 1


def test_a_template_without_room_for_results_is_refused_at_the_start():
    tokenizer = FAMILIES["qwen2_5"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' }}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    renderer = ConversationRenderer(tokenizer, [tokenizer.eos_token_id], tools=describe_tools(Calculator))
    with pytest.raises(UserError, match="refuses a conversation of user, assistant, tool: no tools"):
        check_conversations(renderer)


def test_what_the_template_refuses_fails_one_episode():
    """Llama 3's takes one call per message; a policy may make two."""
    other, _ = prepare_tokenizer(FAMILIES["llama3"].tokenizer())
    renderer = ConversationRenderer(other, [other.eos_token_id], tools=describe_tools(Shop))
    two = '{"name": "story", "parameters": {}}; {"name": "story", "parameters": {}}'
    limits = dict(max_tokens=4096, max_turns=2)
    with pytest.raises(UserError, match="refuses a conversation of user, assistant, tool, tool"):
        play(other, Shop, two, "ok", renderer=renderer, call_format="llama3", **limits)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("12 * (3 + 4)", "84"),
        ("7/2", "7/2"),
        ("-3 + +1", "-2"),
        ("0.1 + 0.2", "3/10"),
        ("1/0", "error: ZeroDivisionError"),
        ("2**9999999", "error: ValueError: only numbers"),
        ("__import__('os')", "error: ValueError: only numbers"),
        ("'a'*9", "error: ValueError: only numbers"),
        ("1 +", "error: ValueError: this is no expression"),
        ("9" * 201, "error: ValueError: the expression has more"),
        ("True + 1", "error: ValueError: only numbers"),
    ],
)
def test_the_calculator_is_exact_and_calculates_nothing_else(expression, expected, tokenizer):
    sample = played(tokenizer, Calculator, call("calculate", expression=expression), "ok", rows=[{"question": "?"}])
    assert results(sample)[0].startswith(expected)


@pytest.mark.skipif(not available(), reason="this machine can't isolate programs")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(6 * 7)", "42\n"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", ""),
        ("for _ in range(2000): print('x' * 32768)", "xxxx ... (cut, 65536 characters in all)"),
    ],
)
def test_a_program_runs_in_the_sandbox(program, expected, tokenizer):
    sample = played(tokenizer, PythonTool, call("python", program=program), "ok", rows=[{"question": "?"}])
    assert expected in results(sample)[0] and sample.metrics["tool_errors"] == 0
