"""Trials of new versions: what was compared with the champion on mirrored requests, and what came of it.

A row for each version that an application was to serve. Replicas add to it, and whichever sees that enough was
compared settles it, once for all of them; those that start later find the verdict here.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Float, Integer, String, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

from lib import database
from lib.settings import CanarySettings

TRIALS = Table(
    "whorl_trials",
    database.TABLES,
    Column("application", String(63), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("begun", Float, nullable=False),
    Column("requests", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("inputs", Integer, nullable=False),
    Column("disagreements", Integer, nullable=False),
    Column("drift", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("champion_seconds", Float, nullable=False),
    Column("passed", Integer),
    Column("why", String(500)),
)


@dataclass
class Compared:
    """Sums over mirrored requests."""

    requests: int = 0
    errors: int = 0
    """Requests that the new version did not answer."""
    inputs: int = 0
    """Inputs that both answered."""
    disagreements: int = 0
    """Inputs that got another answer."""
    drift: float = 0.0
    """How far the answers lie apart, from 0 to 1 for each input."""
    seconds: float = 0.0
    """That the new version took for the requests it answered."""
    champion_seconds: float = 0.0
    """That the champion took for the same."""

    def add(self, other: Compared) -> None:
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Trial:
    compared: Compared
    passed: bool | None
    """None until it is settled."""
    why: str | None


SUMS = tuple(field.name for field in dataclasses.fields(Compared))


def begin(application: str, version: int) -> None:
    """A trial that is there already goes on."""
    row: dict[str, Any] = {"application": application, "version": version, "begun": time.time()}
    try:
        with database.engine().begin() as db:
            db.execute(insert(TRIALS).values(row | dataclasses.asdict(Compared())))
    except IntegrityError:
        pass


def find(application: str, version: int) -> Trial | None:
    query = select(TRIALS).where(TRIALS.c.application == application, TRIALS.c.version == version)
    with database.engine().connect() as db:
        row = db.execute(query).mappings().first()
    if row is None:
        return None
    passed = None if row["passed"] is None else bool(row["passed"])
    return Trial(Compared(**{name: row[name] for name in SUMS}), passed, row["why"])


def add(application: str, version: int, compared: Compared) -> None:
    """Sums of another second or so, from one replica of several."""
    more = {name: TRIALS.c[name] + value for name, value in dataclasses.asdict(compared).items()}
    with database.engine().begin() as db:
        db.execute(_of(application, version).values(more))


def settle(application: str, version: int, passed: bool, why: str) -> bool:
    """Write the verdict down; False when another replica did."""
    values = {"passed": int(passed), "why": why[:500]}
    with database.engine().begin() as db:
        done = db.execute(_of(application, version).where(TRIALS.c.passed.is_(None)).values(values))
    return bool(done.rowcount)


def _of(application: str, version: int) -> Any:
    return update(TRIALS).where(TRIALS.c.application == application, TRIALS.c.version == version)


def judge(compared: Compared, canary: CanarySettings) -> tuple[bool, str] | None:
    """Whether the version may answer, and why; None while too little was compared."""
    if compared.requests < canary.requests:
        return None
    answered, inputs = compared.requests - compared.errors, max(compared.inputs, 1)
    figures = {
        "max_errors": compared.errors / compared.requests,
        "max_disagreement": compared.disagreements / inputs,
        "max_drift": compared.drift / inputs,
        "max_latency_ratio": compared.seconds / compared.champion_seconds if answered else 0.0,
    }
    told = ", ".join(f"{name.removeprefix('max_')} {value:.3g}" for name, value in figures.items())
    told = f"{told} over {compared.requests:,} requests"
    for name, value in figures.items():
        if value > getattr(canary, name):
            return False, f"{name.removeprefix('max_')} above {getattr(canary, name):g} ({told})"
    return True, told
