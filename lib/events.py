"""Events: what was asked and answered, and what users said of it; rows of the database.

Serving records without waiting: an event goes to a thread, which takes personal data out of it (`lib.data.redact`),
appends it to a journal on this machine's disk and puts it into the database with others. A database that is away
costs nobody anything and loses nothing: the journal holds the events until it is back, and what a killed process left
there is taken up by the next. An event is written once however often it is sent: its request id is its key.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import queue
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, Float, Integer, String, Table, Text, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from lib import database, tracking
from lib.errors import RequestError, StorageError

logger = logging.getLogger(__name__)

EVENTS = Table(
    "whorl_events",
    database.TABLES,
    Column("id", String(128), primary_key=True),
    Column("application", String(100), nullable=False, index=True),
    Column("model", String(200), nullable=False),
    Column("time", Float, nullable=False, index=True),
    Column("route", String(200), nullable=False),
    Column("status", Integer, nullable=False),
    Column("milliseconds", Float, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("key", String(12)),
    Column("request", Text, nullable=False),
    Column("answer", Text, nullable=False),
)
FEEDBACK = Table(
    "whorl_feedback",
    database.TABLES,
    Column("id", String(128), primary_key=True),
    Column("time", Float, nullable=False),
    Column("key", String(12)),
    Column("rating", Float),
    Column("label", String(200)),
    Column("correction", Text),
    Column("preferred", Text),
    Column("comment", Text),
)
WAITING = 10_000
"""Events that may wait for the thread; more are dropped, and their number is logged."""
BATCH = 500
EVERY_S, AGAIN_S = 0.5, 5.0
"""How often events are put into the database, and how long it is left alone when it is away."""
JOURNAL_BYTES = 512 * 2**20
"""What a journal may hold while the database is away; beyond it the newest are dropped."""


@dataclass(frozen=True)
class Event:
    """One request and its answer. `time` in seconds since 1970, when it came."""

    id: str
    application: str
    model: str
    """NAME@VERSION that answered."""
    time: float
    route: str
    status: int
    milliseconds: float
    tokens: int
    key: str | None
    """Id of the API key, not the key."""
    request: Any
    """What the recorder's `redact` makes a JSON value of."""
    answer: Any


@dataclass(frozen=True)
class Feedback:
    """What a user said of an answer; what is None was not said. Sent again, what is said again replaces."""

    id: str
    rating: float | None = None
    label: str | None = None
    correction: str | None = None
    preferred: str | None = None
    comment: str | None = None
    key: str | None = None
    time: float = field(default_factory=time.time)


def write(rows: Iterable[dict[str, Any]]) -> None:
    """Events as rows of the database; one that is there already stays as it is."""
    values = list(rows)
    if not values:
        return
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(_insert(engine, EVENTS).on_conflict_do_nothing(index_elements=["id"]), values)


def say(feedback: Feedback, application: str) -> None:
    """Keep what was said of an answer of `application`. Raises UnknownRequestError for a request id that none of its
    events has, StorageError when the database is away."""
    engine = database.engine()
    # To PostgreSQL a NUL is no text.
    values = {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
        for name, value in asdict(feedback).items()
    }
    said = {name: value for name, value in values.items() if value is not None and name != "id"}
    meant = select(EVENTS.c.id).where(EVENTS.c.id == values["id"], EVENTS.c.application == application)
    try:
        with engine.begin() as connection:
            if connection.execute(meant).first() is None:
                raise UnknownRequestError(
                    f"no answer of {application} has the request id {feedback.id!r}; it is the answer's "
                    "x-request-id",
                    param="request_id",
                    code="unknown_request",
                )
            new = _insert(engine, FEEDBACK).values(values)
            connection.execute(new.on_conflict_do_update(index_elements=["id"], set_=said))
    except SQLAlchemyError as error:
        raise StorageError("feedback cannot be kept now; try again") from error


def _insert(engine: Engine, table: Table) -> Any:
    """An insert that can say what happens to rows that are there: each database has its own."""
    return (postgresql if engine.dialect.name == "postgresql" else sqlite).insert(table)


class UnknownRequestError(RequestError):
    http_status = 404


def read(application: str | None = None, since: float = 0.0) -> Iterator[dict[str, Any]]:
    """Events, the oldest first, as dictionaries with JSON values in `request` and `answer` and what was said of them
    in `feedback` (None where nothing was)."""
    query = select(EVENTS, FEEDBACK).join_from(EVENTS, FEEDBACK, EVENTS.c.id == FEEDBACK.c.id, isouter=True)
    query = query.where(EVENTS.c.time >= since).order_by(EVENTS.c.time)
    if application is not None:
        query = query.where(EVENTS.c.application == application)
    with database.engine().connect() as connection:
        for row in connection.execution_options(yield_per=1000).execute(query):
            event = {column.name: row._mapping[column] for column in EVENTS.c}
            said = {column.name: row._mapping[column] for column in FEEDBACK.c}
            event |= {name: json.loads(event[name]) for name in ("request", "answer")}
            yield event | {"feedback": said if said["id"] is not None else None}


def journals() -> Path:
    """This machine's folder of journals for the database in use."""
    name = hashlib.sha256(tracking.database_url().encode()).hexdigest()[:16]
    own = Path(tempfile.gettempdir()) / f"whorl-events-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:  # another user made it, to read what is in it
        return Path(tempfile.mkdtemp(prefix="whorl-events-"))
    return own / name


