"""An OpenAI-compatible endpoint in this process that says what a test wants."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """Answers a chat with what `reply(text, count)` gives for the last message's text, which came `count` times before:
    a reply's text, or (status, body, headers).

    Attributes:
        asked: the requests, in order; heard: the texts of their last messages.
        busy, busiest: requests that are being answered now, and the most at a time.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that wait, of a machine that is busy

    def __init__(self, reply: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked, self.heard, self.busy, self.busiest = [], [], 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][-1]["content"]
        with server.lock:
            count = server.heard.count(text)
            server.asked.append(asked)
            server.heard.append(text)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        found = server.reply(text, count)
        status, body, headers = found if isinstance(found, tuple) else (200, completion(found), {})
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *words):
        """Not to the terminal."""


def completion(text: str | None, finish_reason: str = "stop") -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


@contextmanager
def serving(reply: Callable):
    """A server for the block."""
    with JudgeServer(reply) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
