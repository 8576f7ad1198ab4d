"""What Ray Serve's own HTTP servers lack: a second try at another replica, and headers of any bytes.

It calls `middlewares` for each of them, proxies and replicas, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`serve.ingress:middlewares`, as cluster/ingress.py has it.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Not more often, since a request may be what kills replicas.
RETRIES = 2
# Of a longer body no copy is kept, and it is sent once. Applications take 4 MB (`serving.max_body_bytes`), by default.
MAX_BODY_BYTES = 8 << 20


class Utf8Headers:
    """ASGI middleware: bytes above 127, which HTTP leaves to whoever reads them (RFC 9110, section 5.5), as UTF-8.
    Serve takes some for it, and answers 500 to bytes that are none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [(name, as_utf8(value)) for name, value in scope["headers"]]
        await self._app(scope, receive, send)


def as_utf8(value: bytes) -> bytes:
    if value.isascii():
        return value
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


class SecondTry:
    """ASGI middleware: what ends without an answer is asked again, with the same body and request id.

    So ends at Serve's proxy a request whose replica was killed. Its proxy serves where there is no HAProxy, and
    stands in for it while HAProxy has not yet seen that new replicas are up.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        sent = Sent(receive)
        for _ in range(1 + RETRIES):
            # A copy: the proxy writes an application's prefix into it.
            await self._app(dict(scope), sent.from_the_start(), sending)
            if has_begun or not sent.can_be_had_again:
                return


class Sent:
    """What a client sent, which can be received more than once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._bytes = 0
        self.can_be_had_again = True

    def from_the_start(self) -> Receive:
        at = 0

        async def receiving() -> Message:
            nonlocal at
            at += 1
            if at <= len(self._messages):
                return self._messages[at - 1]
            message = await self._receive()
            self._keep(message)
            return message

        return receiving

    def _keep(self, message: Message) -> None:
        self._bytes += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or self._bytes > MAX_BODY_BYTES:
            self.can_be_had_again = False
            self._messages.clear()
        else:
            self._messages.append(message)


def middlewares() -> list[Middleware]:
    return [Middleware(Utf8Headers), Middleware(SecondTry)]