class Journal:
    """A file of events that are not in the database yet, held by one living process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{uuid.uuid4().hex}.jsonl"
        new = self.path.with_suffix(".new")  # nobody looks at it before it is held
        self._file = new.open("a+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        new.rename(self.path)

    def append(self, lines: list[bytes]) -> None:
        self._file.write(b"".join(line + b"\n" for line in lines))

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def clear(self) -> None:
        self._file.truncate(0)

    def close(self) -> None:
        if self.size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    @staticmethod
    def left_behind(folder: Path) -> Iterator[Path]:
        """Journals of processes that are gone, each held while it is this iterator's present one."""
        for path in sorted(folder.glob("*.jsonl")):
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    yield path


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a journal; a last line that was cut off by a kill is left out."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                yield json.loads(line)


@dataclass(frozen=True)
class Backlog:
    """Events of this process that the database does not have."""

    waiting: int
    """In memory alone."""
    journal_bytes: int
    """In its journals."""
    dropped: int
    """Lost since it began."""


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def backlog() -> Backlog:
    """Of all recorders of this process."""
    found = [recorder.backlog() for recorder in list(_recorders)]
    return Backlog(
        sum(one.waiting for one in found),
        sum(one.journal_bytes for one in found),
        sum(one.dropped for one in found),
    )


class Recorder:
    """The thread that writes events, one for each process.

    `redact` makes JSON values without personal data of [request, answer], whatever those are.
    """

    def __init__(
        self, redact: Callable[[Any], Any], folder: Path | None = None, put: Callable[..., None] = write
    ) -> None:
        self._redact, self._folder, self._put = redact, folder or journals(), put
        self._waiting: queue.Queue[Event | None] = queue.Queue(WAITING)
        self._dropped = 0
        self._journal: Journal | None = None
        self.lost = 0
        """Events that were dropped since it began."""
        self._closed = threading.Event()
        _recorders.add(self)
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def record(self, event: Event) -> None:
        """Hand an event over; returns at once, and raises nothing."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped += 1
            self.lost += 1

    def backlog(self) -> Backlog:
        """What is not in the database yet."""
        size = 0
        with suppress(OSError, ValueError):  # ValueError: it is closed
            size = self._journal.size if self._journal else 0
        return Backlog(self._waiting.qsize(), size, self.lost)

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits, to the journal at least, and end."""
        self._closed.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        try:
            self._journal = Journal(self._folder)
            self._write(self._journal)
        except Exception:
            logger.exception("events are not recorded any more")

    def _write(self, journal: Journal) -> None:
        pending: list[dict[str, Any]] = []
        """In the journal and in memory; beyond BATCH in the journal alone (`behind`)."""
        behind, next_store = True, 0.0  # what others left is behind, too
        while True:
            fresh = self._gather(next_store if pending or behind else time.monotonic() + AGAIN_S)
            if fresh:
                behind |= not self._keep(journal, fresh, pending)
            closing = self._closed.is_set() and self._waiting.empty()
            if (pending or behind) and (time.monotonic() >= next_store or closing):
                try:
                    self._store(journal, pending, behind)
                    pending, behind, next_store = [], False, time.monotonic() + EVERY_S
                except (SQLAlchemyError, StorageError, OSError) as error:
                    logger.warning("events wait for the database: %s", type(error).__name__)
                    next_store = time.monotonic() + AGAIN_S
            if closing:
                journal.close()
                return

    def _gather(self, until: float) -> list[Event]:
        """What waits now; when nothing does, the first that comes before `until` (time.monotonic). It goes into the
        journal at once: a killed process loses what is not there."""
        found: list[Event] = []
        with suppress(queue.Empty):
            event = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            while event is not None:
                found.append(event)
                event = self._waiting.get_nowait() if len(found) < BATCH else None
        return found

    def _keep(self, journal: Journal, fresh: list[Event], pending: list[dict[str, Any]]) -> bool:
        """Append to the journal; False when not all of it is in memory too."""
        rows = [self._row(event) for event in fresh]
        if self._dropped:
            logger.error("%d events were dropped: they came faster than they could be written", self._dropped)
            self._dropped = 0
        if journal.size > JOURNAL_BYTES:
            logger.error("%d events were dropped: %s is full", len(rows), journal.path)
            self.lost += len(rows)
            return True
        try:
            journal.append([json.dumps(row, ensure_ascii=False).encode() for row in rows])
        except OSError as error:
            logger.error("events cannot be kept in %s (%s)", journal.path, error.strerror)
        if len(pending) >= BATCH:
            return False
        pending.extend(rows)
        return True

    def _store(self, journal: Journal, pending: list[dict[str, Any]], behind: bool) -> None:
        if behind:
            for path in Journal.left_behind(self._folder):
                self._store_file(path)
                path.unlink()
            self._store_file(journal.path)
        else:
            self._put(pending)
        journal.clear()

    def _store_file(self, path: Path) -> None:
        batch: list[dict[str, Any]] = []
        for row in lines(path):
            batch.append(row)
            if len(batch) == BATCH:
                self._put(batch)
                batch = []
        self._put(batch)

    def _row(self, event: Event) -> dict[str, Any]:
        values = asdict(event)
        try:
            clean = self._redact([event.request, event.answer])
        except Exception:
            # An event without its words is worth more than none, and than one with them as they were.
            logger.exception("an event could not be redacted")
            clean = [None, None]
        for name, value in zip(("request", "answer"), clean, strict=True):
            # Neither half a surrogate pair nor, for PostgreSQL, a NUL is text.
            values[name] = json.dumps(value).replace("\\u0000", "\\ufffd")
        return values
