"""`coati chat` through a pipe. The picture of docs/serving.md is drawn here: COATI_WRITE_PICTURES=1."""

import io
import json
import os
import re
from html import unescape

import pytest
from rich.console import CONSOLE_SVG_FORMAT, Console

from coati.cli import main
from coati.data import parse_record
from coati.errors import UserError
from coati.serve.chat import Chat, check_sampling, columns, visible
from coati.serve.protocol import Choice, Wanted
from coati.serve.worker import Failure
from tests.conftest import ROOT


class Repeating:
    """Stands in for a worker: says how many messages it has read, and the last one."""

    def __init__(self, name: str):
        self.name = name
        self.seeds = []

    def chat_prompt(self, messages):
        return messages

    def streams(self, messages, wanted, emit):
        self.seeds.append(wanted.seed)
        self.emit, self.said = emit, f"{self.name} {len(messages)}: {messages[-1]['content']}"
        return ["stream"]

    def submit(self, streams):
        if "fail" in self.said:
            self.emit(Failure("out of words"))
            return
        self.emit(Choice(0, self.said[:3]))
        self.emit(Choice(0, self.said[3:], [], "stop"))

    def cancel(self, streams):
        pass


def chat(lines: str, names=("one",), **options) -> tuple[Chat, list[str]]:
    """A chat after some lines, and all that it has shown."""
    shown = []

    def display(labels, texts):
        *_, last = texts
        shown.extend(f"{label}: {text}" for label, text in zip(labels, last, strict=True))
        return last

    talk = Chat([Repeating(name) for name in names], Wanted("", seed=7), shown.append, display, **options)
    talk.run(iter(lines.splitlines()))
    return talk, shown


