"""What users do and which items come, as rows: every replica reads the same, and a restart loses none.

An interaction is kept once for each id of its event; an item that comes again takes the place of what it said before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Index,
    Integer,
    Select,
    String,
    Table,
    Text,
    bindparam,
    select,
)

from lib import database
from lib.opinions.tables import inserting

INTERACTIONS = Table(
    "whorl_interactions",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("user", String(200), nullable=False),
    Column("item", String(200), nullable=False),
    Column("event", String(200), nullable=False),
    Column("time", BigInteger, nullable=False),
    Index("whorl_interactions_user", "application", "user", "time"),
)
ITEMS = Table(
    "whorl_items",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("item", String(200), primary_key=True),
    Column("changed", BigInteger, nullable=False),  # nanoseconds since 1970, by the clock of who wrote it
    Column("content", Text, nullable=False),
    Index("whorl_items_changed", "application", "changed"),
)
TOGETHER = 500
# Clocks of replicas may differ by as much: what changed that long before the last look is looked at again.
CLOCKS_NS = 5 * 10**9


@dataclass(frozen=True)
class Interaction:
    """Somebody did something with an item."""

    user: str
    item: str
    event: str
    time: int
    """Seconds since 1970."""
    id: str = ""
    """Of the event; one without has that of its content, so that what is sent twice counts once."""

    @property
    def key(self) -> str:
        if self.id:
            return self.id
        said = json.dumps([self.user, self.item, self.event, self.time])
        return hashlib.sha256(said.encode()).hexdigest()[:32]


def add(application: str, interactions: Sequence[Interaction], engine: Engine | None = None) -> int:
    """Keep them; how many were new."""
    engine, new = engine or database.engine(), 0
    rows = {
        one.key: {"application": application, "id": one.key}
        | {name: getattr(one, name) for name in ("user", "item", "event", "time")}
        for one in interactions
    }
    insert = inserting(engine, INTERACTIONS).on_conflict_do_nothing(index_elements=["application", "id"])
    keys = list(rows)
    with engine.begin() as db:
        for start in range(0, len(keys), TOGETHER):
            part = [rows[key] for key in keys[start : start + TOGETHER]]
            new += len(db.execute(insert.returning(INTERACTIONS.c.id), part).scalars().all())
    return new


def history(application: str, user: str, most: int, engine: Engine | None = None) -> list[Interaction]:
    """The latest `most` of a user, the earliest first."""
    asked = {"application": application, "user": user, "most": most}
    with (engine or database.engine()).connect() as db:
        return [Interaction(*row) for row in reversed(db.execute(_LATEST, asked).all())]


def _latest() -> Select[Any]:
    columns = INTERACTIONS.c
    query = select(columns.user, columns.item, columns.event, columns.time, columns.id)
    query = query.where(
        columns.application == bindparam("application"), columns.user == bindparam("user", type_=String)
    )
    return query.order_by(columns.time.desc(), columns.id.desc()).limit(bindparam("most", type_=Integer))


# Put together once: it is asked for each recommendation, and composing it costs as much as the answer.
_LATEST = _latest()


def since(application: str, begin: float, engine: Engine | None = None) -> Iterator[Interaction]:
    """All from a time on, in the order in which they happened."""
    columns = INTERACTIONS.c
    query = select(columns.user, columns.item, columns.event, columns.time, columns.id)
    query = query.where(columns.application == application, columns.time >= begin)
    query = query.order_by(columns.time, columns.id)
    with (engine or database.engine()).connect() as db:
        for row in db.execution_options(yield_per=TOGETHER).execute(query):
            yield Interaction(*row)


def put_items(application: str, items: dict[str, dict[str, Any]], engine: Engine | None = None) -> None:
    """Keep what is said of items, by their ids."""
    engine = engine or database.engine()
    now = time.time_ns()
    rows = [
        {"application": application, "item": item, "changed": now, "content": json.dumps(content)}
        for item, content in items.items()
    ]
    insert = inserting(engine, ITEMS)
    put = insert.on_conflict_do_update(
        index_elements=["application", "item"],
        set_={"changed": insert.excluded.changed, "content": insert.excluded.content},
    )
    with engine.begin() as db:
        for start in range(0, len(rows), TOGETHER):
            db.execute(put, rows[start : start + TOGETHER])


def changed_items(
    application: str, since: int, engine: Engine | None = None
) -> tuple[dict[str, dict[str, Any]], int]:
    """Items that changed after `since`, or shortly before it, by their ids; and what to give next time."""
    columns = ITEMS.c
    query = select(columns.item, columns.content, columns.changed).order_by(columns.changed)
    query = query.where(columns.application == application, columns.changed > since - CLOCKS_NS)
    with (engine or database.engine()).connect() as db:
        rows = db.execute(query).all()
    return {item: json.loads(content) for item, content, _ in rows}, max([since, *(row[2] for row in rows)])
