"""An OpenTelemetry collector on a socket, as far as OTLP over HTTP goes: it decodes what it is sent, and keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


@dataclass
class Collector:
    url: str = ""
    received: list[ResourceSpans] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        return [span for one in list(self.received) for scope in one.scope_spans for span in scope.spans]

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Collector]:
        found = cls()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                found.paths.append(self.path)
                found.headers.append({name.lower(): value for name, value in self.headers.items()})
                found.received.extend(ExportTraceServiceRequest.FromString(body).resource_spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(1) as pool:
            found.url = f"http://127.0.0.1:{server.server_port}"
            pool.submit(server.serve_forever)
            yield found
            server.shutdown()


def values(span: Span) -> dict[str, Any]:
    """A span's attributes."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
