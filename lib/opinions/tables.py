"""The rows of opinions. Times are whole seconds since 1970 in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Engine, Float, Index, Integer, String, Table, Text
from sqlalchemy.dialects import postgresql, sqlite

from lib import database

DOCUMENTS = Table(
    "whorl_opinions",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("id", String(128), primary_key=True),
    Column("time", BigInteger, nullable=False),
    Column("source", String(200), nullable=False),
    Column("entity", String(200), nullable=False),
    Column("topic", String(200), nullable=False),
    Column("label", String(200), nullable=False),
    Column("score", Float, nullable=False),
    Column("negative", Integer, nullable=False),
    Column("story", String(32), nullable=False),
    Column("counted", Integer, nullable=False),  # 1 for the first document of its story
    Index("whorl_opinions_series", "application", "entity", "topic", "time"),
    Index("whorl_opinions_story", "application", "story"),
)
# Bands of stories: texts that share one are one story.
STORY_BANDS = Table(
    "whorl_story_bands",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("band", String(32), primary_key=True),
    Column("story", String(32), nullable=False),
    Index("whorl_story_bands_story", "application", "story"),
)
# A topic and entity. `changed` is the earliest time whose counts changed since they were looked at; `revision` grows
# with each change, so that whoever looked at another one than there is now begins anew.
SERIES = Table(
    "whorl_opinion_series",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("entity", String(200), primary_key=True),
    Column("topic", String(200), primary_key=True),
    Column("changed", BigInteger),
    Column("revision", Integer, nullable=False),
)
ALERTS = Table(
    "whorl_alerts",
    database.TABLES,
    Column("id", String(32), primary_key=True),
    Column("application", String(63), nullable=False, index=True),
    Column("entity", String(200), nullable=False),
    Column("topic", String(200), nullable=False),
    Column("begins", BigInteger, nullable=False),
    Column("ends", BigInteger, nullable=False, index=True),
    Column("rules", String(20), nullable=False),
    Column("documents", Integer, nullable=False),
    Column("negative", Integer, nullable=False),
    Column("usual", Float, nullable=False),
    Column("z", Float, nullable=False),
    Column("cusum", Float, nullable=False),
    Column("samples", Text, nullable=False),
    Column("created", Float, nullable=False),
)
DELIVERIES = Table(
    "whorl_deliveries",
    database.TABLES,
    Column("id", String(32), primary_key=True),
    Column("alert", String(32), nullable=False, index=True),
    Column("application", String(63), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("state", String(10), nullable=False),  # waiting, delivered or given up
    Column("attempts", Integer, nullable=False),
    Column("next", Float, nullable=False),
    Column("outcome", String(200)),
)
LEASES = Table(
    "whorl_leases",
    database.TABLES,
    Column("name", String(100), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Float, nullable=False),
)


@dataclass(frozen=True)
class Opinion:
    """A document and what a model said of it."""

    id: str
    time: int
    source: str
    entity: str
    topic: str
    """Empty where there is none."""
    label: str
    score: float
    """Probability of the negative label."""
    text: str
    """Not kept: by it a document is known for a copy."""


@dataclass(frozen=True)
class Alert:
    """A surge of negative opinion in the window from `begins` to `ends`."""

    id: str
    application: str
    entity: str
    topic: str
    begins: int
    ends: int
    rules: tuple[str, ...]
    documents: int
    negative: int
    usual: float
    """Share of negative documents that was to be expected."""
    z: float
    cusum: float
    samples: tuple[str, ...]
    """Ids of some of the negative documents, the surest first."""
    created: float

    @property
    def share(self) -> float:
        return self.negative / self.documents


def inserting(engine: Engine, table: Table) -> Any:
    """An insert that can say what happens to rows that are there: each database has its own."""
    return (postgresql if engine.dialect.name == "postgresql" else sqlite).insert(table)
