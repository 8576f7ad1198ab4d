"""Prometheus metrics of an application, beside those that Ray Serve has of its own.

Ray gathers them from all processes of a node and exports them, with `ray_` before their names, in Prometheus' format on
the node's metrics port (`python -m cluster.local status` shows where). No label has more values than there are
applications, declared routes, versions or replicas; a key or a text is never one.

Ray hands a histogram on as counts by bucket: quantiles are as exact as its buckets, `_sum` only nearly so.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException
from ray.util import metrics as ray_metrics

from lib import events
from lib.errors import WhorlError
from serve.http import Readiness

if TYPE_CHECKING:
    from serve.observing import Exchange

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EVERY_S = 5.0
# Why a request was turned away, by its status.
REFUSALS = {
    401: "key", 403: "scope", 408: "slow_body", 413: "size", 429: "limit", 503: "unavailable", 504: "timeout",
}  # fmt: skip


@dataclass(frozen=True)
class Instrument:
    """One metric: `labels` beside `application`, `buckets` of a histogram (upper bounds)."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


INSTRUMENTS = {
    "whorl_requests_total": Instrument(
        "counter", "Requests, by the class of their status (2xx, 4xx, 5xx)", ("route", "status")
    ),
    "whorl_request_duration_seconds": Instrument(
        "histogram", "Time to the last byte of an answer", ("route",), SECONDS
    ),
    "whorl_time_to_first_token_seconds": Instrument(
        "histogram", "Time to the first event of a stream", ("route",), SECONDS
    ),
    "whorl_refused_requests_total": Instrument(
        "counter", "Requests turned away: key, scope, slow_body, size, limit, unavailable, timeout", ("reason",)
    ),
    "whorl_tokens_total": Instrument("counter", "Tokens that a model read and wrote"),
    "whorl_batch_rows": Instrument("histogram", "Rows that an engine computed together", (), ROWS),
    "whorl_queue_wait_seconds": Instrument(
        "histogram", "Time that a row waited for the engine", (), SECONDS
    ),
    "whorl_retrievals_total": Instrument(
        "counter", "Searches of a knowledge base, by whether a passage was relevant (yes, no)", ("found",)
    ),
    "whorl_opinions_total": Instrument("counter", "Documents that POST /v1/opinions kept, each once"),
    "whorl_alerts_total": Instrument("counter", "Surges of negative opinion that raised an alert"),
    "whorl_webhooks_total": Instrument(
        "counter", "Attempts to tell a webhook of an alert: delivered, failed, given up", ("outcome",)
    ),
    "whorl_model_info": Instrument(
        "gauge", "1 for the version that a replica serves, 0 for those before", ("replica", "model", "engine")
    ),
    "whorl_model_ready": Instrument("gauge", "1 where a replica has a model", ("replica",)),
    "whorl_model_load_failed": Instrument(
        "gauge", "1 where the version that was asked for last is not the one that is served", ("replica",)
    ),
    "whorl_events_waiting": Instrument("gauge", "Events in memory that no journal has yet", ("replica",)),
    "whorl_events_journal_bytes": Instrument(
        "gauge", "Events on a replica's disk that the database does not have yet", ("replica",)
    ),
    "whorl_events_dropped_total": Instrument("counter", "Events that were lost: a full buffer or journal"),
}  # fmt: skip


def exported() -> set[str]:
    """Names under which Prometheus finds INSTRUMENTS."""
    names = set()
    for name, instrument in INSTRUMENTS.items():
        parts = ("_bucket", "_sum", "_count") if instrument.kind == "histogram" else ("",)
        names |= {f"ray_{name}{part}" for part in parts}
    return names


class Metrics:
    """INSTRUMENTS of one replica."""

    def __init__(self, application: str, replica: str) -> None:
        self.application, self.replica = application, replica
        self._instruments = {name: _made(name, instrument) for name, instrument in INSTRUMENTS.items()}
        self._fixed = {
            name: {"application": application} | ({"replica": replica} if "replica" in one.labels else {})
            for name, one in INSTRUMENTS.items()
        }

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        if value > 0:  # Ray takes no zero
            self._instruments[name].inc(value, self._fixed[name] | labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """A value for a histogram."""
        self._instruments[name].observe(value, self._fixed[name] | labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """The present value of a gauge."""
        self._instruments[name].set(value, self._fixed[name] | labels)

    def request(self, exchange: Exchange) -> None:
        """A request that is over."""
        self.count("whorl_requests_total", route=exchange.route, status=f"{exchange.status // 100}xx")
        self.observe("whorl_request_duration_seconds", exchange.seconds, route=exchange.route)
        self.count("whorl_tokens_total", exchange.tokens)
        if exchange.first_event_s is not None:
            self.observe("whorl_time_to_first_token_seconds", exchange.first_event_s, route=exchange.route)
        if exchange.status in REFUSALS:
            self.count("whorl_refused_requests_total", reason=REFUSALS[exchange.status])

    def batch(self, waits: Sequence[float]) -> None:
        """Rows that are computed together, by the seconds that each has waited."""
        self.observe("whorl_batch_rows", len(waits))
        for wait in waits:
            self.observe("whorl_queue_wait_seconds", wait)


def _made(name: str, instrument: Instrument) -> Any:
    labels = ("application", *instrument.labels)
    if instrument.kind == "counter":
        return ray_metrics.Counter(name, instrument.text, labels)
    if instrument.kind == "gauge":
        return ray_metrics.Gauge(name, instrument.text, labels)
    return ray_metrics.Histogram(name, instrument.text, list(instrument.buckets), labels)


@functools.cache
def current() -> Metrics:
    """Those of this process's replica; of none, under empty names, outside of one."""
    try:
        context = ray_serve.get_replica_context()
    except RayServeException:
        return Metrics("", "")
    return Metrics(context.app_name, context.replica_id.unique_id)


class Watch(threading.Thread):
    """Sets the gauges of a replica now and then: what is true while nobody asks, too."""

    def __init__(self, metrics: Metrics, replica: Readiness) -> None:
        super().__init__(name="metrics", daemon=True)
        self._metrics, self._replica = metrics, replica
        self._served: tuple[str, str] | None = None
        self._dropped = 0
        self._stop = threading.Event()

    def run(self) -> None:
        while True:
            self.look()
            if self._stop.wait(EVERY_S):
                return

    def stop(self) -> None:
        self._stop.set()

    def look(self) -> None:
        """Set all gauges once."""
        try:
            ready = self._replica.ready()
        except WhorlError:
            self._metrics.set("whorl_model_ready", 0)
        else:
            self._metrics.set("whorl_model_ready", 1)
            self._metrics.set("whorl_model_load_failed", int(ready.failed is not None))
            self._serves(f"{ready.model}@{ready.version}", ready.engine)
        backlog = events.backlog()
        self._metrics.set("whorl_events_waiting", backlog.waiting)
        self._metrics.set("whorl_events_journal_bytes", backlog.journal_bytes)
        self._metrics.count("whorl_events_dropped_total", backlog.dropped - self._dropped)
        self._dropped = backlog.dropped

    def _serves(self, model: str, engine: str) -> None:
        if self._served is not None and self._served != (model, engine):
            self._metrics.set("whorl_model_info", 0, model=self._served[0], engine=self._served[1])
        self._served = (model, engine)
        self._metrics.set("whorl_model_info", 1, model=model, engine=engine)
