"""Rows of a stored history as opinions, and opinions out of the database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import select

from lib import database, times
from lib.errors import DataError
from lib.opinions.store import document_id
from lib.opinions.tables import DOCUMENTS, Opinion

LIMITS = {"source": 200, "entity": 200, "topic": 200, "label": 200, "id": 128}
"""Characters that the database has room for."""


def opinion(row: Mapping[str, str | None], where: str, negative: str) -> Opinion:
    """A row with the keys of `monitoring.replay.columns`; `label` is empty where it has none.

    Raises DataError, beginning with `where`, for a value that is missing or cannot be one.
    """
    try:
        time = times.seconds(row.get("time"))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
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
