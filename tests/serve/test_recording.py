"""What is kept of an answer, and what of it is not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from lib.data.redact import Rules
from lib.errors import ConfigError
from lib.events import Event
from lib.keys import Key
from lib.settings import EventSettings
from serve.recording import Recording, clean, decoded, streamed


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/echo")
    async def echo(request: Request) -> dict[str, Any]:
        request.state.tokens, request.state.model = 5, "reviews@3"
        request.state.key = Key("id", "shop", frozenset("*"), None, None, 0.0)
        return {"said": await request.json()}

    @app.post("/v1/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            for word in ("go", "od"):
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.post("/v1/wrong")
    async def wrong() -> None:
        raise HTTPException(400, "no")

    @app.get("/v1/models")
    async def models() -> list[str]:
        return []

    return app


def ask(*requests: tuple[str, str, Any], **settings: Any) -> list[Event]:
    recorder = Recorder()
    recording = Recording(application(), "reviews", EventSettings(**settings), recorder)  # type: ignore[arg-type]

    async def asked() -> None:
        transport = httpx.ASGITransport(app=recording, root_path="/shop")
        async with httpx.AsyncClient(transport=transport, base_url="http://test/shop") as client:
            for number, (method, path, body) in enumerate(requests):
                await client.request(method, path, json=body, headers={"x-request-id": f"r{number}"})

    asyncio.run(asked())
    return recorder.events


def test_an_answer_is_an_event() -> None:
    (event,) = ask(("POST", "/v1/echo", {"inputs": ["I am ada@example.com"]}))
    assert (event.id, event.application, event.model) == ("r0", "reviews", "reviews@3")
    assert (event.route, event.status, event.tokens, event.key) == ("/v1/echo", 200, 5, "id")
    assert event.milliseconds > 0
    asked, said = clean(Rules(), [event.request, event.answer])
    assert asked == {"inputs": ["I am <EMAIL_1>"]}
    assert said == {"said": asked}


def test_its_settings_are_those_of_data_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"kinds": ["PHONE"], "key_env": "A_KEY"}
    settings = EventSettings.model_validate({"redact": section})
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^serving\.events\.redact\.key_env: the environment has no A_KEY"):
        Recording(application(), "reviews", settings)
    monkeypatch.setenv("A_KEY", "a key of sixteen bytes or more")
    rules = Rules.of(settings.redact, "serving.events.redact")
    asked, said = clean(rules, [b'{"a": "ada@example.com, +44 20 7946 0958"}', b'["020 7946 0958"]'])
    assert re.fullmatch(r"ada@example\.com, <PHONE_[0-9a-f]{12}>", asked["a"])
    assert asked["a"].endswith(said[0])


def test_a_stream_is_kept_as_what_it_comes_to() -> None:
    (event,) = ask(("POST", "/v1/stream", {}))
    (choice,) = decoded(event.answer)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "good"}


def test_errors_and_what_is_no_answer_are_no_events() -> None:
    assert ask(("POST", "/v1/wrong", {}), ("POST", "/v1/nothing", {}), ("GET", "/v1/models", None)) == []


@pytest.mark.parametrize("settings", [{"content": False}, {"max_bytes": 20}])
def test_words_that_are_not_kept(settings: dict[str, Any]) -> None:
    (event,) = ask(("POST", "/v1/echo", {"inputs": ["a" * 30]}), **settings)
    assert (event.request, event.answer) == (None, None)
    assert clean(Rules(), [event.request, event.answer]) == [None, None]


def test_bodies_that_are_no_json_are_nothing() -> None:
    assert [decoded(body) for body in (b"\xff", b"{", b"", None, b"data: {")] == [None] * 5


def test_a_stream_of_texts_with_usage_and_two_choices() -> None:
    parts = [
        {"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]},
        {"choices": [{"index": 0, "text": "!", "finish_reason": "stop"}]},
        {"choices": [], "usage": {"total_tokens": 9}},
    ]
    found = streamed("".join(f"data: {json.dumps(part)}\n\n" for part in parts))
    assert [(c["text"], c["finish_reason"]) for c in found["choices"]] == [("a!", "stop"), ("b", None)]
    assert found["usage"] == {"total_tokens": 9}
