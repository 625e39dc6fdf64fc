"""Environments around libraries: gymnasium's, a search by BM25, and the tools of an MCP server."""

import json
import subprocess
import sys

import pytest

from coati.environments import mcp_guard
from coati.environments.mcp_guard import PASSED_ON
from coati.errors import UserError
from coati.rollout import describe_tools
from tests.rollout.test_episodes import play
from tests.rollout.test_tools import call, played, results

SERVER = '''
import sys
from mcp.server import MCPServer

server = MCPServer("shop")


@server.tool()
def price(item: str) -> int:
    """What an item costs."""
    return {"tea": 3}[item]


@server.tool()
def leave() -> str:
    """Ends the server."""
    import os
    os._exit(1)


@server.tool()
def flood(length: int) -> str:
    """Prints very much, and returns so much."""
    for _ in range(2000):
        print("y" * 32767)
    return "x" * length


server.run("stdio")
'''


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    pytest.importorskip("mcp")
    from coati.environments.mcp import MCPTools

    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SERVER)
    return type("Shop", (MCPTools,), {"command": (sys.executable, str(path))})


def test_the_tools_of_an_mcp_server_are_described_and_called(shop, tokenizer):
    described = {tool["function"]["name"]: tool["function"] for tool in describe_tools(shop)}
    assert set(described) == {"price", "leave", "flood"} and described["price"]["description"] == "What an item costs."
    assert described["price"]["parameters"]["properties"]["item"]["type"] == "string"
    texts = call("price", item="tea"), call("price", item="milk"), "3"
    sample = played(tokenizer, shop, *texts, rows=[{"question": "What does tea cost?"}])
    first, second = results(sample)
    assert first == "3" and second.startswith("error: ") and sample.finish_reason == "done"
    assert sample.metrics == {"tool_calls": 2, "tool_errors": 1, "malformed_calls": 0}
    left = played(tokenizer, shop, call("leave"), "ok", rows=[{"question": "?"}])
    assert results(left)[0].startswith("error: ") and left.metrics["tool_errors"] == 1


def test_an_mcp_server_that_writes_very_much_is_ended_or_goes_on(shop, tokenizer):
    rows = [{"question": "?"}]
    prints = played(tokenizer, shop, call("flood", length=4), call("price", item="tea"), "ok", rows=rows)
    assert results(prints) == ["xxxx", "3"]
    returns = played(tokenizer, shop, call("flood", length=5 << 20), "ok", rows=rows)
    assert results(returns)[0].startswith("error: ") and returns.metrics["tool_errors"] == 1


