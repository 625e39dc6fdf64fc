"""`coati play`: a person or a model plays an episode on the terminal."""

import io

import pytest

from coati.cli import main
from tests.conftest import ROOT

TALK = f"{ROOT / 'tests' / 'talk.py'}:Talk"


def played(capsys, monkeypatch, said: str, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    status = main(["play", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"secret": 3}\n{"secret": 7, "question": "What is 2 + 3?", "prompt": "hello"}\n[1]\n{\n')
    return path


def test_a_person_plays(rows, capsys, monkeypatch):
    place = "coati.environments.guess_the_number:GuessTheNumber"
    status, shown, _ = played(capsys, monkeypatch, "8\nwhat\n7\n", place, "--rows", rows, "--row", 1)
    assert status == 0
    assert shown.splitlines() == [
        "user      Guess a number from 1 to 16.",
        "assistant reward    0  won 0",
        "user      Lower.",
        "assistant reward    0  won 0",
        "user      Say one number from 1 to 16.",
        "assistant reward    1  won 1",
        "done      rewards of 1 in all",
    ]
    _, shown, _ = played(capsys, monkeypatch, "8\n", place, "--rows", rows, "--max_turns", 1)
    assert shown.splitlines()[-1] == "end       after 1 turns (--max_turns), rewards of 0 in all"
    status, shown, _ = played(capsys, monkeypatch, "", place, "--rows", rows)
    assert status == 0 and shown.splitlines()[-1] == "left"


def test_a_person_calls_tools(rows, capsys, monkeypatch):
    said = "[calculate(expression='2 + 3')]\n[calculate(2)]\n5\n"
    place = "coati.environments.calculator:Calculator"
    _, shown, _ = played(capsys, monkeypatch, said, place, "--rows", rows, "--row", 1)
    lines = shown.splitlines()
    assert lines[0].startswith("tool      calculate(expression): Calculates with")
    assert "tool      5" in lines and lines[-1] == "done      rewards of 0 in all"
    assert lines[-2] == "assistant reward    0  tool_calls 1  tool_errors 0  malformed_calls 1"


def test_a_model_plays(rows, tiny_world, capsys, monkeypatch):
    arguments = [TALK, "--rows", rows, "--row", 1, "--model", tiny_world["policy"], "--max_new_tokens", 8]
    status, shown, _ = played(capsys, monkeypatch, "", *arguments)
    lines = shown.splitlines()
    assert status == 0 and lines[0] == "user      hello"
    assert any(line.startswith("reward    0, 8 tokens, mean log-prob -") for line in lines)
    assert lines[-1].startswith(("length    rewards of", "done      rewards of"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coati.environments.guess_the_number:GuessTheNumber"], "failed: KeyError('secret')"),
        (["coati.environments.guess_the_number:answer"], "is no class"),
        ([TALK, "--rows", "missing.jsonl"], "missing.jsonl can't be read: No such file"),
        ([TALK, "--rows", "ROWS", "--row", 4], "has no row 4: there are 4, counted from 0"),
        ([TALK, "--rows", "ROWS", "--row", 3], "row 3: Expecting property name"),
        ([TALK, "--rows", "ROWS", "--row", 2], "row 2 is no object"),
        ([TALK, "--rows", "ROWS", "--max_turns", 0], "max_turns"),
    ],
)
def test_mistakes_are_one_line(arguments, message, rows, capsys, monkeypatch):
    arguments = [rows if argument == "ROWS" else argument for argument in arguments]
    status, _, told = played(capsys, monkeypatch, "", *arguments)
    assert status == 2 and message in told and len(told.splitlines()) == 1
