"""The database of what lasts as rows: `WHORL_DATABASE`, SQLite or PostgreSQL, by SQLAlchemy.

MLflow keeps its tables there too; ours begin with `whorl_`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from lib import tracking
from lib.errors import StorageError

TABLES = MetaData()
"""Every module that keeps rows adds its tables when it is imported."""


def engine(url: str | None = None) -> Engine:
    """A pool of connections to the database, with all tables of `TABLES` made.

    One for each URL and process. Raises StorageError when it cannot be opened.
    """
    return _engine(url or tracking.checked_url())


@functools.lru_cache(maxsize=8)
def _engine(url: str) -> Engine:
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            made = create_engine(url, connect_args=tracking.patience(url))
            event.listen(made, "connect", _shared)
        else:
            made = create_engine(url, pool_pre_ping=True, connect_args=tracking.patience(url))
        # Two processes may make the tables at the same moment.
        with tracking.tables_made_once(url):
            TABLES.create_all(made)
    except (SQLAlchemyError, OSError, ImportError, ValueError) as error:
        shown = tracking.database_url_shown()
        raise StorageError(f"WHORL_DATABASE {shown}: {type(error).__name__}: {error}") from error
    return made


def _shared(connection: Any, _: Any) -> None:
    # Readers and one writer at the same time; a commit waits for no disk but at checkpoints.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
