"""Interactions and items as rows, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading

import pytest

from lib.recommender import store
from lib.recommender.store import Interaction

APP = "films"


def did(user: str, item: str, time: int, id: str = "", event: str = "view") -> Interaction:
    return Interaction(user, item, event, time, id)


def test_an_event_counts_once_and_a_history_is_in_order(either_database: str) -> None:
    assert store.add(APP, [did("u", "b", 20, "e2"), did("u", "a", 10, "e1"), did("v", "a", 5)]) == 3
    assert store.add(APP, [did("u", "b", 20, "e2"), did("u", "c", 30), did("u", "c", 30)]) == 1
    assert store.add(APP, [did("u", "c", 30)]) == 0  # without an id it has that of what it says
    assert store.add("other", [did("u", "z", 40, "e2")]) == 1
    assert [one.item for one in store.history(APP, "u", 10)] == ["a", "b", "c"]
    assert [one.item for one in store.history(APP, "u", 2)] == ["b", "c"]
    assert store.history(APP, "nobody", 10) == []
    assert store.history(APP, "u", 1) == [Interaction("u", "c", "view", 30, did("u", "c", 30).key)]


def test_many_at_once_from_several(either_database: str) -> None:
    batches = [[did("u", f"i{n}", n, f"e{n}") for n in range(start, start + 900)] for start in (0, 300, 600)]
    new: list[int] = []
    threads = [threading.Thread(target=lambda b=b: new.append(store.add(APP, b))) for b in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(new) == 1500
    assert len(store.history(APP, "u", 5000)) == 1500


def test_changed_items_are_told_until_they_were_seen(
    either_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = store.changed_items(APP, 0)
    assert found == {}
    store.put_items(APP, {"a": {"title": "A"}, "b": {"title": "B"}})
    store.put_items("other", {"c": {"title": "C"}})
    found, seen = store.changed_items(APP, seen)
    assert found == {"a": {"title": "A"}, "b": {"title": "B"}}
    store.put_items(APP, {"b": {"title": "B, again"}})
    found, seen = store.changed_items(APP, seen)
    assert found["b"] == {"title": "B, again"}
    # Much later only what is new is read.
    monkeypatch.setattr(store, "CLOCKS_NS", 0)
    assert store.changed_items(APP, seen) == ({}, seen)
