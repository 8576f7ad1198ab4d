"""The routes of opinions over a real socket, with a real model, without Ray: every way to get a request wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn

from cluster.ingress import free_port
from lib.artifacts import ModelRef
from lib.settings import MonitoringSettings, ServingSettings
from lib.storage import local_copy
from lib.tasks import sentiment
from serve.http import Ready, create_app
from serve.opinions import take_opinions
from tests.opinions.test_store import STORY
from tests.serve.conftest import Endpoint, make_settings

BEGIN = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=50)


class Answering:
    """reviews@1 in this process."""

    def __init__(self, folder: Path) -> None:
        self.serving = ServingSettings(max_inputs=8, max_chars=500)
        self.predictor = sentiment.load(folder, self.serving)

    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int, ModelRef]:
        found = sentiment.predict(self.predictor, sentiment.Request(inputs=inputs))
        return found.results, len(inputs), ModelRef("reviews", 1)

    def ready(self) -> Ready:
        return Ready(model="reviews", version=1, engine="")


@pytest.fixture(scope="module")
def local(store: Path) -> Iterator[Endpoint]:
    with local_copy(ModelRef("reviews", 1).uri) as folder:
        replica = Answering(folder)
    app = create_app("Whorl sentiment", "", replica)
    take_opinions(app, replica, MonitoringSettings(window_hours=2), "routes")

    @app.middleware("http")
    async def named(request: Any, call_next: Any) -> Any:
        # As Ray Serve's ingress does.
        request.scope["headers"].append((b"x-request-id", b"r1"))
        return await call_next(request)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Endpoint(f"http://127.0.0.1:{port}", make_settings(), "none")
    server.should_exit = True
    thread.join(10)


def document(hour: int, **values: Any) -> dict[str, Any]:
    at = (BEGIN + timedelta(hours=hour, seconds=30)).isoformat()
    return {"text": "awful fit", "time": at, "source": "web", "entity": "acme", "topic": "cars"} | values


def send(local: Endpoint, *documents: dict[str, Any]) -> Any:
    answer = local.post({"documents": list(documents)}, "/v1/opinions")
    assert answer.status == 200, answer.body
    return answer.body


def test_documents_are_kept_once_and_copies_count_once(local: Endpoint) -> None:
    both = [document(0, id="one"), document(1, text="great fabric")]
    body = send(local, *both)
    first = body["results"][0]
    assert (first["id"], first["topic"], body["new"], body["model"]) == ("one", "cars", 2, "reviews")
    assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-5)
    again = send(local, *both)
    assert again["new"] == 0
    assert [r["id"] for r in again["results"]] == [r["id"] for r in body["results"]]
    assert send(local, *[document(2, text=f"{STORY}{'!' * n}", id=f"c{n}") for n in range(5)])["new"] == 5

    found = local.get(f"/v1/opinions/trends?entity=acme&since={quote(BEGIN.isoformat())}").body
    assert (found["bucket_minutes"], found["window_minutes"]) == (60, 120)
    (series,) = found["series"]
    assert (series["entity"], series["topic"]) == ("acme", "cars")
    assert [b["documents"] for b in series["buckets"]] == [1, 1, 1], "five copies are one story"
    assert [b["window"]["documents"] for b in series["buckets"]] == [1, 2, 2]
    negative = int(first["label"] == "negative")
    assert series["buckets"][0]["negative"] == series["buckets"][0]["share"] == negative
    assert series["buckets"][0]["mean_score"] == pytest.approx(first["scores"]["negative"])
    weekly = local.get("/v1/opinions/trends?topic=cars&bucket_minutes=10080").body
    assert sum(b["documents"] for b in weekly["series"][0]["buckets"]) == 3
    assert local.get("/v1/opinions/trends?topic=nothing").body["series"] == []


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"time": "2026-03-01T09:00:00"}, "documents.0.time", "timezone_aware"),
    ({"time": "yesterday"}, "documents.0.time", "datetime_from_date_parsing"),
    ({"time": "1969-03-01T09:00:00Z"}, "documents.0.time", "invalid_time"),
    ({"time": "2999-03-01T09:00:00Z"}, "documents.0.time", "invalid_time"),
    ({"text": ""}, "documents.0.text", "string_too_short"),
    ({"text": "x" * 501}, "documents.0.text", "string_too_long"),
    ({"entity": " "}, "documents.0.entity", "string_pattern_mismatch"),
    ({"entity": "a\0b"}, "documents.0.entity", "string_pattern_mismatch"),
    ({"source": "x" * 201}, "documents.0.source", "string_too_long"),
    ({"id": ""}, "documents.0.id", "string_too_short"),
    ({"lang": "en"}, "documents.0.lang", "extra_forbidden"),
]


@pytest.mark.parametrize(("values", "param", "code"), BAD)
def test_a_bad_document_is_a_400_that_names_the_value(
    local: Endpoint, values: dict[str, Any], param: str, code: str
) -> None:
    answer = local.post({"documents": [document(0, **values)]}, "/v1/opinions")
    assert answer.status == 400
    assert (answer.body["error"]["param"], answer.body["error"]["code"]) == (param, code)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=2026-03-02T00:00:00Z&until=2026-03-01T00:00:00Z", "since"),
        ("since=2026-03-02T00:00:00", "query.since"),
        ("bucket_minutes=0", "query.bucket_minutes"),
        ("bucket_minutes=1", "bucket_minutes"),
        ("since=1950-03-02T00:00:00Z", "since"),
    ],
)
def test_a_bad_range_is_a_400(local: Endpoint, query: str, param: str) -> None:
    answer = local.get(f"/v1/opinions/trends?{query}")
    assert (answer.status, answer.body["error"]["param"]) == (400, param)


def test_alerts_are_a_list_that_may_be_empty(local: Endpoint) -> None:
    assert local.get("/v1/alerts").body == {"alerts": []}
    assert local.get("/v1/alerts?entity=%00").body == {"alerts": []}
    assert local.get("/v1/alerts?limit=0").status == 400
    assert local.post({"documents": []}, "/v1/opinions").status == 400
    assert local.post({"documents": [document(0)] * 9}, "/v1/opinions").status == 400
