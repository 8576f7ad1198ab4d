"""Alerts over a real socket: signed, sent again until they are taken, given up in the end."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import select, update

from cluster.ingress import free_port
from lib import database
from lib.errors import ConfigError
from lib.opinions import watch, webhooks
from lib.opinions.store import add
from lib.opinions.tables import DELIVERIES
from lib.settings import MonitoringSettings, WebhookSettings
from tests.opinions.test_watch import RULES, at, history

SECRET = "a secret of the tests"


class Receiver:
    """A server that answers with `statuses`, one after another, the last for ever; `got` is what came."""

    def __init__(self, *statuses: int) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answered: Callable[[], None] = lambda: None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                owner.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                status = statuses[min(len(owner.got), len(statuses)) - 1]
                self.send_response(status)
                if status == 302:
                    self.send_header("location", owner.url)
                self.send_header("content-length", "0")
                self.end_headers()
                owner.answered()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receive(storage: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Receiver]]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    made: list[Receiver] = []

    def start(*statuses: int) -> Receiver:
        made.append(Receiver(*statuses))
        return made[-1]

    yield start
    for receiver in made:
        receiver.server.shutdown()
        receiver.server.server_close()


def rules(*urls: str, **values: Any) -> MonitoringSettings:
    hooks = [{"url": url, "secret_env": "HOOK_SECRET", **values} for url in urls]
    return MonitoringSettings.model_validate(RULES.model_dump(mode="json") | {"webhooks": hooks})


def alarm(given: MonitoringSettings) -> Any:
    add("shop", history(4, (80,)), "negative")
    (alert,) = watch.look("shop", given, at(82))
    return alert


def deliveries() -> list[dict[str, Any]]:
    with database.engine().connect() as db:
        return [dict(row) for row in db.execute(select(DELIVERIES).order_by(DELIVERIES.c.url)).mappings()]


def due() -> None:
    """As if the waiting time were over."""
    with database.engine().begin() as db:
        db.execute(update(DELIVERIES).values(next=time.time() - 1))


def test_what_fails_is_sent_again_until_it_is_taken(receive: Callable[..., Receiver]) -> None:
    receiver = receive(500, 404, 302, 204)
    given = rules(receiver.url)
    alert = alarm(given)
    for attempts, outcome in enumerate(("HTTP 500", "HTTP 404", "HTTP 302"), 1):
        assert webhooks.send("shop", given)["delivered"] == 0
        (row,) = deliveries()
        assert (row["state"], row["attempts"], row["outcome"]) == ("waiting", attempts, outcome)
        wait = row["next"] - time.time()
        assert 5 * 2 ** (attempts - 1) - 1 < wait <= 10 * 2 ** (attempts - 1)
        assert webhooks.send("shop", given)["delivered"] == 0
        assert len(receiver.got) == attempts, "not before its time, and no redirect is followed"
        due()
    assert webhooks.send("shop", given)["delivered"] == 1
    (row,) = deliveries()
    assert (row["state"], row["attempts"], row["outcome"]) == ("delivered", 4, "HTTP 204")
    due()
    assert webhooks.send("shop", given)["delivered"] == 0
    assert len(receiver.got) == 4

    assert len({headers["x-whorl-delivery"] for headers, _ in receiver.got}) == 1
    headers, body = receiver.got[-1]
    signed = f"{headers['x-whorl-timestamp']}.".encode() + body
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(headers["x-whorl-signature"], f"sha256={expected}")
    assert abs(time.time() - int(headers["x-whorl-timestamp"])) < 60
    message = json.loads(body)
    assert message["type"] == "alert"
    assert message["alert"]["id"] == alert.id
    assert message["alert"]["share"] == 0.6
    assert message["alert"]["window"] == {
        "begins": webhooks.iso(alert.begins),
        "ends": webhooks.iso(alert.ends),
    }
    assert message["alert"]["samples"] == list(alert.samples)


def test_the_signature_depends_on_secret_time_and_body() -> None:
    # printf '12.{}' | openssl dgst -sha256 -hmac secret
    assert (
        webhooks.signature("secret", 12, b"{}")
        == "sha256=773e3168d620c0ffe05ebb73e13b0cded4fe6220daed68d8fcb2a796f2d784dc"
    )
    others = {
        webhooks.signature(*given)
        for given in (("Secret", 12, b"{}"), ("secret", 13, b"{}"), ("secret", 12, b"[]"))
    }
    assert len(others | {webhooks.signature("secret", 12, b"{}")}) == 4


def test_a_receiver_that_is_not_there_is_tried_again_and_given_up(
    receive: Callable[..., Receiver], caplog: pytest.LogCaptureFixture
) -> None:
    taker = receive(200)
    given = rules(f"http://127.0.0.1:{free_port()}/hook", taker.url, attempts=2)
    alarm(given)
    assert webhooks.send("shop", given)["delivered"] == 1, "one that is away stops no other"
    due()
    webhooks.send("shop", given)
    states = {row["url"]: (row["state"], row["outcome"]) for row in deliveries()}
    assert states[taker.url] == ("delivered", "HTTP 200")
    assert states[given.webhooks[0].url] == ("given up", "ConnectError")
    assert "was given up" in caplog.text
    assert SECRET not in caplog.text
    due()
    assert webhooks.send("shop", given)["delivered"] == 0
    assert len(taker.got) == 1


def test_a_sender_that_was_killed_before_it_wrote_down_is_followed_by_another(
    receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(200)
    given = rules(receiver.url)
    alarm(given)
    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "_write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            webhooks.send("shop", given)
    assert webhooks.send("shop", given)["delivered"] == 0, "it may be under way"
    due()
    assert webhooks.send("shop", given)["delivered"] == 1
    assert len({headers["x-whorl-delivery"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 2


def test_many_senders_send_it_once(receive: Callable[..., Receiver]) -> None:
    receiver = receive(200)
    given = rules(receiver.url)
    alarm(given)
    threads = [threading.Thread(target=webhooks.send, args=("shop", given)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.got) == 1


def test_a_url_that_is_no_more_and_a_secret_that_is_not_set(
    receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(200)
    given = rules(receiver.url)
    alarm(given)
    monkeypatch.delenv("HOOK_SECRET")
    with pytest.raises(ConfigError, match="the environment variable HOOK_SECRET is not set; set it where"):
        webhooks.secret_of(given.webhooks[0])
    assert webhooks.send("shop", given)["delivered"] == 0
    assert deliveries()[0]["state"] == "waiting"
    assert "HOOK_SECRET is not set" in deliveries()[0]["outcome"]
    monkeypatch.setenv("HOOK_SECRET", "short")
    with pytest.raises(ConfigError, match="is shorter than 16 characters"):
        webhooks.secret_of(given.webhooks[0])
    due()
    webhooks.send("shop", rules())
    assert (deliveries()[0]["state"], receiver.got) == ("given up", [])


def test_waits_double_up_to_a_longest_and_half_of_each_is_chance() -> None:
    chance = random.Random(0)
    for attempts, longest in ((1, 10), (2, 20), (5, 160), (12, 20_480), (13, 21_600), (40, 21_600)):
        waits = [webhooks.wait(attempts, chance) for _ in range(200)]
        assert longest / 2 <= min(waits) < longest * 0.6
        assert longest * 0.9 < max(waits) <= longest


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("example.com/hook", "must be an http or https URL with a host"),
        ("ftp://example.com/hook", "must be an http or https URL with a host"),
        ("https:///hook", "must be an http or https URL with a host"),
        ("https://example.com:99999/", "is not a URL"),
        ("https://me:word@example.com/", "neither user name and password"),
        ("https://example.com/a b", "neither user name and password"),
    ],
)
def test_urls_are_checked(url: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        WebhookSettings(url=url, secret_env="HOOK_SECRET")
    assert "word" not in caught.value.errors()[0]["msg"].replace("password", "")
