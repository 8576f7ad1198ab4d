"""Header values of any bytes reach Ray Serve as UTF-8; what ends without an answer is asked again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.ingress import MAX_BODY_BYTES, SecondTry, Utf8Headers, as_utf8


@pytest.mark.parametrize(
    ("given", "seen"),
    [(b"plain", b"plain"), ("größe".encode(), "größe".encode()), (b"\xff\xfe", "ÿþ".encode()), (b"", b"")],
)
def test_what_is_no_utf_8_is_taken_for_latin_1(given: bytes, seen: bytes) -> None:
    assert as_utf8(given) == seen
    assert as_utf8(seen) == seen


def test_the_application_sees_them_so() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope.get("headers", ["none"]))

    middleware = Utf8Headers(app)
    asyncio.run(middleware({"type": "http", "headers": [(b"x", b"\xff"), (b"y", b"z")]}, None, None))  # type: ignore[arg-type]
    asyncio.run(middleware({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [(b"x", b"\xc3\xbf"), (b"y", b"z"), "none"]


PARTS = [
    {"type": "http.request", "body": b"ab", "more_body": True},
    {"type": "http.request", "body": b"c", "more_body": False},
]
LONG = [{"type": "http.request", "body": bytes(MAX_BODY_BYTES + 1), "more_body": False}]
GONE = [PARTS[0], {"type": "http.disconnect"}]


@pytest.mark.parametrize(
    ("sent", "deaths", "bodies", "answers"),
    [
        (PARTS, 0, [b"abc"], ["/"]),
        (PARTS, 2, [b"abc"] * 3, ["/"]),
        (PARTS, 9, [b"abc"] * 3, []),
        (GONE, 9, [b"ab"], []),
        (LONG, 1, [LONG[0]["body"]], []),
    ],
    ids=["answered", "killed twice", "kills them all", "the client is gone", "too long to keep"],
)
def test_what_ends_without_an_answer_is_asked_again(
    sent: list[Any], deaths: int, bodies: list[bytes], answers: list[str]
) -> None:
    seen: list[bytes] = []
    answered: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        seen.append(body)
        root, scope["root"] = scope["root"], "/changed"
        if len(seen) > deaths:
            await send({"type": "http.response.start", "root": root})

    async def send(message: Any) -> None:
        answered.append(message["root"])

    async def receive() -> Any:
        return next(messages)

    messages = iter(sent)
    asyncio.run(SecondTry(app)({"type": "http", "root": "/"}, receive, send))
    assert seen == bodies
    assert answered == answers


def test_a_failure_is_told_and_not_asked_again() -> None:
    calls: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)
        raise ValueError("said")

    with pytest.raises(ValueError, match="said"):
        asyncio.run(SecondTry(app)({"type": "http"}, None, None))  # type: ignore[arg-type]
    assert len(calls) == 1
