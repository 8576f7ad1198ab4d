"""A real HTTP server that answers as an OpenAI-compatible endpoint does, by words of the text that it is asked about."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Endpoint(ThreadingHTTPServer):
    """Serves from a thread of its own while `up` lasts."""

    @contextmanager
    def up(self) -> Iterator[Self]:
        with self:
            thread = threading.Thread(target=self.serve_forever, daemon=True)
            thread.start()
            yield self
            self.shutdown()
            thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Answering(BaseHTTPRequestHandler):
    """Answers in JSON."""

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Labeller(Endpoint):
    """Chooses the letter whose words the last message holds: with logprobs 0.9 of it, 0.5 for each of two letters; no letter
    where there is no such word. Wants the key."""

    def __init__(self, key: str, letters: dict[str, list[str]]) -> None:
        self.key, self.letters = key, letters
        self.seen: list[dict[str, Any]] = []
        self.tells_logprobs = True
        self.fails_after = 1 << 30
        super().__init__(("127.0.0.1", 0), _Handler)

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        found = [letter for letter, words in self.letters.items() if any(word in text for word in words)]
        if not found:
            return {"message": {"role": "assistant", "content": "I cannot tell."}}
        said = f"{found[0]} {95 if len(found) == 1 else 40}"
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": said}}
        if self.tells_logprobs and body.get("logprobs"):
            odds = dict.fromkeys(self.letters, 0.1) | dict.fromkeys(found, 0.9 if len(found) == 1 else 0.5)
            top = [{"token": f" {letter}", "logprob": math.log(p)} for letter, p in odds.items()]
            choice["logprobs"] = {"content": [{"token": found[0], "top_logprobs": top}]}
        return choice


class _Handler(Answering):
    server: Labeller

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {self.server.key}":
            return self.answer(401, {"error": {"message": "no"}})
        self.server.seen.append(body)
        if len(self.server.seen) > self.server.fails_after:
            return self.answer(404, {"error": {"message": "gone"}})
        return self.answer(200, {"choices": [self.server.choice(body)]})
