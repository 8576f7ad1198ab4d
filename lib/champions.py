"""Which version of a model was champion when, and instead of which: what a rollback goes back along.

The alias in MLflow's registry says who is champion; these rows say how it came to be. Changes of a model are numbered,
and the database gives each number once: of two that were begun at the same moment the second learns of the first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Column, Float, Integer, String, Table, func, insert, select
from sqlalchemy.exc import IntegrityError

from lib import database

ROLLBACK = "rollback: "
"""How the reason of a change begins that was one."""
CHANGES = Table(
    "whorl_champions",
    database.TABLES,
    Column("model", String(63), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("instead_of", Integer),
    Column("at", Float, nullable=False),
    Column("why", String(500), nullable=False),
)


@dataclass(frozen=True)
class Change:
    """`version` became champion at `at` (seconds since 1970), instead of the one before it, if there was one."""

    number: int
    version: int
    instead_of: int | None
    at: float
    why: str


def latest(model: str) -> int:
    """Number of the last change; 0 before the first."""
    with database.engine().connect() as db:
        found = db.execute(select(func.max(CHANGES.c.number)).where(CHANGES.c.model == model)).scalar()
    return found or 0


def record(model: str, number: int, version: int, instead_of: int | None, why: str) -> bool:
    """Write a change down under a number; False when another one has it."""
    row = {
        "model": model,
        "number": number,
        "version": version,
        "instead_of": instead_of,
        "at": time.time(),
        "why": why[:500],
    }
    try:
        with database.engine().begin() as db:
            db.execute(insert(CHANGES).values(row))
    except IntegrityError:
        return False
    return True


def history(model: str) -> list[Change]:
    """All changes of a model's champion, the latest first."""
    with database.engine().connect() as db:
        rows = db.execute(
            select(CHANGES).where(CHANGES.c.model == model).order_by(CHANGES.c.number.desc())
        ).mappings()
        return [Change(**{key: value for key, value in row.items() if key != "model"}) for row in rows]


def before(model: str, version: int) -> int | None:
    """The version that was champion before `version` became it last, rollbacks left out; None when none is known."""
    found = history(model)
    while found:
        change, *found = found
        if change.version == version and not change.why.startswith(ROLLBACK):
            return change.instead_of
    return None
