"""Rows of a stored history as opinions, and opinions out of the database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select

from lib import database
from lib.errors import DataError
from lib.opinions.store import document_id
from lib.opinions.tables import DOCUMENTS, Opinion

LIMITS = {"source": 200, "entity": 200, "topic": 200, "label": 200, "id": 128}
"""Characters that the database has room for."""


def opinion(row: Mapping[str, str | None], where: str, negative: str) -> Opinion:
    """A row with the keys of `monitoring.replay.columns`; `label` is empty where it has none.

    Raises DataError, beginning with `where`, for a value that is missing or cannot be one.
    """
    time = seconds(row.get("time"), where)
    given = {name: (row.get(name) or "").strip() for name in (*LIMITS, "text")}
    for name in ("source", "entity"):
        if not given[name]:
            raise DataError(f"{where}: {name} is empty")
    for name, most in LIMITS.items():
        if len(given[name]) > most:
            raise DataError(f"{where}: {name} is longer than {most} characters")
    if not given["label"] and not given["text"]:
        raise DataError(f"{where}: neither text nor label; give one of them")
    given["id"] = given["id"] or document_id(time, given["source"], given["entity"], given["text"])
    return Opinion(time=time, score=_score(row.get("score"), given["label"] == negative, where), **given)


def seconds(value: str | None, where: str) -> int:
    """A time, ISO 8601 with an offset from UTC or seconds since 1970, as whole seconds since 1970."""
    try:
        return _not_before_1970(int(float(value or "")), where)
    except (ValueError, OverflowError):
        pass
    try:
        found = datetime.fromisoformat((value or "").strip())
    except ValueError:
        raise DataError(f"{where}: {value!r} is no time; write it as 2026-03-01T09:00:00Z") from None
    if found.tzinfo is None:
        raise DataError(f"{where}: {value!r} has no offset from UTC; write it as 2026-03-01T09:00:00Z")
    return _not_before_1970(int(found.timestamp()), where)


def _not_before_1970(value: int, where: str) -> int:
    if not 0 <= value < 2**40:
        raise DataError(f"{where}: {value} is no number of seconds since 1970; are these milliseconds?")
    return value


def _score(value: str | None, is_negative: bool, where: str) -> float:
    if value is None or not value.strip():
        return float(is_negative)
    try:
        score = float(value)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise DataError(f"{where}: score {value!r} is no probability from 0 to 1")
    return score


def stored(application: str) -> Iterator[Opinion]:
    """What is in the database, copies left out, the oldest first. The texts are not kept: `text` is empty."""
    names = ("id", "time", "source", "entity", "topic", "label", "score")
    query = select(*(DOCUMENTS.c[name] for name in names))
    query = query.where(DOCUMENTS.c.application == application, DOCUMENTS.c.counted == 1)
    with database.engine().connect() as db:
        rows: Any = db.execution_options(yield_per=10_000).execute(
            query.order_by(DOCUMENTS.c.time, DOCUMENTS.c.id)
        )
        for row in rows.mappings():
            yield Opinion(text="", **row)
