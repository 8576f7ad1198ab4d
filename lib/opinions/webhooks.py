"""Alerts to webhooks: signed, sent again until they are taken.

    POST URL
    X-Whorl-Delivery: 5d41402abc4b2a76b9719d911017c592
    X-Whorl-Timestamp: 1772355600
    X-Whorl-Signature: sha256=HMAC-SHA256(secret, "1772355600." + body), in hex
    {"type": "alert", "alert": {...}}

The receiver computes the same HMAC (RFC 2104) of the timestamp, a full stop and the body as it came, compares the two in
constant time, and refuses a timestamp that is long past, so that nobody can send an old message again: as Stripe's
webhooks are signed, in the form of GitHub's header. Any 2xx takes it. A message may come twice, with the same delivery
id: when the sender was killed before it had written down that it was taken.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import random
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx
from sqlalchemy import select, update

from lib import database
from lib.errors import ConfigError
from lib.opinions.tables import ALERTS, DELIVERIES, Alert
from lib.opinions.watch import read
from lib.settings import MonitoringSettings, WebhookSettings

logger = logging.getLogger(__name__)

WAIT_S, LONGEST_S = 10.0, 6 * 3600.0
SECRET_CHARS = 16
"""A shorter secret could be guessed."""
TOGETHER = 100
DELIVERED, FAILED, GIVEN_UP = "delivered", "failed", "given up"


def secret_of(webhook: WebhookSettings) -> str:
    """Raises ConfigError when the environment lacks it or it is too short."""
    found = os.environ.get(webhook.secret_env, "")
    if len(found) < SECRET_CHARS:
        what = "is not set" if not found else f"is shorter than {SECRET_CHARS} characters"
        raise ConfigError(
            f"monitoring.webhooks: the environment variable {webhook.secret_env} {what}; set it where the replicas "
            "run, such as before cluster.local up"
        )
    return found


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """What X-Whorl-Signature has to be."""
    return f"sha256={hmac.new(secret.encode(), b'%d.' % timestamp + body, hashlib.sha256).hexdigest()}"


def payload(alert: Alert) -> dict[str, Any]:
    """An alert as JSON; times in ISO 8601, UTC."""
    return {
        "id": alert.id,
        "application": alert.application,
        "entity": alert.entity,
        "topic": alert.topic or None,
        "window": {"begins": iso(alert.begins), "ends": iso(alert.ends)},
        "rules": list(alert.rules),
        "documents": alert.documents,
        "negative": alert.negative,
        "share": round(alert.share, 6),
        "usual": round(alert.usual, 6),
        "z": round(alert.z, 3),
        "cusum": round(alert.cusum, 3),
        "samples": list(alert.samples),
        "created": iso(int(alert.created)),
    }


def iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def shown(url: str) -> str:
    """A webhook's URL without what may be a secret in its path."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def wait(attempts: int, chance: random.Random) -> float:
    """Seconds until the next attempt after so many: they double, and half of each is drawn, so that those who failed
    together do not come together (Brooker, "Exponential Backoff And Jitter", AWS 2015: equal jitter)."""
    longest = min(LONGEST_S, WAIT_S * 2.0 ** (attempts - 1))
    return longest * (0.5 + chance.random() / 2)


def send(application: str, rules: MonitoringSettings, client: httpx.Client | None = None) -> Counter[str]:
    """Send what is due; how many were `delivered`, `failed` and are left for later, or are `given up`. Nothing is
    raised for them."""
    by_url = {webhook.url: webhook for webhook in rules.webhooks}
    due = select(DELIVERIES, *(column.label(f"alert_{column.name}") for column in ALERTS.c))
    due = due.join(ALERTS, ALERTS.c.id == DELIVERIES.c.alert)
    due = due.where(DELIVERIES.c.application == application, DELIVERIES.c.state == "waiting")
    due = due.where(DELIVERIES.c.next <= time.time()).order_by(DELIVERIES.c.next).limit(TOGETHER)
    with database.engine().connect() as db:
        rows = [dict(row) for row in db.execute(due).mappings()]
    outcomes: Counter[str] = Counter()
    own = client or httpx.Client(follow_redirects=False)
    try:
        for row in rows:
            webhook = by_url.get(row["url"])
            if webhook is None:
                _write(row, state=GIVEN_UP, outcome="the URL is not configured any more")
                outcomes[GIVEN_UP] += 1
            elif _claim(row, webhook):
                outcomes[_try(own, row, webhook)] += 1
    finally:
        if client is None:
            own.close()
    return outcomes


def _claim(row: dict[str, Any], webhook: WebhookSettings) -> bool:
    """Whether this process may send it now; if it is killed meanwhile, another may a while later."""
    later = time.time() + 2 * webhook.timeout_s + WAIT_S
    mine = update(DELIVERIES).where(DELIVERIES.c.id == row["id"], DELIVERIES.c.next == row["next"])
    with database.engine().begin() as db:
        return bool(db.execute(mine.where(DELIVERIES.c.state == "waiting").values(next=later)).rowcount)


def _try(client: httpx.Client, row: dict[str, Any], webhook: WebhookSettings) -> str:
    alert = read({column.name: row[f"alert_{column.name}"] for column in ALERTS.c})
    body = json.dumps({"type": "alert", "alert": payload(alert)}, ensure_ascii=False).encode()
    attempts, taken = row["attempts"] + 1, False
    try:
        now = int(time.time())
        headers = {
            "content-type": "application/json",
            "x-whorl-delivery": row["id"],
            "x-whorl-timestamp": str(now),
            "x-whorl-signature": signature(secret_of(webhook), now, body),
        }
        answer = client.post(webhook.url, content=body, headers=headers, timeout=webhook.timeout_s)
        taken, outcome = answer.is_success, f"HTTP {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, ConfigError) as error:
        outcome = str(error) if isinstance(error, ConfigError) else type(error).__name__
    if taken:
        _write(row, state=DELIVERED, attempts=attempts, outcome=outcome)
        return DELIVERED
    if attempts >= webhook.attempts:
        logger.error(
            "alert %s was given up for %s after %d attempts: %s",
            alert.id,
            shown(webhook.url),
            attempts,
            outcome,
        )
        _write(row, state=GIVEN_UP, attempts=attempts, outcome=outcome)
        return GIVEN_UP
    pause = wait(attempts, random.SystemRandom())
    logger.warning("alert %s was not taken (%s); again in %.0f s", alert.id, outcome, pause)
    _write(row, attempts=attempts, outcome=outcome, next=time.time() + pause)
    return FAILED


def _write(row: dict[str, Any], **values: Any) -> None:
    if "outcome" in values:
        values["outcome"] = values["outcome"][:200]
    with database.engine().begin() as db:
        db.execute(update(DELIVERIES).where(DELIVERIES.c.id == row["id"]).values(values))