@pytest.mark.parametrize("ends", [True, False])
def test_of_what_a_server_writes_messages_come_through_and_a_little_else(ends):
    program = "for _ in range(100): print('x' * 9999)\n" if ends else "print('x' * 1000000)\n"
    server = [sys.executable, "-c", "print('{1}')\n" + program + "print('{2}')"]
    done = subprocess.run([sys.executable, mcp_guard.__file__, "10000", *server], capture_output=True, text=True)
    assert done.stdout == ("{1}\n{2}\n" if ends else "{1}\n")
    assert done.stderr.count("x") == (PASSED_ON - PASSED_ON // 10000 if ends else 0)
    assert ("more than 10000 bytes" in done.stderr) == (not ends) == (done.returncode != 0)


def test_an_mcp_server_that_does_not_start_is_named(shop):
    from coati.environments.mcp import MCPTools

    missing = type("Missing", (MCPTools,), {"command": ("no-such-server", "--now")})
    with pytest.raises(UserError, match="MCP server 'no-such-server --now' lists no tools"):
        describe_tools(missing)


def test_a_gymnasium_environment_is_walked_through(tokenizer):
    pytest.importorskip("gymnasium")
    from coati.environments.gymnasium import Gymnasium

    lake = {"name": "FrozenLake-v1", "task": "Walk from S to G.", "options": {"is_slippery": False}}
    walk = ("1", "1", "up", "9", "2", "2", "1", "2")
    [sample], _ = play(
        tokenizer, type("Lake", (Gymnasium,), lake), *walk, rows=[{"seed": 1}], max_turns=len(walk), max_tokens=2000
    )
    assert sample.finish_reason == "done" and sample.score == 1.0
    told = [message["content"] for message in sample.messages if message["role"] == "user"]
    assert told == ["Walk from S to G.\n\n0", "4", "8", *["This is no action."] * 2, "9", "10", "14"]


def test_a_drawn_environment_is_read_as_it_is_drawn(tokenizer):
    pytest.importorskip("gymnasium")
    from coati.environments.gymnasium import Gymnasium

    drawn = {"name": "FrozenLake-v1", "options": {"is_slippery": False, "render_mode": "ansi"}}
    [sample], _ = play(
        tokenizer, type("Drawn", (Gymnasium,), drawn), "1", rows=[{"seed": 1}], max_turns=1, max_tokens=2000
    )
    assert "SFFF\nFHFH" in sample.messages[0]["content"].replace("\x1b[41mS\x1b[0m", "S")

    pendulum = type("Pendulum", (Gymnasium,), {"name": "Pendulum-v1"})
    with pytest.raises(UserError, match=r"actions of Pendulum-v1 are Box.*override `action`"):
        play(tokenizer, pendulum, "1", rows=[{"seed": 1}])


def test_a_search_finds_the_texts_with_the_words(tokenizer, tmp_path):
    pytest.importorskip("bm25s")
    from coati.environments.search import Search

    texts = ["Tea comes from China.", "Coffee is brewed from beans.", "Milk is white.", "Beans grow on coffee plants."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    library = type("Library", (Search,), {"corpus": path, "results": 2})
    said = call("search", query="coffee beans"), call("search", query="zebra"), "ok"
    sample = played(tokenizer, library, *said, rows=[{"question": "?"}])
    found, nothing = map(json.loads, results(sample))
    assert set(found) == {texts[1], texts[3]} and nothing == []
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(UserError, match="line 2: no object with a `text`"):
        type("Other", (Search,), {"corpus": path})()


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'coati[verify]'")


def test_a_task_of_reasoning_gym_is_solved_in_as_many_attempts_as_there_are(gym, tokenizer):
    from coati.environments.reasoning_gym import ReasoningGym

    made = {"task": "chain_sum", "seed": 3, "options": {"min_terms": 2, "max_terms": 2}, "attempts": 3}
    entry = json.loads(json.dumps(gym.create_dataset("chain_sum", size=1, seed=3, min_terms=2, max_terms=2)[0]))
    right = f"It's <answer>{entry['answer']}</answer>"
    for row in (made, {**entry, "attempts": 3}):
        [sample], _ = play(tokenizer, ReasoningGym, "no idea", right, "never", rows=[row], max_turns=3, max_tokens=999)
        assert sample.messages[0]["content"] == entry["question"] and sample.finish_reason == "done"
        assert sample.score == 1 and sample.metrics == {"attempts": 2, "solved": 1}
    [wrong], _ = play(tokenizer, ReasoningGym, "no idea", rows=[made], max_turns=3, max_tokens=999)
    assert wrong.finish_reason == "done" and wrong.score < 1 and wrong.metrics == {"attempts": 3, "solved": 0}
    [single], _ = play(tokenizer, ReasoningGym, "no idea", right, rows=[entry], max_turns=3, max_tokens=999)
    assert len(single.turns) == 1 and single.score < 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "chain_sum"}, "this one has task"),
        ({"task": "no_such", "seed": 1}, "makes no task 'no_such'"),
        ({"task": "chain_sum", "seed": 1, "options": {"size_of": 2}}, "makes no task 'chain_sum' of these options"),
        ({"task": "countdown", "seed": 1}, "allow_code_execution"),
        ({"question": "1 + 1?"}, "source_dataset"),
    ],
)
def test_a_row_that_is_no_task_of_reasoning_gym_is_refused(row, message, gym):
    from coati.environments.reasoning_gym import ReasoningGym

    with pytest.raises(UserError, match=message):
        ReasoningGym().reset(row)


def test_the_answer_of_a_message_is_found():
    pytest.importorskip("reasoning_gym")
    from coati.environments.reasoning_gym import stated

    assert stated("<think><answer>1</answer></think> 2 ") == "2"
    assert stated("<answer>1</answer> or <answer> 2 </answer> perhaps") == "2"
    assert stated("<answer>3") == "3"
