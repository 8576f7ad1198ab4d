"""Alerts come of what is stored, each once: whoever looks, however often, and whatever comes late."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, update

from lib import database
from lib.opinions import lease, watch
from lib.opinions.store import add
from lib.opinions.tables import DELIVERIES, SERIES, Alert, Opinion
from lib.settings import MonitoringSettings
from tests.opinions.test_store import STORY

HOUR = 3600
WEBHOOK = {"url": "https://example.com/hook", "secret_env": "HOOK_SECRET"}
RULES = MonitoringSettings.model_validate(
    {
        "window_hours": 2, "season_hours": 24, "seasons": 7, "min_history_hours": 24, "min_documents": 10,
        "cooldown_hours": 12, "lateness_minutes": 10, "webhooks": [WEBHOOK],
    }
)  # fmt: skip
BEGIN = 480_000 * HOUR  # a whole day


def history(days: int, surges: tuple[int, ...] = (), each: int = 10, seed: int = 0) -> list[Opinion]:
    """`each` documents an hour, one of five negative; all of them in the hours of `surges`."""
    random, found = np.random.default_rng(seed), []
    for hour in range(24 * days):
        for number in range(each):
            bad = hour in surges or number % 5 == 0
            at = BEGIN + hour * HOUR + int(random.integers(HOUR))
            found.append(said(f"{hour:04}-{number}", at, bad))
    return found


def said(name: str, at: int, bad: bool, **values: Any) -> Opinion:
    label = "negative" if bad else "positive"
    given = {"source": "web", "entity": "acme", "topic": "cars", "score": 0.9 if bad else 0.1, "text": "so"}
    return Opinion(id=name, time=at, label=label, **(given | values))


def hours(alerts: list[Alert]) -> list[int]:
    """The last hour of each alert's window."""
    return [(alert.ends - BEGIN) // HOUR - 1 for alert in alerts]


def at(hour: float) -> float:
    return BEGIN + hour * HOUR


def deliveries() -> int:
    with database.engine().connect() as db:
        return int(db.execute(select(func.count()).select_from(DELIVERIES)).scalar_one())


def test_a_surge_is_an_alert_with_its_figures_and_samples(either_database: str) -> None:
    add("shop", history(4, (80,)), "negative")
    (alert,) = watch.look("shop", RULES, at(82))
    assert hours([alert]) == [80]
    assert (alert.ends - alert.begins, alert.entity, alert.topic) == (2 * HOUR, "acme", "cars")
    assert (alert.documents, alert.negative, alert.share) == (20, 12, 0.6)
    assert alert.usual == pytest.approx(0.2)
    assert len(alert.samples) == 5
    assert all(name.startswith(("0079-", "0080-")) for name in alert.samples)
    ((kept, sent),) = watch.alerts("shop")
    assert kept == alert
    assert [(row["url"], row["state"], row["attempts"]) for row in sent] == [(WEBHOOK["url"], "waiting", 0)]
    assert watch.alerts("shop", entity="bmc") == []
    assert watch.alerts("shop", topic="cars", since=alert.ends, until=alert.ends + 1) != []
    assert watch.alerts("shop", since=alert.ends + 1) == []
    assert watch.look("shop", RULES, at(90)) == [], "once"
    assert watch.look("other", RULES, at(90)) == []


def test_a_bucket_is_looked_at_when_it_is_over(storage: Path) -> None:
    add("shop", history(4, (80,)), "negative")
    assert watch.look("shop", RULES, at(81) + 599) == [], "it ended, and what is late is waited for"
    assert hours(watch.look("shop", RULES, at(81) + 600)) == [80]


def test_looked_at_each_hour_it_is_the_same_as_once(storage: Path) -> None:
    documents = history(6, (60, 61, 100, 101, 103))
    by_hour: dict[int, list[Opinion]] = {}
    for one in documents:
        by_hour.setdefault((one.time - BEGIN) // HOUR, []).append(one)
    found = []
    for hour, some in sorted(by_hour.items()):
        add("shop", some, "negative")
        found += watch.look("shop", RULES, at(hour + 1) + 600)
    add("once", documents, "negative")
    whole = watch.look("once", RULES, at(144) + 600)
    assert hours(found) == hours(whole) == [60, 100]
    assert [alert.z for alert in found] == [alert.z for alert in whole]


def test_what_comes_late_is_looked_at_too_and_says_nothing_twice(either_database: str) -> None:
    documents = history(4, (70, 71))
    late = [one for one in documents if BEGIN + 71 * HOUR <= one.time < BEGIN + 72 * HOUR or "0070" in one.id]
    add("shop", [one for one in documents if one not in late], "negative")
    assert watch.look("shop", RULES, at(96)) == []
    add("shop", [one for one in late if "0071" in one.id], "negative")
    assert hours(watch.look("shop", RULES, at(96))) == [71]
    add("shop", [one for one in late if "0070" in one.id], "negative")
    assert watch.look("shop", RULES, at(96)) == [], "it would have been seen an hour sooner, but it was seen"


def test_copies_of_one_story_are_no_surge(either_database: str) -> None:
    add("shop", history(4), "negative")
    copies = [said(f"copy-{number}", BEGIN + 80 * HOUR + number, True, text=STORY) for number in range(60)]
    add("shop", copies, "negative")
    assert watch.look("shop", RULES, at(96)) == []
    own = [
        said(f"own-{number}", BEGIN + 80 * HOUR + number, True, text=f"bad {number}") for number in range(60)
    ]
    add("shop", own, "negative")
    assert hours(watch.look("shop", RULES, at(96))) == [80]


def test_history_is_stored_and_not_sent(storage: Path) -> None:
    add("shop", history(4, (80,)), "negative")
    assert hours(watch.look("shop", RULES, at(81 + 13))) == [80]
    assert deliveries() == 0


def test_many_who_look_at_once_raise_it_once(either_database: str) -> None:
    add("shop", history(4, (80,)), "negative")
    found: list[Alert] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.extend(watch.look("shop", RULES, at(82)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hours(found) == [80]
    assert len(watch.alerts("shop")) == deliveries() == 1


def test_what_came_while_somebody_looked_is_not_lost(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = history(4, (80,))
    late = documents.pop()
    add("shop", documents, "negative")
    scan = watch.detect.scan

    def slow(*arguments: Any) -> Any:
        found = scan(*arguments)
        add("shop", [late], "negative")
        return found

    monkeypatch.setattr(watch.detect, "scan", slow)
    assert watch.look("shop", RULES, at(97)) == [], "done with what is no more: nothing is written"
    assert watch.alerts("shop") == []
    monkeypatch.setattr(watch.detect, "scan", scan)
    assert hours(watch.look("shop", RULES, at(97))) == [80]


def test_a_process_that_is_killed_in_between_leaves_nothing_half_written(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("shop", history(4, (80,)), "negative")
    with monkeypatch.context() as patch:
        patch.setattr(watch, "_send", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            watch.look("shop", RULES, at(82))
    assert watch.alerts("shop") == []
    assert hours(watch.look("shop", RULES, at(82))) == [80]
    assert deliveries() == 1


def test_a_series_that_does_not_change_is_left_alone(storage: Path) -> None:
    add("shop", history(2), "negative")
    watch.look("shop", RULES, at(48) + 600)
    watch.look("shop", RULES, at(60))
    with database.engine().begin() as db:
        assert db.execute(select(SERIES.c.changed)).scalar() is None
        before = db.execute(select(SERIES.c.revision)).scalar()
    watch.look("shop", RULES, at(80))
    with database.engine().connect() as db:
        assert db.execute(select(SERIES.c.revision)).scalar() == before
        assert db.execute(update(SERIES).values(changed=None)).rowcount == 1


def test_a_lease_is_held_by_one_and_ends(either_database: str) -> None:
    now = time.time()
    assert lease.hold("watch", "a", 30, now)
    assert not lease.hold("watch", "b", 30, now + 29)
    assert lease.hold("watch", "a", 30, now + 29)
    assert not lease.hold("watch", "b", 30, now + 58)
    assert lease.hold("watch", "b", 30, now + 60)
    assert not lease.hold("watch", "a", 30, now + 61)
    assert lease.hold("other", "a", 30, now + 61)
