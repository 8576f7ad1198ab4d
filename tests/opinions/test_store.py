"""Documents are kept once, whatever their order; copies of one story count once."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, select

from lib import database
from lib.opinions import stories
from lib.opinions.store import add, document_id, trends
from lib.opinions.tables import DOCUMENTS, SERIES, Opinion

HOUR = 3600
STORY = (
    "The company said on Monday that it would recall two million cars because of faulty brakes sold since 2019 "
    "in Europe and Asia after reports of forty accidents"
)


def opinion(name: str, time: int, text: str = "bad", label: str = "negative", **values: Any) -> Opinion:
    given = {"source": "wire", "entity": "acme", "topic": "cars", "score": 0.9} | values
    return Opinion(id=name, time=time, label=label, text=text, **given)


def memory() -> Engine:
    from sqlalchemy.pool import StaticPool

    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    database.TABLES.create_all(engine)
    return engine


def counted(engine: Engine) -> set[str]:
    with engine.connect() as db:
        return set(db.execute(select(DOCUMENTS.c.id).where(DOCUMENTS.c.counted == 1)).scalars())


def test_an_id_is_kept_once(either_database: str) -> None:
    assert add("shop", [opinion("a", 10), opinion("a", 20), opinion("b", 30)], "negative") == 2
    assert add("shop", [opinion("b", 40), opinion("c", 50, label="positive")], "negative") == 1
    assert add("other", [opinion("a", 10)], "negative") == 1, "ids are an application's own"
    ((trend,),) = [trends("shop", 0, HOUR, HOUR, 1)]
    (point,) = trend.points
    assert (trend.entity, trend.topic) == ("acme", "cars")
    assert (point.begins, point.documents, point.negative, point.score) == (0, 3, 2, pytest.approx(0.9))


def test_an_id_of_its_own_names_the_same_document() -> None:
    one = document_id(10, "wire", "acme", "bad")
    assert document_id(10, "wire", "acme", "bad") == one
    assert len({one, document_id(11, "wire", "acme", "bad"), document_id(10, "wir", "eacme", "bad")}) == 3


def test_copies_are_one_story_and_other_texts_are_not() -> None:
    texts = [
        STORY,
        STORY.upper() + "!",
        f"UPDATE: {STORY}. Shares fell.",
        "I love this dress because it fits me very well and it looks great on me too",
    ]
    bands = [set(found) for found in stories.bands("acme", texts)]
    assert [len(bands[0] & found) > 0 for found in bands] == [True, True, True, False]
    assert bands[0] == bands[1]
    assert stories.bands("acme", ["boycott acme now"]) == [[]], "what many say in few words is no copy"
    assert not set(stories.bands("other", [STORY])[0]) & bands[0]
    # Kept in the database, so they may never change.
    assert stories.bands("acme", [STORY])[0][0] == "7109b134ad8a4a1289e2e955d0fc5379"


def test_the_earliest_of_a_story_counts_alone(either_database: str) -> None:
    engine = database.engine()
    add("shop", [opinion("later", 9000, STORY), opinion("short", 9000, "boycott them now")], "negative")
    assert counted(engine) == {"later", "short"}
    add(
        "shop",
        [opinion("first", 5000, f"{STORY}!"), opinion("said again", 5001, "boycott them now")],
        "negative",
    )
    assert counted(engine) == {"first", "short", "said again"}
    add("shop", [opinion("copy", 9500, STORY), opinion("elsewhere", 9500, STORY, entity="bmc")], "negative")
    assert counted(engine) == {"first", "short", "said again", "elsewhere"}


def words(start: int, number: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + number))


# A and C have few words in common; each is a copy of B.
CHAIN = [words(0, 60), words(6, 60), words(12, 60)]


def test_stories_that_turn_out_to_be_one_are_put_together() -> None:
    bands = [set(found) for found in stories.bands("acme", CHAIN)]
    assert bands[0] & bands[1]
    assert bands[1] & bands[2]
    for order in ([0, 1, 2], [0, 2, 1], [2, 0, 1]):
        engine = memory()
        for place in order:
            add("shop", [opinion(f"d{place}", 100 - place, CHAIN[place])], "negative", engine)
        assert counted(engine) == {"d2"}
        with engine.connect() as db:
            assert len(set(db.execute(select(DOCUMENTS.c.story)).scalars())) == 1
            assert db.execute(select(SERIES.c.changed)).scalar() == 98


POOL = [*CHAIN, STORY, f"{STORY}.", f"Now: {STORY}", "short one", "short one", words(500, 30), words(900, 9)]
documents = st.lists(
    st.builds(
        lambda text, time, topic, label: (text, time, topic, label),
        st.sampled_from(POOL),
        st.integers(0, 5 * HOUR),
        st.sampled_from(["cars", "jobs"]),
        st.sampled_from(["negative", "positive"]),
    ),
    min_size=1,
    max_size=25,
)


def state(engine: Engine) -> Any:
    with engine.connect() as db:
        rows = db.execute(select(DOCUMENTS.c.id, DOCUMENTS.c.story, DOCUMENTS.c.counted)).all()
        series = db.execute(select(SERIES.c.entity, SERIES.c.topic, SERIES.c.changed)).all()
    groups: dict[str, set[str]] = {}
    for name, story, _ in rows:
        groups.setdefault(story, set()).add(name)
    kept = {name for name, _, is_counted in rows if is_counted}
    assert all(len(group & kept) == 1 for group in groups.values())
    return sorted(map(sorted, groups.values())), kept, {(e, t) for e, t, _ in series}


@settings(max_examples=40, deadline=None)
@given(drawn=documents, seed=st.integers(0, 100), size=st.integers(1, 10))
def test_what_is_kept_does_not_depend_on_the_order_nor_on_the_batches(
    drawn: Sequence[tuple[str, int, str, str]], seed: int, size: int
) -> None:
    found = [
        opinion(f"d{number:02}", time, text, label, topic=topic)
        for number, (text, time, topic, label) in enumerate(drawn)
    ]
    once = memory()
    add("shop", found, "negative", once)
    shuffled = [*found, *random.Random(seed).choices(found, k=5)]  # some come twice
    random.Random(seed).shuffle(shuffled)
    parts = memory()
    new = sum(
        add("shop", shuffled[begin : begin + size], "negative", parts)
        for begin in range(0, len(shuffled), size)
    )
    assert new == len(found)
    assert state(parts) == state(once)
    assert trends("shop", 0, 6 * HOUR, HOUR, 3, engine=parts) == trends(
        "shop", 0, 6 * HOUR, HOUR, 3, engine=once
    )


def test_windows_of_a_trend_begin_before_it(storage: Path) -> None:
    found = [opinion(f"d{i}", i * HOUR + 5, label=["negative", "positive"][i % 2]) for i in range(6)]
    found = [replace(one, score=0.2 * i) for i, one in enumerate(found)]
    add("shop", [*found, opinion("x", 0, topic="jobs")], "negative")
    (trend,) = trends("shop", 3 * HOUR, 6 * HOUR, HOUR, 3, topic="cars")
    assert [p.begins // HOUR for p in trend.points] == [3, 4, 5]
    assert [(p.window_documents, p.window_negative) for p in trend.points] == [(3, 1), (3, 2), (3, 1)]
    assert trend.points[0].window_score == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    assert [t.topic for t in trends("shop", 0, 6 * HOUR, HOUR, 1)] == ["cars", "jobs"]
    assert [t.topic for t in trends("shop", 0, 6 * HOUR, HOUR, 1, most=1)] == ["cars"]
    assert trends("shop", 0, 6 * HOUR, HOUR, 1, entity="nobody") == []


def test_many_writers_lose_nothing(either_database: str) -> None:
    def write(writer: int) -> None:
        for number in range(10):
            add("shop", [opinion(f"{writer}-{number}", number, f"{STORY} {number}")], "negative")
            add("shop", [opinion(f"same-{number}", number, "short")], "negative")

    database.engine()
    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = database.engine()
    with engine.connect() as db:
        assert len(db.execute(select(DOCUMENTS.c.id)).all()) == 50
    assert len(counted(engine)) == 11, "ten short ones, and one story"