def test_a_conversation_goes_on_and_is_taken_back():
    talk, shown = chat("Hi.\n\nMore.\n/undo\nElse.\n/retry\n/exit\nnever read", system="Be brief.")
    assert shown == ["one: one 2: Hi.", "one: one 4: More.", "taken back", "one: one 4: Else.", "one: one 4: Else."]
    roles = [message["role"] for message in talk.said.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert talk.workers[0].seeds == [7, 8, 9, 10]  # another one each time


def test_what_cannot_be_done_is_said_and_the_chat_goes_on(tmp_path):
    lines = "/undo\n/retry\n/a\n/nothing\n/save\n/save x\n/set top_k 3\n/set top_p 3\n/set top_p x\nfail\n"
    talk, shown = chat(lines + f"Hi.\n/save {tmp_path / 'none' / 'x'}")
    assert len([line for line in shown if line.startswith("error: ")]) == 11 and shown[-2] == "one: one 1: Hi."
    assert "there is no /nothing" in shown[3] and "out of words" in shown[9] and "can't be written" in shown[-1]
    assert len(talk.said.messages) == 2


def test_settings_are_changed():
    talk, shown = chat("/set temperature 0\n/set max_tokens 5\n/help")
    assert (talk.wanted.temperature, talk.wanted.max_tokens) == (0, 5) and "/retry" in shown[-1]
    with pytest.raises(UserError, match="temperature 3 is not between"):
        check_sampling({"temperature": 3, "top_p": None})


def test_a_saved_conversation_is_a_row_of_sft_data(tmp_path):
    chat(f"Hi.\n/save {tmp_path / 'rows.jsonl'}\nMore.\n/save {tmp_path / 'rows.jsonl'}", system="Be brief.")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    records = [parse_record(row, "sft")[0] for row in rows]
    assert [len(record.messages) for record in records] == [3, 5]
    assert records[1].messages[-1] == {"role": "assistant", "content": "one 4: More."}


def test_a_vote_is_a_row_of_preference_data_and_the_conversation_goes_on_from_it(tmp_path):
    votes = tmp_path / "votes.jsonl"
    _, shown = chat("Hi.\nMore.\n/b\nMore.\n/tie\nElse.\n/a", ("one", "two"), votes=votes)
    assert shown[0] == "A (one): one 1: Hi." and "say /a, /b or /tie first" in shown[3]
    assert shown[-1] == "votes: one 1, two 1, ties 1"
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    first, second = (parse_record(row, "preference")[0] for row in rows)
    assert first.prompt == [{"role": "user", "content": "Hi."}]
    assert (first.chosen[0]["content"], first.rejected[0]["content"]) == ("two 1: Hi.", "one 1: Hi.")
    assert (rows[0]["chosen_model"], rows[0]["rejected_model"]) == ("two", "one")
    contents = [message["content"] for message in second.prompt]
    assert contents == ["Hi.", "two 1: Hi.", "More.", "one 3: More.", "Else."]


def test_a_blind_vote_tells_nothing_before_and_counts_for_the_right_model(tmp_path):
    votes = tmp_path / "votes.jsonl"
    talk, shown = chat("Hi.\n/a\n" * 12, ("one", "two"), blind=True, votes=votes)
    labels = [line.partition(": ")[0] for line in shown if line.endswith("Hi.")]
    assert set(labels) == {"A", "B"}
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for row in rows:
        assert row["chosen"][0]["content"].startswith(row["chosen_model"])
        assert row["rejected"][0]["content"].startswith(row["rejected_model"])
    won = [row["chosen_model"] for row in rows]
    assert {won.count("one"), won.count("two")} != {0, 12}  # both have been A
    assert talk.said.wins == [won.count("one"), won.count("two")]
    assert sum("A was one, B was two" in line for line in shown) == won.count("one")


def test_undo_takes_back_what_waits_for_a_vote():
    talk, _ = chat("Hi.\n/undo\nElse.\n/retry\n/b", ("one", "two"))
    assert [message["content"] for message in talk.said.messages] == ["Else.", "two 1: Else."]


def test_a_response_cannot_command_the_terminal():
    assert visible("a\x1b[2Jb\r\n\tc\x07é") == "a\ufffd[2Jb\ufffd\n\tc\ufffdé"


def test_through_a_pipe(tiny_world, capsys, monkeypatch, tmp_path):
    """Real models, started as they are by the command."""
    saved = tmp_path / "saved.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"red lamp\n/save {saved}\n"))
    assert main(["chat", tiny_world["policy"], "--max_tokens", "6", "--temperature", "0"]) == 0
    [row] = map(json.loads, saved.read_text().splitlines())
    shown = capsys.readouterr().out
    assert shown == f"{visible(row['messages'][1]['content'])}\nsaved to {saved}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("red lamp\n/b\n"))
    models = [tiny_world["policy"], f"other={tiny_world['teacher']}"]
    assert main(["chat", *models, "--max_tokens", "6", "--save_votes", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "A (policy): " in shown and "B (other): " in shown and "votes: policy 0, other 1, ties 0" in shown
    assert json.loads(saved.read_text().splitlines()[1])["chosen_model"] == "other"


REPLIES = {
    "Is the red lamp in stock?": (
        "Yes, ten of them are left, and they ship today. Shall I set one aside for you?",
        "There should be some. Please look at the page of the lamp.",
    ),
    "Until Friday, please.": (
        "It is yours until Friday at six. You find it under your name at the counter.",
        "Thank you for your message! Is there anything else?",
    ),
}


class Replying(Repeating):
    """Says what `REPLIES` has for the last message."""

    def streams(self, messages, wanted, emit):
        self.emit, self.said = emit, REPLIES[messages[-1]["content"]][self.name == "sft"]
        return ["stream"]


def test_the_picture_in_the_docs_shows_the_current_chat():
    """Its texts: what rich makes of them is rich's."""
    terminal = Console(record=True, width=88, file=io.StringIO(), highlight=False, force_terminal=True)

    def display(labels, texts):
        *_, whole = texts
        terminal.print(columns(labels, whole))
        return whole

    talk = Chat([Replying("ppo"), Replying("sft")], Wanted("", seed=2), terminal.out, display, blind=True)

    def typed():
        first, second = REPLIES
        for line in (first, "/b", second, "/b", "/exit"):
            terminal.out(f"> {line}")
            yield line

    talk.run(typed())
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # they'd be downloaded
    picture = terminal.export_svg(title="coati chat ppo sft --blind", code_format=without_fonts)
    path = ROOT / "docs" / "chat.svg"
    if "COATI_WRITE_PICTURES" in os.environ:
        path.write_text(picture, encoding="utf-8")
    assert words_in(path.read_text(encoding="utf-8")) == words_in(picture), "COATI_WRITE_PICTURES=1 draws it again"
    assert "was ppo" in words_in(picture) and not re.search(r"url\((?!#)", picture)


def words_in(svg: str) -> str:
    return " ".join(unescape(" ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg))).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c"], "takes one model or two, not 3"),
        (["a", "--blind"], "--blind and --save_votes compare models"),
        (["a", "--top_p", "2"], "top_p 2 is not between"),
        (["/nowhere"], "/nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, capsys):
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err
