"""Which of several processes does what only one has to: a lease in the database, which ends when its holder does."""

from __future__ import annotations

from sqlalchemy import or_

from lib import database
from lib.opinions.tables import LEASES, inserting


def hold(name: str, holder: str, seconds: float, now: float) -> bool:
    """Take or keep a lease for so long; False while another holds it. `now` in seconds since 1970."""
    engine = database.engine()
    insert = inserting(engine, LEASES).values(name=name, holder=holder, until=now + seconds)
    taken = insert.on_conflict_do_update(
        index_elements=["name"],
        set_={"holder": insert.excluded.holder, "until": insert.excluded.until},
        where=or_(LEASES.c.holder == holder, LEASES.c.until < now),
    ).returning(LEASES.c.holder)  # of an insert not every driver counts the rows
    with engine.begin() as db:
        return db.execute(taken).first() is not None
