"""What changed → detect → alerts, each once, however many processes look and wherever one is killed.

A series is looked at again from where its counts changed. Its alerts, what is to be sent of them and that it was looked
at are one transaction, which holds only if nothing came in between: then it is done anew.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from lib import database
from lib.opinions import detect
from lib.opinions.detect import Surge
from lib.opinions.store import counts
from lib.opinions.tables import ALERTS, DELIVERIES, DOCUMENTS, SERIES, Alert
from lib.settings import MonitoringSettings

SAMPLES = 5


def look(
    application: str, rules: MonitoringSettings, now: float | None = None, engine: Engine | None = None
) -> list[Alert]:
    """Look at all series that changed, as far as their buckets are over at `now` (seconds since 1970); the alerts
    that are new."""
    engine, now = engine or database.engine(), time.time() if now is None else now
    until = int((now - rules.lateness_minutes * 60) // rules.bucket_s) * rules.bucket_s
    changed = select(SERIES).where(SERIES.c.application == application, SERIES.c.changed < until)
    with engine.connect() as db:
        rows = [dict(row) for row in db.execute(changed).mappings()]
    return [alert for row in rows for alert in _look(engine, row, rules, until, now)]


def _look(
    engine: Engine, row: dict[str, Any], rules: MonitoringSettings, until: int, now: float
) -> list[Alert]:
    step, series = rules.bucket_s, (row["application"], row["entity"], row["topic"])
    start = row["changed"] // step
    base = max(0, start - detect.run_in(rules))
    with engine.connect() as db:
        documents, negative = counts(db, *series, base * step, until, step)
        known = [ends // step - 1 - base for ends in _told(db, series, base * step, rules)]
    surges = detect.scan(documents, negative, rules, start - base, known)
    alerts = []
    for surge in surges:
        with engine.connect() as db:
            alerts.append(_alert(db, series, surge, base, rules, now))
    # A window whose oldest documents leave it is another window, even if nothing new comes.
    goes_on = documents[-rules.buckets(rules.window_hours) :].any()
    pair = (SERIES.c.application, SERIES.c.entity, SERIES.c.topic)
    done = update(SERIES).where(*(column == value for column, value in zip(pair, series, strict=True)))
    done = done.where(SERIES.c.revision == row["revision"])
    done = done.values(changed=until if goes_on else _later(series, until), revision=SERIES.c.revision + 1)
    try:
        with engine.begin() as db:
            if not db.execute(done).rowcount:
                return []  # changed meanwhile, or somebody else looked: the next round sees what there is
            for alert in alerts:
                db.execute(insert(ALERTS).values(_row(alert)))
                if now - alert.ends < rules.cooldown_hours * 3600:  # what is older is history, not news
                    _send(db, alert, rules, now)
    except IntegrityError:
        return []
    return alerts


def _later(series: tuple[str, str, str], until: int) -> Any:
    """When the first document after `until` was; none, none."""
    c = DOCUMENTS.c
    query = select(func.min(c.time)).where(
        c.application == series[0], c.entity == series[1], c.topic == series[2]
    )
    return query.where(c.time >= until, c.counted == 1).scalar_subquery()


def _told(db: Connection, series: tuple[str, str, str], begin: int, rules: MonitoringSettings) -> list[int]:
    """When the windows ended of which alerts were raised."""
    c = ALERTS.c
    query = select(c.ends).where(c.application == series[0], c.entity == series[1], c.topic == series[2])
    return list(db.execute(query.where(c.ends > begin - rules.cooldown_hours * 3600)).scalars())


def _alert(
    db: Connection,
    series: tuple[str, str, str],
    surge: Surge,
    base: int,
    rules: MonitoringSettings,
    now: float,
) -> Alert:
    application, entity, topic = series
    ends = (base + surge.bucket + 1) * rules.bucket_s
    begins = ends - rules.buckets(rules.window_hours) * rules.bucket_s
    c = DOCUMENTS.c
    query = select(c.id).where(c.application == application, c.entity == entity, c.topic == topic)
    query = query.where(c.time >= begins, c.time < ends, c.counted == 1, c.negative == 1)
    samples = db.execute(query.order_by(c.score.desc(), c.time, c.id).limit(SAMPLES)).scalars()
    name = hashlib.blake2b("\0".join((*series, str(ends))).encode(), digest_size=16).hexdigest()
    return Alert(
        name, application, entity, topic, begins, ends, surge.rules, surge.documents, surge.negative,
        surge.usual, surge.z, surge.cusum, tuple(samples), now,
    )  # fmt: skip


def _row(alert: Alert) -> dict[str, Any]:
    return vars(alert) | {"rules": " ".join(alert.rules), "samples": json.dumps(alert.samples)}


def _send(db: Connection, alert: Alert, rules: MonitoringSettings, now: float) -> None:
    """Leave what is to be sent where `webhooks.send` finds it."""
    for webhook in rules.webhooks:
        row = {
            "id": uuid.uuid4().hex,
            "alert": alert.id,
            "application": alert.application,
            "url": webhook.url,
        }
        db.execute(insert(DELIVERIES).values(row | {"state": "waiting", "attempts": 0, "next": now}))


def alerts(
    application: str,
    entity: str | None = None,
    topic: str | None = None,
    since: float | None = None,
    until: float | None = None,
    most: int = 100,
    engine: Engine | None = None,
) -> list[tuple[Alert, list[dict[str, Any]]]]:
    """Alerts whose windows ended in that time, the latest first, each with what became of its deliveries."""
    c = ALERTS.c
    query = select(ALERTS).where(c.application == application)
    given = ((c.entity, entity), (c.topic, topic))
    query = query.where(*(column == value for column, value in given if value is not None))
    query = query.where(*([c.ends >= since] if since is not None else []))
    query = query.where(*([c.ends < until] if until is not None else []))
    with (engine or database.engine()).connect() as db:
        rows = db.execute(query.order_by(c.ends.desc(), c.id).limit(most)).mappings().all()
        sent: dict[str, list[dict[str, Any]]] = {row["id"]: [] for row in rows}
        of_these = select(DELIVERIES).where(DELIVERIES.c.alert.in_(list(sent))).order_by(DELIVERIES.c.url)
        for delivery in db.execute(of_these).mappings():
            sent[delivery["alert"]].append(dict(delivery))
    return [(read(dict(row)), sent[row["id"]]) for row in rows]


def read(row: dict[str, Any]) -> Alert:
    """A row of the database as an alert."""
    return Alert(**row | {"rules": tuple(row["rules"].split()), "samples": tuple(json.loads(row["samples"]))})
