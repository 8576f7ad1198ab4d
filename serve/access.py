"""Who may ask an application, and how often: keys, scopes and limits, in front of everything that it does.

    Authorization: Bearer whorl_…

Keys are looked up in the database and believed for a while (`serving.access.keys_for_s`), also while the database is
away (`stale_for_s`). Limits hold over all replicas (serve/limiters.py).

Refusals are OpenAI's: 401 `invalid_api_key`, 403 `not_in_scope`, 429 `rate_limit_exceeded` with Retry-After. What is
left of a key's limits is told in OpenAI's headers too (x-ratelimit-remaining-requests and their like).
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib import keys
from lib.errors import StorageError
from lib.keys import Key
from lib.limits import Charge, Verdict
from lib.settings import AccessSettings
from serve.http import error_response
from serve.limiters import Limiter, shared

logger = logging.getLogger("ray.serve")

# Health for machines, and what the documentation is read from.
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json", "/static-offline-docs")
KEYS_KEPT = 10_000


class KnownKeys:
    """Keys by their secrets, from the database, remembered for a while."""

    def __init__(self, settings: AccessSettings, find: Callable[[str], Key | None] = keys.find) -> None:
        self._settings = settings
        self._find = find
        self._known: OrderedDict[str, tuple[Key | None, float]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Key | None]] = {}

    async def find(self, secret: str) -> Key | None:
        """The key; None for a secret of nobody. Raises StorageError when the database is away and the key was not
        seen lately."""
        if not secret.startswith(keys.PREFIX):
            return None
        name = keys.digest(secret)
        known = self._known.get(name)
        if known and time.monotonic() - known[1] < self._settings.keys_for_s:
            return known[0]
        if name not in self._asked:
            # Many requests with one key at the same moment ask the database once.
            self._asked[name] = asyncio.create_task(asyncio.to_thread(self._find, secret))
            self._asked[name].add_done_callback(lambda _: self._asked.pop(name, None))
        try:
            key = await asyncio.shield(self._asked[name])
        except Exception as error:
            if known and known[0] and time.monotonic() - known[1] < self._settings.stale_for_s:
                logger.warning("the database does not answer; keys seen lately are believed")
                return known[0]
            raise StorageError("keys cannot be looked up now; try again") from error
        self._known[name] = (key, time.monotonic())
        self._known.move_to_end(name)
        if len(self._known) > KEYS_KEPT:
            self._known.popitem(last=False)
        return key


class Access:
    """ASGI middleware: lets a request through that bears a valid key of the application, within its limits.

    `scope["state"]` then has `key` (`lib.keys.Key`); what the application leaves there as `tokens` is charged.
    """

    def __init__(
        self,
        app: ASGIApp,
        application: str,
        settings: AccessSettings,
        known: KnownKeys | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self._app = app
        self._application = application
        self._known = known or KnownKeys(settings)
        self._limiter = limiter or shared(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(path_of(scope)):
            await self._app(scope, receive, send)
            return
        try:
            key, refusal = await self._recognise(scope)
        except StorageError as error:
            key, refusal = None, error_response(503, str(error), code="keys_unavailable")
        if key is None:
            await refusal(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"] = key
        charges = _charges(key)
        headers: list[tuple[bytes, bytes]] = []
        if charges:
            verdict = await self._limiter.take(charges)
            headers = _left(charges, verdict)
            if not verdict.allowed:
                await _slow_down(key, verdict, headers)(scope, receive, send)
                return
        try:
            await self._app(scope, receive, _with(send, headers))
        finally:  # also of an answer that the client did not wait for
            if key.tokens_per_minute and state.get("tokens"):
                await self._limiter.charge(
                    [Charge(f"{key.id}/tokens", state["tokens"], key.tokens_per_minute)]
                )

    async def _recognise(self, scope: Scope) -> tuple[Key | None, Any]:
        """The request's key, or the answer that refuses it."""
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, secret = given.partition(" ")
        if not given:
            return None, _unknown("no API key; send the header Authorization: Bearer KEY")
        if scheme.lower() != "bearer":
            return None, _unknown("the Authorization header must be Bearer KEY")
        key = await self._known.find(secret.strip())
        if key is None:
            return None, _unknown("this API key does not exist")
        if not key.is_valid():
            return None, _unknown(f"this API key ({key.id}) was revoked or has expired")
        if not key.opens(self._application):
            return None, error_response(
                403,
                f"key {key.id} is not for {self._application} (it is for {', '.join(sorted(key.scopes))})",
                code="not_in_scope",
            )
        return key, None


def guard(app: FastAPI, settings: AccessSettings) -> None:
    """Put `Access` in front of an application that is built in a replica."""
    if settings.required:
        name = ray_serve.get_replica_context().app_name
        app.add_middleware(Access, application=name, settings=settings)
        document(app)


def document(app: FastAPI) -> None:
    """Say in the application's description what a key is needed for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {
            "key": {
                "type": "http",
                "scheme": "bearer",
                "description": "A key of `python -m serve.keys create`.",
            }
        }
        for path, operations in schema["paths"].items():
            if not is_open(path):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def path_of(scope: Scope) -> str:
    """The path inside the application."""
    return str(scope["path"]).removeprefix(str(scope.get("root_path", "")))


def is_open(path: str) -> bool:
    """Whether it is answered without a key."""
    return any(path == known or path.startswith(f"{known}/") for known in OPEN)


def _charges(key: Key) -> list[Charge]:
    charges = []
    if key.requests_per_minute:
        charges.append(Charge(f"{key.id}/requests", 1, key.requests_per_minute))
    if key.tokens_per_minute:
        # How many, is known when the answer is; until then a debt is all that stops one.
        charges.append(Charge(f"{key.id}/tokens", 0, key.tokens_per_minute))
    return charges


def _left(charges: list[Charge], verdict: Verdict) -> list[tuple[bytes, bytes]]:
    """OpenAI's headers: x-ratelimit-limit-requests, x-ratelimit-remaining-requests, the same of tokens."""
    found = []
    for charge, remaining in zip(charges, verdict.remaining, strict=True):
        kind = charge.name.rpartition("/")[2]
        found.append((f"x-ratelimit-limit-{kind}".encode(), str(charge.per_minute).encode()))
        found.append((f"x-ratelimit-remaining-{kind}".encode(), str(remaining).encode()))
    return found


def _with(send: Send, headers: list[tuple[bytes, bytes]]) -> Callable[[Message], Awaitable[None]]:
    async def sending(message: Message) -> None:
        if headers and message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return sending


def _unknown(message: str) -> Any:
    return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _slow_down(key: Key, verdict: Verdict, headers: list[tuple[bytes, bytes]]) -> Any:
    kind = str(verdict.stopped_by).rpartition("/")[2]
    limit = key.requests_per_minute if kind == "requests" else key.tokens_per_minute
    wait = max(1, math.ceil(verdict.wait_s))
    return error_response(
        429,
        f"key {key.id} may use {limit} {kind} a minute; try again in {wait} s",
        code="rate_limit_exceeded",
        headers={"retry-after": str(wait)} | {name.decode(): value.decode() for name, value in headers},
    )
