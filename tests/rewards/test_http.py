"""A reward over HTTP: what is asked, what is retried, what is refused, against a server in this process."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coati.errors import UserError
from coati.rewards import HTTPReward, Scorer
from tests.rewards.samples import Constant, of_reward, samples, scored

PROMPTS, RESPONSES = ["a", "b", "c"], ["x", "yy", "zzz"]


class Server(ThreadingHTTPServer):
    """Answers by what stands in `script`, one entry per request, then with the responses' lengths. An entry is seconds
    of silence, a status, or the body of the reply."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.headers = [], [], []

    def handle_error(self, request, client_address):
        """A client that stops waiting is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers.append(self.headers)
        turn = self.server.script.pop(0) if self.server.script else {"rewards": [len(r) for r in asked["responses"]]}
        if isinstance(turn, float):
            time.sleep(turn)
        self.send_response(turn if isinstance(turn, int) else 200)
        self.end_headers()
        self.wfile.write(turn if isinstance(turn, bytes) else json.dumps(turn).encode())

    def log_message(self, *words):
        """Not to the terminal."""


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def reward(server, **options) -> HTTPReward:
    return HTTPReward(f"http://127.0.0.1:{server.server_port}/score", **{"timeout": 0.2, "wait": 0.01} | options)


def test_texts_and_plain_columns_go_out_in_batches_and_rewards_come_back(server):
    asked = samples(PROMPTS, RESPONSES, answer=["1", None, {"n": 3}], odd=[object()] * 3)
    asked[1].finish_reason = "length"
    one = reward(server, batch_size=2, headers={"Authorization": "Bearer key"})
    assert one.score(asked) == [1.0, 2.0, 3.0]
    columns = [{"answer": ["1", None], "truncated": [False, True]}, {"answer": [{"n": 3}], "truncated": [False]}]
    assert server.asked == [
        {"prompts": ["a", "b"], "responses": ["x", "yy"], "columns": columns[0]},
        {"prompts": ["c"], "responses": ["zzz"], "columns": columns[1]},
    ]
    assert server.headers[0]["Authorization"] == "Bearer key"
    assert server.headers[0]["Content-Type"] == "application/json"
    assert one.name == "127.0.0.1"


@pytest.mark.parametrize(("trouble", "says"), [(0.6, "timed out"), (500, "500"), (429, "429")])
def test_a_passing_trouble_is_retried_and_logged(trouble, says, server, caplog):
    server.script = [trouble]
    with caplog.at_level(logging.WARNING, logger="coati"):
        assert reward(server).score(samples(PROMPTS, RESPONSES)) == [1.0, 2.0, 3.0]
    [line] = [r.getMessage() for r in caplog.records]
    assert says in line and "/score" in line and "try 2 in 0.01 s" in line and "\n" not in line


@pytest.mark.parametrize(("trouble", "says"), [(0.6, "timed out"), (503, "503")])
def test_a_lasting_trouble_is_one_error_after_all_tries(trouble, says, server, caplog):
    server.script = [trouble] * 9
    with pytest.raises(UserError, match=rf"/score failed 3 times, the last with: .*{says}.*longer timeout"):
        reward(server, retries=2).score(samples(PROMPTS, RESPONSES))
    assert len(server.asked) == 3
    waits = [r.getMessage().rpartition(" in ")[2] for r in caplog.records]
    assert waits == ["0.01 s", "0.02 s"]


def test_no_server_is_an_error_after_all_tries():
    with pytest.raises(UserError, match=r"failed 2 times, the last with: .*refused"):
        HTTPReward("http://127.0.0.1:9/score", retries=1, wait=0.01).score(samples(PROMPTS, RESPONSES))


def test_a_refused_request_is_not_tried_again(server):
    server.script = [404]
    with pytest.raises(UserError, match=r"/score refused the request: .*404"):
        reward(server).score(samples(PROMPTS, RESPONSES))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"\xff",
        [1, 2, 3],
        {"scores": [1, 2, 3]},
        {"rewards": [1, 2]},
        {"rewards": [1, 2, 3, 4]},
        {"rewards": None},
        {"rewards": [1, "2", 3]},
        {"rewards": [1, True, 3]},
        {"rewards": 3},
        {"rewards": {"0": 1, "1": 2, "2": 3}},
    ],
    ids=str,
)
def test_a_bad_reply_is_an_error_at_once(body, server):
    server.script = [body]
    with pytest.raises(UserError, match=r"/score replied b.*one number for each of 3 responses"):
        reward(server).score(samples(PROMPTS, RESPONSES))
    assert len(server.asked) == 1


def test_null_from_an_endpoint_skips_the_response(server):
    """REPORT 30."""
    server.script = [{"rewards": [1.0, None, 2]}]
    found = scored(Scorer([(reward(server), 2.0), (Constant(0.5), 1.0)]), PROMPTS, RESPONSES)
    assert of_reward("127.0.0.1", found) == [1.0, None, 2] and [s.score for s in found] == [2.5, 0.5, 4.5]


def test_nan_from_an_endpoint_is_named(server):
    server.script = [{"rewards": [1.0, float("nan"), 2.0]}]
    with pytest.raises(UserError, match=r"'127.0.0.1' gave nan for the response 'yy'"):
        scored(Scorer([(reward(server), 1.0)]), PROMPTS, RESPONSES)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:80/x", "http:///score", ""])
def test_only_http_urls_are_taken(url):
    with pytest.raises(UserError, match="http:// or https://"):
        HTTPReward(url)
