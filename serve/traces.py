"""A span for each request, sent to an OpenTelemetry collector (`serving.traces`, OTLP over HTTP in protobuf).

A trace that the client has begun (W3C's `traceparent`) is gone on with. Spans wait in memory and are sent by a thread;
a collector that is away costs them, and nobody an answer. Headers that it wants, such as a token, come from the
environment (OTEL_EXPORTER_OTLP_HEADERS), as OpenTelemetry has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from serve.observing import Exchange

PATH = "/v1/traces"


class Spans:
    """Spans of one application. The provider is its own: Ray and vLLM may have one of theirs."""

    def __init__(self, url: str, application: str) -> None:
        resource = Resource.create({"service.name": application, "service.namespace": "whorl"})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint(url))))
        self._tracer = self._provider.get_tracer("whorl")
        self._parents = TraceContextTextMapPropagator()

    def request(self, exchange: Exchange) -> None:
        """A request that is over. Attributes of HTTP have the names of OpenTelemetry's semantic conventions."""
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            context=self._parents.extract(exchange.headers),
            kind=SpanKind.SERVER,
            start_time=int(exchange.began * 1e9),
            attributes={
                "http.request.method": exchange.method,
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "whorl.request.id": exchange.id,
                "whorl.model": exchange.model,
                "whorl.tokens": exchange.tokens,
            },
        )
        if exchange.first_event_s is not None:
            first = int((exchange.began + exchange.first_event_s) * 1e9)
            span.add_event("first token", timestamp=first)
        if exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(int((exchange.began + exchange.seconds) * 1e9))

    def close(self) -> None:
        """Send what waits, and end."""
        self._provider.shutdown()


def endpoint(url: str) -> str:
    """The collector's address for traces: `url`, with OTLP's own path where it has none."""
    return url.rstrip("/") + PATH if urlsplit(url).path in ("", "/") else url
