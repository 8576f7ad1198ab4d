"""The endpoint over a real socket: its answers, and every way a client can get a request wrong."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from lib import events, keys
from lib.artifacts import ModelRef
from lib.settings import ServingSettings
from lib.storage import local_copy
from serve.metrics import exported
from tests.serve.collector import values
from tests.serve.conftest import LABELS, Endpoint, key, scraped, total

pytestmark = pytest.mark.ray

TEXTS = ["great fabric, love the fit", "awful", "the dress is okay " * 20, "size was bad"]


def test_it_is_seen_from_outside(endpoint: Endpoint) -> None:
    """Ray's metrics port, the replica's log and a collector tell of a request what it was, not what it said.

    First of all tests: a process tells its node what it counted up to ten seconds later.
    """
    import ray

    ours = {"application": "reviews"}
    before = scraped()
    for number in range(3):
        assert (
            endpoint.post({"inputs": ["secretly great", "awful"]}, x_request_id=f"seen-{number}").status
            == 200
        )
    endpoint.post({"inputs": ["great"]}, authorization="")

    def grown(name: str, **labels: str) -> float:
        return total(after, name, **labels, **ours) - total(before, name, **labels, **ours)

    deadline = time.monotonic() + 40
    while True:
        after = scraped()
        # The replica and Serve's controller tell each at times of their own.
        replica_told = grown("ray_whorl_refused_requests_total", reason="key") >= 1
        controller_told = total(after, "ray_serve_deployment_replica_healthy", **ours) >= 1
        if (replica_told and controller_told) or time.monotonic() > deadline:
            break
        time.sleep(1)
    route = {"route": "/v1/sentiment"}
    assert grown("ray_whorl_refused_requests_total", reason="key") == 1
    assert grown("ray_whorl_requests_total", status="2xx", **route) == 3
    assert grown("ray_whorl_requests_total", status="4xx", route="other") == 1
    assert grown("ray_whorl_request_duration_seconds_count", **route) == 3
    assert grown("ray_whorl_request_duration_seconds_bucket", le="+Inf", **route) == 3
    assert grown("ray_whorl_queue_wait_seconds_count") == 6
    assert 3 <= grown("ray_whorl_batch_rows_count") <= 6
    assert total(after, "ray_whorl_model_info", model="reviews@1", **ours) >= 1
    assert total(after, "ray_whorl_model_ready", **ours) >= 1
    assert ("ray_whorl_events_journal_bytes", "reviews") in {
        (name, dict(has).get("application")) for name, has in after
    }
    ours_alone = [(name, dict(has)) for name, has in after if name.startswith("ray_whorl_")]
    assert {name for name, _ in ours_alone} <= exported()
    assert not [has for _, has in ours_alone if endpoint.key in has.values() or "secretly" in str(has)]
    assert total(after, "ray_serve_deployment_replica_healthy", **ours) >= 1

    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    lines = [line for file in logs.glob("replica_reviews_*.log") for line in file.read_text().splitlines()]
    (line,) = [json.loads(line) for line in lines if '"seen-1"' in line and '"milliseconds"' in line]
    assert (line["request"], line["status"], line["model"]) == ("seen-1", 200, "reviews@1")
    assert line["application"] == "reviews"
    assert grown("ray_whorl_tokens_total") == 3 * line["tokens"] > 0
    assert not [line for line in lines if "secretly" in line or endpoint.key in line]

    assert endpoint.collector is not None
    while not any(values(span)["whorl.request.id"] == "seen-2" for span in endpoint.collector.spans):
        assert time.monotonic() < deadline + 20
        time.sleep(0.5)
    (span,) = [span for span in endpoint.collector.spans if values(span)["whorl.request.id"] == "seen-2"]
    assert (span.name, values(span)["whorl.model"]) == ("POST /v1/sentiment", "reviews@1")


def test_answers_agree_with_transformers(endpoint: Endpoint, store: Path) -> None:
    """A label and scores for each input, in order, as the model gives them in fp32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    answer = endpoint.post({"inputs": TEXTS})
    assert answer.status == 200
    with local_copy(ModelRef("reviews", 1).uri) as folder:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(TEXTS, truncation=True, max_length=32, padding=True, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    with torch.inference_mode():
        expected = torch.softmax(model(**encoded).logits, -1).numpy()
    for result, row in zip(answer.body["results"], expected, strict=True):
        scores = [result["scores"][label] for label in LABELS]
        np.testing.assert_allclose(scores, row, atol=0.02)
        assert result["label"] == LABELS[int(np.argmax(scores))]
        assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert [r["truncated"] for r in answer.body["results"]] == [False, False, True, False]
    assert (answer.body["model"], answer.body["version"]) == ("reviews", 1)


def test_the_same_text_gets_the_same_answer_alone_and_in_company(endpoint: Endpoint) -> None:
    alone = endpoint.post({"inputs": TEXTS[:1]}).body["results"][0]["scores"]
    together = endpoint.post({"inputs": TEXTS}).body["results"][0]["scores"]
    assert alone == pytest.approx(together, abs=0.02)


def test_request_id_is_the_clients_or_a_new_one(endpoint: Endpoint) -> None:
    given = endpoint.post({"inputs": ["fine"]}, x_request_id="order-17")
    assert given.body["request_id"] == given.headers["x-request-id"] == "order-17"
    made = [endpoint.post({"inputs": ["fine"]}) for _ in range(2)]
    assert made[0].body["request_id"] == made[0].headers["x-request-id"]
    assert made[0].body["request_id"] != made[1].body["request_id"]


def test_health_and_readiness(endpoint: Endpoint) -> None:
    assert endpoint.get("/healthz").body == {"status": "alive"}
    ready = endpoint.get("/readyz")
    assert ready.status == 200
    assert ready.body | {"engine": ""} == {
        "status": "ready",
        "model": "reviews",
        "version": 1,
        "engine": "",
        "failed": None,
        "trial": None,
    }


def test_docs_load_nothing_from_elsewhere(endpoint: Endpoint) -> None:
    page = endpoint.get("/docs")
    assert page.status == 200
    assert "http://" not in page.body
    assert "https://" not in page.body
    script = page.body.split('<script src="')[1].split('"')[0]
    assert endpoint.get(script).status == 200


def test_openapi_shows_examples_limits_and_errors(endpoint: Endpoint) -> None:
    schema = endpoint.get("/openapi.json").body
    request = schema["components"]["schemas"]["Request"]
    assert request["examples"][0]["inputs"]
    assert request["properties"]["inputs"]["maxItems"] == 8
    assert request["properties"]["inputs"]["items"]["maxLength"] == 500
    assert schema["components"]["schemas"]["Response"]["examples"][0]["results"]
    responses = schema["paths"]["/v1/sentiment"]["post"]["responses"]
    assert {"200", "4XX", "503"} <= set(responses)


BAD = [
    ("empty list", {"inputs": []}, "inputs", "too_short"),
    ("empty text", {"inputs": [""]}, "inputs.0", "string_too_short"),
    ("no inputs", {}, "inputs", "missing"),
    ("unknown key", {"inputs": ["a"], "texts": ["a"]}, "texts", "extra_forbidden"),
    ("a number", {"inputs": ["a", 5]}, "inputs.1", "string_type"),
    ("null", {"inputs": [None]}, "inputs.0", "string_type"),
    ("a string for the list", {"inputs": "great"}, "inputs", "list_type"),
    ("an object for the list", {"inputs": {"0": "great"}}, "inputs", "list_type"),
    ("too many inputs", {"inputs": ["a"] * 9}, "inputs", "too_long"),
    ("too long a text", {"inputs": ["a" * 501]}, "inputs.0", "string_too_long"),
    ("not an object", '["great"]', None, "model_attributes_type"),
    ("cut off", '{"inputs": ["great"', None, "invalid_json"),
    ("no body", "", None, "missing"),
    ("not JSON", "inputs=great", None, "invalid_json"),
    ("invalid UTF-8", b'{"inputs": ["gre\xff\xfet"]}', None, "invalid_json"),
    ("half a surrogate pair", '{"inputs": ["\\ud83d"]}', "inputs.0", "string_unicode"),
    ("NaN", '{"inputs": [NaN]}', "inputs.0", "string_type"),
    ("nested too deep", "[" * 9_000, None, "invalid_json"),
]


@pytest.mark.parametrize(("what", "body", "param", "code"), BAD, ids=[case[0] for case in BAD])
def test_a_bad_body_is_a_400_that_says_why(
    endpoint: Endpoint, what: str, body: Any, param: str | None, code: str
) -> None:
    answer = endpoint.post(body)
    assert answer.status == 400, what
    error = answer.body["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    assert "\n" not in error["message"]


def test_a_body_of_another_content_type_is_a_400(endpoint: Endpoint) -> None:
    answer = endpoint.post({"inputs": ["a"]}, content_type="text/plain")
    assert answer.status == 400
    assert "application/json" in answer.body["error"]["message"]


def test_a_request_id_that_is_not_fit_for_a_log_is_a_400(endpoint: Endpoint) -> None:
    for identity in ("two words", "x" * 129):
        answer = endpoint.post({"inputs": ["a"]}, x_request_id=identity)
        assert (answer.status, answer.body["error"]["param"]) == (400, "x-request-id")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_a_wrong_method_is_a_405_that_names_the_right_one(endpoint: Endpoint, method: str) -> None:
    answer = endpoint.get("/v1/sentiment", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    assert "use POST" in answer.body["error"]["message"]


def test_an_unknown_path_is_a_404(endpoint: Endpoint) -> None:
    answer = endpoint.post({"inputs": ["a"]}, "/v1/sentiments")
    assert (answer.status, answer.body["error"]["code"]) == (404, "not_found")


def test_a_long_body_is_a_413_by_its_declared_length(endpoint: Endpoint) -> None:
    answer = endpoint.post(b"x" * 20_001)
    assert (answer.status, answer.body["error"]["code"]) == (413, "body_too_large")


def test_a_long_body_is_a_413_as_it_arrives(endpoint: Endpoint) -> None:
    """Chunked: no length is declared."""
    parts = urlsplit(endpoint.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/sentiment HTTP/1.1\r\nhost: test\r\nconnection: close\r\n"
            b"authorization: Bearer " + endpoint.key.encode() + b"\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(5):
            connection.sendall(b"1388\r\n" + b"x" * 5000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        answer = b""
        while block := connection.recv(65536):
            answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_nobody_is_answered_without_a_key_of_the_application(endpoint: Endpoint) -> None:
    body = {"inputs": ["great"]}
    missing = endpoint.post(body, authorization="")
    assert (missing.status, missing.body["error"]["code"]) == (401, "invalid_api_key")
    # Before anything is read of it.
    assert endpoint.post("no json", authorization=f"Bearer {keys.PREFIX}x").status == 401
    other = endpoint.post(body, authorization=f"Bearer {key('else')}")
    assert (other.status, other.body["error"]["code"]) == (403, "not_in_scope")
    assert endpoint.post(body, authorization=f"Bearer {key('reviews')}").status == 200


def test_tokens_are_charged_to_the_key(endpoint: Endpoint) -> None:
    _, secret = keys.create("few", ["*"], tokens_per_minute=40)
    answers = [endpoint.post({"inputs": ["good " * 20]}, authorization=f"Bearer {secret}") for _ in range(3)]
    # 22 tokens each with their special ones; a debt is known when the next one asks.
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].body["error"]["code"] == "rate_limit_exceeded"
    assert 5 <= int(answers[2].headers["retry-after"]) <= 10


def test_answers_are_events_and_feedback_finds_them(endpoint: Endpoint) -> None:
    answer = endpoint.post({"inputs": ["great, says ada@example.com"]}, x_request_id="event-1")
    said = endpoint.post(
        {"request_id": "event-1", "rating": -1, "comment": "no, bob@example.com"}, "/v1/feedback"
    )
    assert (said.status, said.body) == (200, {"request_id": "event-1", "status": "kept"})
    (event,) = [row for row in events.read("reviews") if row["id"] == "event-1"]
    assert event["request"] == {"inputs": ["great, says <EMAIL_1>"]}
    assert event["answer"]["results"] == answer.body["results"]
    assert (event["model"], event["route"], event["status"]) == ("reviews@1", "/v1/sentiment", 200)
    assert event["tokens"] > 3
    assert keys.find(endpoint.key).id == event["key"]
    assert (event["feedback"]["rating"], event["feedback"]["comment"]) == (-1, "no, <EMAIL_1>")

    unknown = endpoint.post({"request_id": "nobodys", "rating": 1}, "/v1/feedback")
    assert (unknown.status, unknown.body["error"]["code"]) == (404, "unknown_request")
    empty = endpoint.post({"request_id": "event-1"}, "/v1/feedback")
    assert empty.status == 400
    assert "at least one of rating, label" in empty.body["error"]["message"]
    assert endpoint.post({"request_id": "event-1", "rating": 2}, "/v1/feedback").status == 400


def test_after_all_that_the_replica_still_answers(endpoint: Endpoint) -> None:
    assert endpoint.post({"inputs": ["great"]}).status == 200


def test_a_request_at_every_limit_is_answered(endpoint: Endpoint) -> None:
    answer = endpoint.post({"inputs": ["good " * 100] * 8})
    assert answer.status == 200
    assert all(result["truncated"] for result in answer.body["results"])


def test_default_limits_hold_the_largest_request_they_allow() -> None:
    """A body of max_inputs texts of ordinary length is not refused for its bytes."""
    serving = ServingSettings()
    assert serving.max_body_bytes > serving.max_inputs * 4_000
