"""Opinions over a real socket: scored as /v1/sentiment does, kept, counted; a surge reaches a webhook once."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cluster.ingress import free_port
from lib import events, storage
from lib.artifacts import ModelRef, TaskFile
from lib.errors import ConfigError, ModelError
from lib.registry import VERSION_FILE
from lib.settings import MonitoringSettings, Settings
from lib.storage import local_copy
from serve.opinions import Watching
from serve.sentiment import Arguments, Model
from tests.opinions.test_watch import RULES
from tests.opinions.test_webhooks import SECRET, Receiver
from tests.serve.conftest import LABELS, Endpoint, key, make_settings, scraped, total

HOUR = timedelta(hours=1)
# The last 96 whole hours, a while ago.
BEGIN = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 97 * HOUR
SURGE = 92


@dataclass(frozen=True)
class Monitored:
    endpoint: Endpoint
    receiver: Receiver
    bad: str
    """A text that the model calls negative."""
    good: str

    def document(self, hour: int, bad: bool, **values: Any) -> dict[str, Any]:
        text = self.bad if bad else self.good
        at = (BEGIN + hour * HOUR + timedelta(seconds=30)).isoformat()
        return {"text": text, "time": at, "source": "web", "entity": "acme", "topic": "cars"} | values

    def send(self, *documents: dict[str, Any]) -> Any:
        answer = self.endpoint.post({"documents": list(documents)}, "/v1/opinions")
        assert answer.status == 200, answer.body
        return answer.body


def publish_decided(base: Path) -> tuple[str, str, str]:
    """reviews@5: reviews@1, whose weights are random, with a head that tells apart the two texts which lie farthest from
    each other, whatever the precision. The two texts, and the first's label."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lib.tasks import sentiment

    words = ["great", "awful", "dress", "size", "fabric", "love", "poor", "soft", "color", "okay"]
    texts = [f"{a} {b}" for a in words for b in words]
    with local_copy(ModelRef("reviews", 1).uri) as folder:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        encoded = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
        info = TaskFile.read(folder, "sentiment")
    with torch.no_grad():
        vectors = model.base_model(**encoded).pooler_output
        first, second = divmod(int(torch.cdist(vectors, vectors).argmax()), len(texts))
        apart = vectors[first] - vectors[second]
        apart *= 8 / apart.square().sum()  # the two's logits lie 8 apart
        middle = apart @ (vectors[first] + vectors[second]) / 2
        model.classifier.weight.copy_(torch.stack([apart, -apart, 0 * apart]))
        model.classifier.bias.copy_(torch.stack([-middle, middle, torch.tensor(-20.0)]))
    ref = ModelRef("reviews", 5)
    with storage.publish(ref.uri) as folder:
        sentiment.save(model, base, info, folder)
        files = {path.name: storage.checksum(str(path)) for path in folder.iterdir()}
        storage.write_json(str(folder / VERSION_FILE), {"files": files})
    return texts[first], texts[second], LABELS[0]


@pytest.fixture(scope="module")
def monitored(store: Path, tiny_base: Path, ray_cluster: None) -> Iterator[Monitored]:
    """reviews@5 on two replicas, whose alerts go to a server of this test."""
    from ray import serve as ray_serve

    from serve.deploy import deploy

    bad, good, negative = publish_decided(tiny_base)
    receiver = Receiver(500, 200)
    hooks = [{"url": receiver.url, "secret_env": "WHORL_TEST_SECRET"}]
    rules = RULES.model_dump(mode="json") | {"negative": negative, "every_s": 0.5, "webhooks": hooks}
    settings = make_settings(
        model="reviews@5", port=free_port(), min_replicas=2, max_replicas=2, max_chars=500
    )
    settings = Settings.model_validate(settings.model_dump(mode="json") | {"monitoring": rules})
    yield Monitored(Endpoint(deploy(settings), settings, key()), receiver, bad, good)
    ray_serve.shutdown()
    receiver.server.shutdown()


@pytest.mark.ray
def test_documents_are_scored_as_sentiment_does_and_kept_once(monitored: Monitored) -> None:
    both = [
        monitored.document(0, True, entity="first", id="one"),
        monitored.document(1, False, entity="first"),
    ]
    body = monitored.send(*both)
    expected = monitored.endpoint.post({"inputs": [monitored.bad, monitored.good]}).body["results"]
    assert [r["label"] for r in body["results"]] == [r["label"] for r in expected]
    assert body["results"][0]["scores"] == pytest.approx(expected[0]["scores"], abs=0.02)
    assert (body["results"][0]["id"], body["results"][0]["topic"], body["new"]) == ("one", "cars", 2)
    again = monitored.send(*both)
    assert again["new"] == 0
    assert again["results"][1]["id"] == body["results"][1]["id"]
    assert monitored.endpoint.post({"documents": []}, "/v1/opinions", authorization="").status == 401


