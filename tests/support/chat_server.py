"""A real HTTP server on this machine that speaks OpenAI's protocol for chats, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, int], tuple[int, Any]]
"""Of a question and how many came before it: the status, and the reply's text, or bytes as they
are."""


class Server:
    """What was asked, and how many were asked at once at most."""

    def __init__(self, answer: Answer, pause_s: float) -> None:
        self.answer, self.pause_s = answer, pause_s
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.endpoint = ""

    def reply(self, body: dict[str, Any], key: str | None) -> tuple[int, bytes]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            number = len(self.asked)
            self.asked.append(body)
            self.keys.add(key)
        time.sleep(self.pause_s)
        status, said = self.answer(body["messages"][0]["content"], number)
        with self.lock:
            self.now -= 1
        if isinstance(said, bytes):
            return status, said
        choice = {"index": 0, "message": {"role": "assistant", "content": said}}
        return status, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@contextmanager
def serving(answer: Answer, pause_s: float = 0) -> Iterator[Server]:
    server = Server(answer, pause_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = server.reply(body, self.headers["Authorization"])
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # The client did not wait.

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.endpoint = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
