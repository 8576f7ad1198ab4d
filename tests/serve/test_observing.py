"""What is seen of a request from outside: its record, its span at a real collector, its line, its batch."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from lib.errors import RegistryError
from lib.keys import Key
from lib.settings import LogSettings, ServingSettings
from serve import logs, traces
from serve.batching import LengthBatcher
from serve.http import create_app, error_response
from serve.observing import CLIENT_GONE, Exchange, Observing
from tests.serve.collector import Collector, values


class Model:
    def ready(self) -> Any:
        raise RegistryError("the model is still loading")


def application() -> FastAPI:
    app = create_app("Test", "", Model())

    @app.post("/v1/echo/{name}")
    async def echo(request: Request, name: str) -> str:
        request.state.tokens, request.state.model = 7, "reviews@3"
        request.state.key = Key("id", "shop", frozenset("*"), None, None, 0.0)
        return name

    @app.post("/v1/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            await asyncio.sleep(0.05)
            yield "data: 1\n\n"
            await asyncio.sleep(0.1)
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.post("/v1/bug")
    async def bug() -> None:
        raise RuntimeError

    @app.post("/v1/away")
    async def away() -> None:
        raise asyncio.CancelledError

    @app.post("/v1/full")
    async def full() -> Any:
        return error_response(503, "full")

    return app


def ask(*paths: str, sinks: list[Any] | None = None, **headers: str) -> list[Exchange]:
    """POST to each path; what was seen of it."""
    seen: list[Exchange] = []
    app = application()
    app.add_middleware(Observing, sinks=[seen.append, *(sinks or [])])

    async def asked() -> None:
        transport = httpx.ASGITransport(app=app, root_path="/shop", raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test/shop") as client:
            for number, path in enumerate(paths):
                named = {"x-request-id": f"r{number}", "authorization": "Bearer whorl_secret", **headers}
                with suppress(asyncio.CancelledError, AssertionError):
                    await client.post(path, content=b"x", headers=named)

    asyncio.run(asked())
    return seen


def test_a_request_is_seen_once_with_what_came_of_it() -> None:
    (seen,) = ask("/v1/echo/Ada")
    assert (seen.id, seen.method, seen.route, seen.status) == ("r0", "POST", "/v1/echo/{name}", 200)
    assert (seen.model, seen.tokens, seen.key) == ("reviews@3", 7, "id")
    assert seen.first_event_s is None
    assert "Ada" not in repr(seen)
    assert "whorl_secret" not in f"{seen!r}{seen.headers}"


def test_an_id_that_is_not_fit_for_a_log_is_none() -> None:
    assert [seen.id for seen in ask("/v1/echo/a", **{"x-request-id": "two words"})] == [""]


def test_a_stream_tells_when_it_began() -> None:
    (seen,) = ask("/v1/stream")
    assert seen.first_event_s is not None
    assert 0.04 < seen.first_event_s < seen.seconds - 0.09


def test_every_end_has_a_status_and_a_path_of_nobody_no_name() -> None:
    seen = ask("/v1/bug", "/v1/full", "/v1/nothing/secret", "/v1/away", "/healthz")
    assert [(s.route, s.status) for s in seen] == [
        ("/v1/bug", 500),
        ("/v1/full", 503),
        ("other", 404),
        ("/v1/away", CLIENT_GONE),
    ]


def test_who_cannot_tell_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken(exchange: Exchange) -> None:
        raise RuntimeError("no")

    later: list[Exchange] = []
    with caplog.at_level(logging.ERROR, "ray.serve"):
        (seen,) = ask("/v1/echo/a", sinks=[broken, later.append])
    assert seen.status == 200
    assert later == [seen]
    assert "request r0 could not be told of" in caplog.text


def test_a_line_has_the_figures_and_not_the_words() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger, level = logs.logger, logs.logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        ask("/v1/echo/Ada", sinks=[logs.request])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (record,) = records
    found = {name: getattr(record, name) for name in ("request", "status", "model", "tokens", "key")}
    assert found == {"request": "r0", "status": 200, "model": "reviews@3", "tokens": 7, "key": "id"}
    assert record.milliseconds > 0  # type: ignore[attr-defined]
    assert "Ada" not in json.dumps(record.__dict__, default=str)
    assert logs.config(LogSettings()).encoding == "JSON"
    assert logs.config(LogSettings(format="text")).encoding == "TEXT"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector.running() as found:
        yield found


def test_spans_reach_a_collector(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20collectors")
    spans = traces.Spans(collector.url, "reviews")
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    seen = ask(
        "/v1/echo/Ada", "/v1/stream", "/v1/bug", sinks=[spans.request], traceparent=f"00-{trace}-{parent}-01"
    )
    ask("/v1/echo/Ada", sinks=[spans.request])
    spans.close()

    assert set(collector.paths) == {"/v1/traces"}
    assert collector.headers[0]["authorization"] == "Bearer collectors"
    (resource,) = {r.resource.SerializeToString(): r.resource for r in collector.received}.values()
    named = {a.key: a.value.string_value for a in resource.attributes}
    assert (named["service.name"], named["service.namespace"]) == ("reviews", "whorl")
    echo, stream, bug, alone = collector.spans
    assert (echo.name, echo.kind) == ("POST /v1/echo/{name}", Span.SPAN_KIND_SERVER)
    assert (echo.trace_id.hex(), echo.parent_span_id.hex()) == (trace, parent)
    assert alone.parent_span_id == b""
    assert alone.trace_id.hex() != trace
    assert values(echo) == {
        "http.request.method": "POST",
        "http.route": "/v1/echo/{name}",
        "http.response.status_code": 200,
        "whorl.request.id": "r0",
        "whorl.model": "reviews@3",
        "whorl.tokens": 7,
    }
    took = (stream.end_time_unix_nano - stream.start_time_unix_nano) / 1e9
    assert took == pytest.approx(seen[1].seconds, abs=1e-3)
    (event,) = stream.events
    first = (event.time_unix_nano - stream.start_time_unix_nano) / 1e9
    assert (event.name, first) == ("first token", pytest.approx(seen[1].first_event_s, abs=1e-3))
    assert [span.status.code for span in (echo, bug)] == [0, 2]
    assert b"Ada" not in b"".join(one.SerializeToString() for one in collector.received)
    assert b"whorl_secret" not in b"".join(one.SerializeToString() for one in collector.received)


def test_a_collectors_address() -> None:
    assert traces.endpoint("http://c:4318") == traces.endpoint("http://c:4318/") == "http://c:4318/v1/traces"
    assert traces.endpoint("https://c/otel/spans") == "https://c/otel/spans"
    for wrong, says in (("collector:4318", "no collector's address"), ("ftp://u:pw@c", "no place here")):
        with pytest.raises(ValueError, match=says) as error:
            ServingSettings(traces=wrong)
        assert "pw" not in str(error.value).split("[type")[0]


def test_a_batch_is_told_with_the_time_that_its_rows_waited() -> None:
    told: list[list[float]] = []
    batcher = LengthBatcher(
        lambda rows: [row[:1] for row in rows], 64, 64, lambda waits: told.append(list(waits))
    )

    async def asked() -> None:
        await batcher.results([np.arange(3), np.arange(3)])

    asyncio.run(asked())
    batcher.close()
    (waits,) = told
    assert len(waits) == 2
    assert all(0 <= wait < 5 for wait in waits)
