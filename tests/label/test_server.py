"""A real server process: killed between clicks and during them, and with clients that are slow."""

import json
import random
import socket
import threading
import uuid
from urllib.parse import urlsplit

import httpx
import pytest

from coati.cli import main
from coati.label.store import Store
from tests.label.serving import served


@pytest.fixture
def place(tmp_path):
    """A folder with a file of 400 items."""
    rows = [
        {"prompt": f"prompt {i}", "responses": [{"text": f"{name} {i}", "model": name} for name in ("one", "two")]}
        for i in range(400)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Annotator:
    """A page without a screen: it sends a click until it hears that it is kept."""

    def __init__(self):
        self.kept = {}  # by shown pair: the choice that was acknowledged
        self.waiting = None  # a click without an acknowledgment

    def work(self, link: str, clicks: int, client: httpx.Client) -> None:
        """Raises `httpx.HTTPError` when the server is gone."""
        state = client.post(link + "next").raise_for_status().json()
        for _ in range(clicks):
            if self.waiting is None:
                choice = random.choice(["a", "b", "tie", "both_bad"])
                self.waiting = {"id": uuid.uuid4().hex, "shown": state["pair"]["id"], "choice": choice}
            state = client.post(link + "label", json=self.waiting).raise_for_status().json()
            assert self.waiting["shown"] not in self.kept
            self.kept[self.waiting["shown"]] = self.waiting["choice"]
            self.waiting = None


def kill_and_compare(place, kills: int):
    labels, errors, annotator = place / "labels.sqlite", place / "errors.txt", Annotator()
    words = [place / "items.jsonl", "--labels", labels, "--people", "ana"]
    for number in range(kills):
        with served(*words, errors=errors) as (process, links), httpx.Client(timeout=60) as client:
            words = ["--labels", labels]
            annotator.work(links["ana"], 3, client)
            if number % 2 == 0:
                process.kill()  # between two clicks
                continue
            killer = threading.Timer(random.random() * 0.02, process.kill)  # during one of them
            killer.start()
            with pytest.raises(httpx.HTTPError):
                annotator.work(links["ana"], 100_000, client)
            killer.join()
    with served(*words, errors=errors) as (_, links), httpx.Client(timeout=60) as client:
        annotator.work(links["ana"], 1, client)
        assert annotator.waiting is None
        progress = client.post(links["ana"] + "next").json()["progress"]
    with Store.open(labels).connection() as db:
        rows = db.execute("SELECT shown, choice FROM labels").fetchall()
    assert {row["shown"]: row["choice"] for row in rows} == annotator.kept
    assert len(rows) == len(annotator.kept) == progress["yours"] > 3 * kills
    assert "Traceback" not in errors.read_text()


def test_no_click_is_lost_or_kept_twice_by_kills(place):
    kill_and_compare(place, 5)


@pytest.mark.slow
def test_no_click_is_lost_or_kept_twice_by_fifty_kills(place):
    kill_and_compare(place, 50)


def test_clients_that_send_half_a_request_stall_nobody(place):
    words = [place / "items.jsonl", "--labels", place / "labels.sqlite", "--people", "ana", "ben"]
    with served(*words, errors=place / "errors.txt") as (_, links):
        where = urlsplit(links["ben"])
        halves = [
            f"POST {where.path}label HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{",
            f"POST {where.path}label HTTP/1.1\r\nHo",
        ]
        slow = []
        for half in halves * 50:
            connection = socket.create_connection((where.hostname, where.port))
            connection.sendall(half.encode())
            slow.append(connection)
        with httpx.Client(timeout=60) as client:
            Annotator().work(links["ana"], 5, client)
        for connection in slow:
            connection.close()


def test_what_the_command_says(place, capsys):
    """Mistakes are one line, found before anything is served."""
    labels = str(place / "labels.sqlite")
    items, same = str(place / "items.jsonl"), str(place / "same.jsonl")
    (place / "same.jsonl").write_text('{"prompt": "a", "responses": ["b", "b"]}\n')
    (place / "empty.jsonl").write_text("")
    mistakes = {
        "nobody has a link": ["label", items, "--labels", labels],
        "there is no file": ["label", "--labels", str(place / "none.sqlite"), "--people", "ana"],
        "has no pairs": ["label", same, "--labels", str(place / "same.sqlite"), "--people", "ana"],
        "no prompt has two": ["label", str(place / "empty.jsonl"), "--labels", labels, "--people", "ana"],
        "not both": ["label", items, "--from", "A=x", "--labels", labels],
        "write MODEL=FILE.jsonl": ["label", "--from", "A", "--labels", labels],
        "names the model 'A' twice": ["label", "--from", "A=x", "A=y", "--labels", labels],
        "is no file": ["label", "missing.jsonl", "--labels", labels],
        "--overlap is 0": ["label", items, "--labels", labels, "--overlap", "0"],
        "--hold_minutes": ["label", items, "--labels", labels, "--hold_minutes", "nan"],
        "--port": ["label", items, "--labels", labels, "--port", "70000"],
        "--people has": ["label", items, "--labels", labels, "--people", " "],
        "--uncertain needs": ["label", "--labels", labels, "--uncertain", items],
        "none.sqlite; coati": ["label", "export", str(place / "none.sqlite"), "--output", "x.jsonl"],
    }
    for said, arguments in mistakes.items():
        assert main(arguments) == 2, said
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    assert not (place / "none.sqlite").exists()


def test_a_port_in_use_is_said(place, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [str(place / "items.jsonl"), "--labels", str(place / "labels.sqlite"), "--people", "ana"]
        assert main(["label", *words, "--port", port]) == 2
    assert f"can't listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_responses_of_two_models_are_joined_and_the_file_continued(place):
    for name in ("a", "b"):
        rows = [{"prompt": f"prompt {i}", "response": f"{name} {i}"} for i in range(3)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--from", f"A={place / 'a.jsonl'}", f"B={place / 'b.jsonl'}", "--labels", place / "labels.sqlite"]
    with served(*words, "--people", "ana", "ben", "--overlap", 2, errors=place / "errors.txt") as (_, links):
        state = httpx.post(links["ana"] + "next", timeout=60).json()
    assert state["progress"]["wanted"] == 6
    assert sorted(state["pair"]["responses"]) == ["a 0", "b 0"]
    with served("--labels", place / "labels.sqlite", errors=place / "errors.txt") as (_, again):
        assert {name: link.split("/")[3] for name, link in again.items()} == {
            name: link.split("/")[3] for name, link in links.items()
        }
        assert httpx.post(again["ana"] + "next", timeout=60).json() == state
