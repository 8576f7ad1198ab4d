"""Documents into the database, once each; counts by topic, entity and time out of it.

What comes in changes the same rows whatever its order: an id that is there stays as it is, stories that turn out to be
one are put together, and of each the earliest document counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, case, func, select, text, update

from lib import database
from lib.opinions import stories
from lib.opinions.detect import Counts, sliding
from lib.opinions.tables import DOCUMENTS, SERIES, STORY_BANDS, Opinion, inserting

TOGETHER = 500
"""Documents of one transaction."""


def document_id(time: int, source: str, entity: str, content: str) -> str:
    """The id of a document that comes without one: sent again, it has it again."""
    return _digest(f"{time}\0{source}\0{entity}\0{content}")


def add(application: str, opinions: Sequence[Opinion], negative: str, engine: Engine | None = None) -> int:
    """Keep documents; how many were new. Those whose label is `negative` are negative ones."""
    engine, new = engine or database.engine(), 0
    for begin in range(0, len(opinions), TOGETHER):
        part = {opinion.id: opinion for opinion in opinions[begin : begin + TOGETHER]}
        found = _bands(list(part.values()))
        with engine.begin() as db:
            new += _add(db, engine, application, part, found, negative)
    return new


def _bands(opinions: list[Opinion]) -> dict[str, list[str]]:
    """Id → bands of the text."""
    found: dict[str, list[str]] = {}
    by_entity: dict[str, list[Opinion]] = {}
    for opinion in opinions:
        by_entity.setdefault(opinion.entity, []).append(opinion)
    for entity, some in by_entity.items():
        texts = [opinion.text for opinion in some]
        found |= {o.id: bands for o, bands in zip(some, stories.bands(entity, texts), strict=True)}
    return found


def _add(
    db: Connection,
    engine: Engine,
    application: str,
    opinions: dict[str, Opinion],
    bands: dict[str, list[str]],
    negative: str,
) -> int:
    if engine.dialect.name == "postgresql":  # SQLite has one writer anyway
        lock = int.from_bytes(hashlib.blake2b(application.encode(), digest_size=8).digest(), signed=True)
        db.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": lock})
    rows = [
        {
            "application": application,
            **{
                name: getattr(o, name)
                for name in ("id", "time", "source", "entity", "topic", "label", "score")
            },
            "negative": int(o.label == negative),
            "story": _digest(o.id),
            "counted": 1,
        }
        for o in opinions.values()
    ]
    insert = inserting(engine, DOCUMENTS).on_conflict_do_nothing(index_elements=["application", "id"])
    new = set(db.execute(insert.returning(DOCUMENTS.c.id), rows).scalars())
    changed = [(o.entity, o.topic, o.time) for o in opinions.values() if o.id in new]
    own = {_digest(name): bands[name] for name in new if bands[name]}
    joined = _join(db, engine, application, own)
    if joined:
        changed += _count_once(db, application, joined)
    _mark(db, engine, application, changed)
    return len(new)


def _join(db: Connection, engine: Engine, application: str, own: dict[str, list[str]]) -> set[str]:
    """Put stories together that share a band; the names of those that became of several.

    `own` is story → bands of the new documents. A story has the least name of those it was put together of.
    """
    claimed = {band: story for story, bands in sorted(own.items(), reverse=True) for band in bands}
    leader = {story: story for story in own}

    def lead(story: str) -> str:
        while leader.setdefault(story, story) != story:
            story = leader[story]
        return story

    def unite(one: str, other: str) -> None:
        first, second = sorted((lead(one), lead(other)))
        leader[second] = first

    for some in _batches(list(claimed), 5000):
        query = select(STORY_BANDS.c.band, STORY_BANDS.c.story)
        query = query.where(STORY_BANDS.c.application == application, STORY_BANDS.c.band.in_(some))
        for band, story in db.execute(query).all():
            unite(story, claimed[band])
    for story, bands in own.items():
        for band in bands:
            unite(story, claimed[band])
    put = [{"application": application, "band": b, "story": lead(story)} for b, story in claimed.items()]
    if put:
        insert = inserting(engine, STORY_BANDS)
        db.execute(insert.on_conflict_do_nothing(index_elements=["application", "band"]), put)
    moved: dict[str, list[str]] = {}
    for story in leader:
        if lead(story) != story:
            moved.setdefault(lead(story), []).append(story)
    for first, others in moved.items():
        for table in (DOCUMENTS, STORY_BANDS):
            db.execute(
                update(table)
                .where(table.c.application == application, table.c.story.in_(others))
                .values(story=first)
            )
    return set(moved)


def _batches(values: list[str], size: int) -> Iterator[list[str]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))


def _count_once(db: Connection, application: str, joined: set[str]) -> list[tuple[str, str, int]]:
    """Of each story count the earliest document alone; entity, topic and time of those that count no more."""
    columns = DOCUMENTS.c
    query = select(columns.id, columns.time, columns.entity, columns.topic, columns.story)
    query = query.where(columns.application == application, columns.counted == 1)
    left: list[tuple[str, str, int]] = []
    dropped: list[str] = []
    for some in _batches(sorted(joined), 5000):
        seen: set[str] = set()
        found = db.execute(query.where(columns.story.in_(some)).order_by(columns.time, columns.id))
        for name, time, entity, topic, story in found.all():
            if story in seen:
                dropped.append(name)
                left.append((entity, topic, time))
            seen.add(story)
    for some in _batches(dropped, 5000):
        db.execute(
            update(DOCUMENTS)
            .where(columns.application == application, columns.id.in_(some))
            .values(counted=0)
        )
    return left


def _mark(db: Connection, engine: Engine, application: str, changed: Iterable[tuple[str, str, int]]) -> None:
    """Write down from when on the counts of a series are other ones."""
    earliest: dict[tuple[str, str], int] = {}
    for entity, topic, time in changed:
        earliest[entity, topic] = min(time, earliest.get((entity, topic), time))
    if not earliest:
        return
    insert = inserting(engine, SERIES)
    known, given = SERIES.c.changed, insert.excluded.changed
    merged = insert.on_conflict_do_update(
        index_elements=["application", "entity", "topic"],
        set_={
            "changed": case((known.is_(None), given), (given < known, given), else_=known),
            "revision": SERIES.c.revision + 1,
        },
    )
    rows = [
        {"application": application, "entity": entity, "topic": topic, "changed": time, "revision": 1}
        for (entity, topic), time in sorted(earliest.items())
    ]
    db.execute(merged, rows)


def counts(
    db: Connection, application: str, entity: str, topic: str, begin: int, end: int, bucket_s: int
) -> tuple[Counts, Counts]:
    """Documents, and negative ones, int64 [T] for the buckets from `begin` to `end` (whole buckets)."""
    columns, documents = DOCUMENTS.c, np.zeros((end - begin) // bucket_s, np.int64)
    negative = np.zeros_like(documents)
    number = ((columns.time - begin) // bucket_s).label("number")
    query = select(number, func.count(), func.sum(columns.negative)).where(
        columns.application == application,
        columns.entity == entity,
        columns.topic == topic,
        columns.counted == 1,
        columns.time >= begin,
        columns.time < end,
    )
    for place, many, bad in db.execute(query.group_by(number)).all():
        documents[place], negative[place] = many, bad
    return documents, negative


@dataclass(frozen=True)
class Point:
    """A bucket of a series that holds documents, and the window that ends with it."""

    begins: int
    documents: int
    negative: int
    score: float
    """Mean probability of the negative label."""
    window_documents: int
    window_negative: int
    window_score: float


@dataclass(frozen=True)
class Trend:
    entity: str
    topic: str
    points: list[Point]


def trends(
    application: str,
    begin: int,
    end: int,
    bucket_s: int,
    width: int,
    entity: str | None = None,
    topic: str | None = None,
    most: int = 100,
    engine: Engine | None = None,
) -> list[Trend]:
    """Counts of each topic and entity in buckets from `begin` to `end`, with windows of `width` buckets; of the
    `most` series with the most documents, the largest first."""
    columns, early = DOCUMENTS.c, begin - (width - 1) * bucket_s
    number = ((columns.time - early) // bucket_s).label("number")
    where = [
        columns.application == application,
        columns.counted == 1,
        columns.time >= early,
        columns.time < end,
    ]
    where += [columns.entity == entity] if entity is not None else []
    where += [columns.topic == topic] if topic is not None else []
    sums = (func.count(), func.sum(columns.negative), func.sum(columns.score))
    largest = select(columns.entity, columns.topic).where(*where).group_by(columns.entity, columns.topic)
    largest = largest.order_by(func.count().desc(), columns.entity, columns.topic).limit(most)
    found = []
    with (engine or database.engine()).connect() as db:
        for whom, what in db.execute(largest).all():
            own = select(number, *sums).where(*where, columns.entity == whom, columns.topic == what)
            rows = [tuple(row) for row in db.execute(own.group_by(number).order_by(number)).all()]
            points = _points(rows, early, (end - early) // bucket_s, bucket_s, width)
            found.append(Trend(whom, what, points))
    return [trend for trend in found if trend.points]


def _points(rows: list[tuple[Any, ...]], early: int, length: int, bucket_s: int, width: int) -> list[Point]:
    documents, negative = np.zeros(length, np.int64), np.zeros(length, np.int64)
    scores = np.zeros(length)
    for place, many, bad, score in rows:
        documents[place], negative[place], scores[place] = many, bad, score
    windows, bad_windows = sliding(documents, width), sliding(negative, width)
    window_scores = np.convolve(scores, np.ones(width))[:length]
    return [
        Point(
            early + place * bucket_s,
            int(documents[place]),
            int(negative[place]),
            float(scores[place] / documents[place]),
            int(windows[place]),
            int(bad_windows[place]),
            float(window_scores[place] / windows[place]),
        )
        for place in range(width - 1, length)
        if documents[place]
    ]


def _digest(value: str) -> str:
    return hashlib.blake2b(value.encode(), digest_size=16).hexdigest()