@pytest.mark.ray
def test_a_surge_is_an_alert_and_reaches_the_webhook_signed(monitored: Monitored) -> None:
    before = scraped()
    for hour in range(96):
        each = [monitored.document(hour, n % 5 == 0 or hour == SURGE, id=f"{hour}-{n}") for n in range(10)]
        monitored.send(*each)
    deadline = time.monotonic() + 90
    while not (
        alerts := [
            alert
            for alert in monitored.endpoint.get("/v1/alerts?entity=acme").body["alerts"]
            if alert["deliveries"][0]["state"] == "delivered"
        ]
    ):
        assert time.monotonic() < deadline, monitored.endpoint.get("/v1/alerts").body
        time.sleep(0.2)
    (alert,) = alerts
    assert alert["window"]["ends"] == (BEGIN + (SURGE + 1) * HOUR).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (alert["documents"], alert["negative"], alert["topic"]) == (20, 12, "cars")
    assert alert["deliveries"][0]["attempts"] == 2, "the first was answered 500"
    assert alert["deliveries"][0]["url"] == monitored.receiver.url.removesuffix("/hook")
    assert len(monitored.receiver.got) == 2, "of two replicas one sends"
    for headers, body in monitored.receiver.got:
        signed = headers["x-whorl-timestamp"].encode() + b"." + body
        assert (
            headers["x-whorl-signature"]
            == f"sha256={hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()}"
        )
        assert json.loads(body)["alert"]["id"] == alert["id"]

    def grown(name: str, **labels: str) -> float:
        names = {"application": "reviews", **labels}
        return total(after, name, **names) - total(before, name, **names)

    while True:  # a process tells its node what it counted up to ten seconds later
        after = scraped()
        if grown("ray_whorl_webhooks_total", outcome="delivered") >= 1 or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert grown("ray_whorl_alerts_total") == 1
    assert grown("ray_whorl_webhooks_total", outcome="failed") == 1
    assert grown("ray_whorl_webhooks_total", outcome="delivered") == 1
    assert grown("ray_whorl_opinions_total") >= 960  # those of the test before may be told only now
    assert monitored.endpoint.get("/v1/alerts?topic=jobs").body == {"alerts": []}
    later = quote((BEGIN + 94 * HOUR).isoformat())
    assert monitored.endpoint.get(f"/v1/alerts?since={later}").body == {"alerts": []}


@pytest.mark.ray
def test_what_was_sent_is_an_event_without_personal_data(monitored: Monitored) -> None:
    document = monitored.document(0, True, entity="events", text="bad, says ada@example.com")
    answer = monitored.endpoint.post({"documents": [document]}, "/v1/opinions", x_request_id="opinion-1")
    assert answer.status == 200
    said = {"request_id": "opinion-1", "label": LABELS[0]}
    assert monitored.endpoint.post(said, "/v1/feedback").status == 200
    (event,) = [row for row in events.read("reviews") if row["id"] == "opinion-1"]
    assert event["request"]["documents"][0]["text"] == "bad, says <EMAIL_1>"
    assert (event["route"], event["model"]) == ("/v1/opinions", "reviews@5")
    from lib.tasks import sentiment

    assert sentiment.from_feedback(event) == [{"text": "bad, says <EMAIL_1>", "label": LABELS[0]}]


def test_a_model_that_lacks_the_label_is_not_served(store: Path) -> None:
    rules = MonitoringSettings(negative="negativ")
    with local_copy(ModelRef("reviews", 1).uri) as folder, pytest.raises(ModelError) as caught:
        Model(folder, Arguments(monitoring=rules))
    assert str(caught.value).startswith(
        "monitoring.negative: no label 'negativ'; did you mean 'negative'? (labels: negative, neutral, positive)"
    )


def test_without_the_secret_nothing_is_watched(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="HOOK_SECRET is not set"):
        Watching("shop", RULES)
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    watching = Watching("shop", RULES.model_copy(update={"every_s": 0.01}))
    watching.close()
