"""Header values of any bytes reach Ray Serve as UTF-8."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.headers import Utf8Headers, as_utf8


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
