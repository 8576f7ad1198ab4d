"""Every answer as an event (lib/events.py), and POST /v1/feedback, which says what an answer was worth.

The bodies are gathered as they pass and handed to a thread when the answer has been sent: nobody waits for it. What
is kept has no personal data in it (lib/data/redact); `serving.events.content: false` keeps no words at all.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations as types.

import asyncio
import json
import time
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve as ray_serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib import events
from lib.data.redact import Redaction, Rules
from lib.events import Event, Feedback, Recorder
from lib.settings import EventSettings

REDACT = "serving.events.redact"
NOT_RECORDED = ("/v1/feedback", "/v1/models")
Words = Annotated[str, Field(min_length=1, max_length=20_000)]


SAYS_SOMETHING = {"rating": "number", "label": "string", "correction": "string", "preferred": "string"}


class FeedbackRequest(BaseModel):
    """What a user said of an answer: at least one of rating, label, correction and preferred."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "anyOf": [
                {"required": [name], "properties": {name: {"type": kind}}}
                for name, kind in SAYS_SOMETHING.items()
            ],
            "examples": [{"request_id": "4f1c2d5e", "rating": -1, "label": "negative"}],
        },
    )
    request_id: Annotated[str, Field(min_length=1, max_length=128)]
    rating: Annotated[float, Field(ge=-1, le=1, strict=True)] | None = None
    """-1 bad, 1 good."""
    label: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What the answer should have been, of an application that chooses labels."""
    correction: Words | None = None
    """What the answer should have been, as a text."""
    preferred: Words | None = None
    """Another answer that is better than the one that was given."""
    comment: Words | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "FeedbackRequest":
        if self.rating is None and not (self.label or self.correction or self.preferred):
            raise ValueError(f"give at least one of {', '.join(SAYS_SOMETHING)}")
        return self


class FeedbackResponse(BaseModel):
    request_id: str
    status: str = "kept"


class Recording:
    """ASGI middleware: gathers a request and its answer, and hands them to the recorder when both have passed.

    The application leaves `model` (NAME@VERSION) and `tokens` in `scope["state"]`, and `serve.access` the `key`.
    Only answers with a 2xx status are events.
    """

    def __init__(
        self, app: ASGIApp, application: str, settings: EventSettings, recorder: Recorder | None = None
    ) -> None:
        self._app, self._application, self._settings = app, application, settings
        self._recorder = recorder or Recorder(partial(clean, Rules.of(settings.redact, REDACT)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_recorded(scope):
            await self._app(scope, receive, send)
            return
        asked, said = Gathered(self._settings.max_bytes), Gathered(self._settings.max_bytes)
        status, began, clock = 0, time.time(), time.perf_counter()

        async def receiving() -> Message:
            message = await receive()
            asked.add(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                said.add(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            if 200 <= status < 300:
                self._record(scope, asked, said, status, began, (time.perf_counter() - clock) * 1000)

    def _is_recorded(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        return scope["method"] == "POST" and path.startswith("/v1/") and path not in NOT_RECORDED

    def _record(
        self, scope: Scope, asked: "Gathered", said: "Gathered", status: int, began: float, took: float
    ) -> None:
        state, content = scope.get("state", {}), self._settings.content
        key = state.get("key")
        self._recorder.record(
            Event(
                id=dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1"),
                application=self._application,
                model=str(state.get("model", "")),
                time=began,
                route=str(scope["path"]).removeprefix(str(scope.get("root_path", ""))),
                status=status,
                milliseconds=took,
                tokens=int(state.get("tokens") or 0),
                key=key.id if key else None,
                request=asked.whole() if content else None,
                answer=said.whole() if content else None,
            )
        )


class Gathered:
    """A body as it passes, up to a size."""

    def __init__(self, most: int) -> None:
        self._parts: list[bytes] = []
        self._left = most

    def add(self, part: bytes) -> None:
        if part:
            self._left -= len(part)
            if self._left >= 0:
                self._parts.append(part)

    def whole(self) -> bytes | None:
        """The body; None when it was too long to be kept."""
        return b"".join(self._parts) if self._left >= 0 else None


def clean(rules: Rules, values: list[Any]) -> Any:
    """Request and answer as JSON values without personal data; the same value has the same placeholder in both."""
    return Redaction(rules).value([decoded(value) for value in values])


def decoded(body: bytes | None) -> Any:
    """A body's JSON value; of server-sent events the answer that they come to. None for anything else."""
    if body is None:
        return None
    try:
        return streamed(body.decode()) if body.startswith(b"data: ") else json.loads(body)
    except ValueError:
        return None


def streamed(text: str) -> dict[str, Any]:
    """OpenAI's stream as the answer that it comes to: `choices` with `message.content` or `text`, and `usage`."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        part = json.loads(line.removeprefix("data: "))
        usage = part.get("usage") or usage
        for choice in part.get("choices", []):
            known = choices.setdefault(choice["index"], {"index": choice["index"], "finish_reason": None})
            known["finish_reason"] = choice.get("finish_reason") or known["finish_reason"]
            if "delta" in choice:
                message = known.setdefault("message", {"role": "assistant", "content": ""})
                message["content"] += choice["delta"].get("content") or ""
            else:
                known["text"] = known.get("text", "") + (choice.get("text") or "")
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def record(app: FastAPI, settings: EventSettings) -> None:
    """Put `Recording` in front of an application that is built in a replica, and give it POST /v1/feedback."""
    if not settings.record:
        return

    application = ray_serve.get_replica_context().app_name
    rules = Rules.of(settings.redact, REDACT)

    @app.post("/v1/feedback", tags=["feedback"], summary="Say what an answer was worth")
    async def feedback(request: Request, body: FeedbackRequest) -> FeedbackResponse:
        key = getattr(request.state, "key", None)
        words = Redaction(rules).value(body.model_dump(include={"correction", "preferred", "comment"}))
        said = Feedback(
            body.request_id,
            rating=body.rating,
            label=body.label,
            key=key.id if key else None,
            **words,  # type: ignore[arg-type]
        )
        until = time.monotonic() + settings.feedback_waits_s
        while True:
            try:
                await asyncio.to_thread(events.say, said, application)
                return FeedbackResponse(request_id=body.request_id)
            except events.UnknownRequestError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.2)

    app.add_middleware(Recording, application=application, settings=settings)
