"""Opinions over HTTP: POST /v1/opinions, GET /v1/opinions/trends, GET /v1/alerts; and who looks for surges.

Documents are scored by the model that answers /v1/sentiment, in the same batches, and kept (lib/opinions/). Each
replica has a thread that would look for surges and send alerts; a lease in the database lets one of all replicas do
it, and were two to do it at once, each alert would still be raised once.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations as types.

import logging
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request
from pydantic import AwareDatetime
from sqlalchemy.exc import SQLAlchemyError

from lib.artifacts import ModelRef
from lib.errors import RequestError, StorageError
from lib.opinions import lease, store, watch, webhooks
from lib.opinions.judging import judged
from lib.opinions.store import document_id
from lib.opinions.tables import Alert, Opinion
from lib.settings import MonitoringSettings, ServingSettings
from lib.tasks import sentiment as task
from serve import metrics
from serve.http import of_database, request_id
from serve.opinion_forms import (
    AlertResponse,
    AlertsResponse,
    Bucket,
    Delivery,
    Document,
    OpinionsResponse,
    Scored,
    Series,
    Sums,
    TrendsResponse,
    limited_opinions,
)

logger = logging.getLogger("ray.serve")

# A clock may be fast; what is dated later than that is a mistake.
AHEAD_S = 86_400
MOST_BUCKETS = 2_000
TREND_DAYS = 7
LEASE_S = 60.0


class Answering(Protocol):
    """A replica of serve/sentiment.py."""

    serving: ServingSettings

    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int, ModelRef]:
        """Answers, tokens, and the version that gave them."""


class Watching:
    """The thread of one replica.

    Raises ConfigError when the secret of a webhook is missing here.
    """

    def __init__(self, application: str, rules: MonitoringSettings) -> None:
        for webhook in rules.webhooks:
            webhooks.secret_of(webhook)
        self._application, self._rules, self._holder = application, rules, uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="opinions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def _work(self) -> None:
        while not self._ended.wait(self._rules.every_s):
            try:
                self.once()
            except (SQLAlchemyError, StorageError) as error:
                logger.warning("surges are looked for when the database is back: %s", type(error).__name__)
            except Exception:
                logger.exception("looking for surges failed; it is tried again")

    def once(self) -> None:
        """Look and send, if no other replica does."""
        name, seconds = f"opinions/{self._application}"[:100], max(LEASE_S, 4 * self._rules.every_s)
        if not lease.hold(name, self._holder, seconds, time.time()):
            return
        for alert in watch.look(self._application, self._rules):
            logger.info("alert %s: %d of %d negative", alert.id, alert.negative, alert.documents)
            metrics.current().count("whorl_alerts_total")
        for outcome, number in webhooks.send(self._application, self._rules).items():
            metrics.current().count("whorl_webhooks_total", number, outcome=outcome)


def take_opinions(app: FastAPI, replica: Answering, rules: MonitoringSettings, application: str) -> None:
    """Add the routes to what a replica of `application` answers."""
    limited = limited_opinions(replica.serving)

    @app.post("/v1/opinions", tags=["opinions"], summary="Score documents, keep them, and watch for surges")
    async def opinions(request: Request, body: limited) -> OpinionsResponse:  # type: ignore[valid-type]
        documents: list[Document] = body.documents  # type: ignore[attr-defined]
        state, identity, times = request.state, request_id(request), [_seconds(d) for d in documents]
        _check_times(times)
        answers, state.tokens, ref = await replica.answer([document.text for document in documents])
        state.model = str(ref)
        found = [_opinion(*row, rules) for row in zip(documents, times, answers, strict=True)]
        new = await of_database("opinions", store.add, application, found, rules.negative)
        metrics.current().count("whorl_opinions_total", new)
        results = [
            Scored(**answer.model_dump(), id=one.id, topic=one.topic or None)
            for answer, one in zip(answers, found, strict=True)
        ]
        return OpinionsResponse(
            results=results, new=new, model=ref.name, version=ref.version, request_id=identity
        )

    @app.get("/v1/opinions/trends", tags=["opinions"], summary="Opinions by entity and topic over time")
    async def trends(
        entity: Annotated[str | None, Query(max_length=200)] = None,
        topic: Annotated[str | None, Query(max_length=200)] = None,
        since: AwareDatetime | None = None,
        until: AwareDatetime | None = None,
        bucket_minutes: Annotated[int | None, Query(ge=1, le=525_600)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> TrendsResponse:
        minutes = bucket_minutes or rules.bucket_minutes
        step, width = minutes * 60, max(1, round(rules.window_hours * 60 / minutes))
        begin, end = _range(since, until, step)
        found = await of_database(
            "opinions",
            store.trends,
            application,
            begin,
            end,
            step,
            width,
            _clean(entity),
            _clean(topic),
            limit,
        )
        return TrendsResponse(
            since=_time(begin),
            until=_time(end),
            bucket_minutes=minutes,
            window_minutes=width * minutes,
            series=[_series(trend) for trend in found],
        )

    @app.get("/v1/alerts", tags=["opinions"], summary="Surges of negative opinion, the latest first")
    async def alerts(
        entity: Annotated[str | None, Query(max_length=200)] = None,
        topic: Annotated[str | None, Query(max_length=200)] = None,
        since: AwareDatetime | None = None,
        until: AwareDatetime | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> AlertsResponse:
        first, last = (given and given.timestamp() for given in (since, until))
        found = await of_database(
            "opinions", watch.alerts, application, _clean(entity), _clean(topic), first, last, limit
        )
        return AlertsResponse(alerts=[_alert(*row) for row in found])


def _seconds(document: Document) -> int:
    return int(document.time.timestamp())


def _check_times(times: list[int]) -> None:
    latest = time.time() + AHEAD_S
    for place, found in enumerate(times):
        if not 0 <= found <= latest:
            what = "before 1970" if found < 0 else "more than a day ahead"
            raise RequestError(
                f"documents.{place}.time is {what}; send when it was said, such as 2026-03-01T09:00:00Z",
                param=f"documents.{place}.time",
                code="invalid_time",
            )


def _opinion(document: Document, at: int, answer: task.Answer, rules: MonitoringSettings) -> Opinion:
    label, score, topic = judged(answer, rules)
    return Opinion(
        id=document.id or document_id(at, document.source, document.entity, document.text),
        time=at,
        source=document.source,
        entity=document.entity,
        topic=document.topic or topic,
        label=label,
        score=score,
        text=document.text,
    )


def _range(since: datetime | None, until: datetime | None, step: int) -> tuple[int, int]:
    """Whole buckets that hold the time from `since` to `until`."""
    last = until.timestamp() if until else time.time()
    first = since.timestamp() if since else last - TREND_DAYS * 86_400
    if first >= last:
        raise RequestError("since must be before until", param="since", code="invalid_time")
    if first < 0:
        raise RequestError("since is before 1970", param="since", code="invalid_time")
    begin, end = int(first // step) * step, -int(-last // step) * step
    if end - begin > MOST_BUCKETS * step:
        raise RequestError(
            f"from since to until are {(end - begin) // step:,} buckets, of which {MOST_BUCKETS:,} are shown at most; "
            "ask for a shorter time or for larger bucket_minutes",
            param="bucket_minutes",
            code="too_many_buckets",
        )
    return begin, end


def _clean(value: str | None) -> str | None:
    """A filter as a value that the database can hold; no document has a NUL."""
    return value.replace("\0", "\ufffd") if value else value


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _series(trend: store.Trend) -> Series:
    return Series(
        entity=trend.entity,
        topic=trend.topic or None,
        buckets=[
            Bucket(
                begins=_time(p.begins),
                **_sums(p.documents, p.negative, p.score),
                window=Sums(**_sums(p.window_documents, p.window_negative, p.window_score)),
            )
            for p in trend.points
        ],
    )


def _sums(documents: int, negative: int, score: float) -> dict[str, Any]:
    return {
        "documents": documents, "negative": negative, "share": negative / documents, "mean_score": score,
    }  # fmt: skip


def _alert(alert: Alert, sent: list[dict[str, Any]]) -> AlertResponse:
    deliveries = [
        Delivery(
            **{name: row[name] for name in ("id", "state", "attempts", "outcome")},
            url=webhooks.shown(row["url"]),
        )
        for row in sent
    ]
    return AlertResponse(**webhooks.payload(alert), deliveries=deliveries)
