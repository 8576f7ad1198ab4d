"""Events reach the database once, without anybody waiting, whatever happens to it or to the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from lib import events
from lib.data.redact import Redaction
from lib.errors import StorageError
from lib.events import Event, Feedback, Journal, Recorder
from tests.servers import Postgres


def event(number: int, text: str = "hello") -> Event:
    return Event(
        f"r{number}", "reviews", "reviews@1", 1000.0 + number, "/v1/sentiment", 200, 5.0, 7, "key",
        {"inputs": [text]}, {"results": [{"label": "positive"}]},
    )  # fmt: skip


def redaction(value: Any) -> Any:
    return Redaction().value(value)


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ids() -> list[str]:
    return [row["id"] for row in events.read()]


class Database:
    """The database's `write`, which may be away, or not answer until `answers` is set."""

    def __init__(self) -> None:
        self.away = False
        self.answers = threading.Event()
        self.answers.set()
        self.batches: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        self.answers.wait()
        if self.away:
            raise OperationalError("insert", {}, Exception("away"))
        self.batches.append(len(rows))
        events.write(rows)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "AGAIN_S", 0.1)


def test_what_was_recorded_is_read_without_personal_data(either_database: str, tmp_path: Path) -> None:
    recorder = Recorder(redaction, tmp_path / "journals")
    for number in range(3):
        recorder.record(event(number, "I am ada@example.com"))
    recorder.close()
    rows = list(events.read("reviews"))
    assert [row["id"] for row in rows] == ["r0", "r1", "r2"]
    assert rows[0]["request"] == {"inputs": ["I am <EMAIL_1>"]}
    assert rows[0]["answer"] == {"results": [{"label": "positive"}]}
    assert rows[0]["feedback"] is None
    assert (rows[0]["model"], rows[0]["tokens"], rows[0]["key"]) == ("reviews@1", 7, "key")
    assert list(events.read("other")) == []
    assert [row["id"] for row in events.read(since=1001.5)] == ["r2"]
    assert not list((tmp_path / "journals").iterdir())


def test_an_id_that_comes_twice_is_one_event(either_database: str, tmp_path: Path) -> None:
    recorder = Recorder(redaction, tmp_path)
    recorder.record(event(1))
    wait(lambda: ids() == ["r1"])
    recorder.record(event(1, "another"))
    recorder.close()
    assert [row["request"] for row in events.read()] == [{"inputs": ["hello"]}]


def test_events_are_put_into_the_database_together(storage: Path, tmp_path: Path) -> None:
    database = Database()
    recorder = Recorder(redaction, tmp_path, database)
    for number in range(40):
        recorder.record(event(number))
        time.sleep(0.01)
    recorder.close()
    assert sum(database.batches) == 40
    assert len([batch for batch in database.batches if batch]) <= 4, (
        "one for each EVERY_S, not for each event"
    )


def test_a_database_that_is_away_loses_nothing(either_database: str, tmp_path: Path, quick: None) -> None:
    database = Database()
    database.away = True
    database.answers.clear()
    recorder = Recorder(redaction, tmp_path, database)
    for number in range(1500):
        recorder.record(event(number))  # would never return if it waited for the database
    database.answers.set()
    (journal,) = _eventually(tmp_path)
    wait(lambda: journal.read_bytes().count(b"\n") == 1500)
    assert ids() == []
    database.away = False
    wait(lambda: len(ids()) == 1500)
    wait(lambda: journal.stat().st_size == 0)
    recorder.record(event(2000))
    recorder.close()
    assert len(ids()) == 1501
    assert max(database.batches) <= events.BATCH


def test_a_server_that_is_stopped_for_a_while_loses_nothing(
    postgres: Postgres, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHORL_DATABASE", postgres.fresh())
    recorder = Recorder(redaction, tmp_path)
    recorder.record(event(0, "NUL \0"))
    wait(lambda: ids() == ["r0"])
    postgres.stop()
    try:
        for number in range(1, 700):
            recorder.record(event(number))
        (journal,) = _eventually(tmp_path)
        wait(lambda: journal.read_bytes().count(b"\n") == 699)
        with pytest.raises(StorageError, match="try again"):
            events.say(Feedback("r0", rating=1), "reviews")
    finally:
        postgres.start()
    wait(lambda: len(ids()) == 700)
    events.say(Feedback("r0", rating=1), "reviews")
    recorder.close()
    assert not list(tmp_path.iterdir())


CHILD = """
import sys, time
from pathlib import Path
from tests.test_events import Database, Recorder, event, redaction
database = Database()
database.away = True
recorder = Recorder(redaction, Path(sys.argv[1]), database)
for number in range(20):
    recorder.record(event(number))
print("recorded", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_taken_up_by_the_next(
    storage: Path, tmp_path: Path, quick: None
) -> None:
    folder = tmp_path / "journals"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "recorded\n"
    (journal,) = _eventually(folder)
    wait(lambda: journal.read_bytes().count(b"\n") == 20)
    other = Recorder(redaction, folder)
    time.sleep(0.3)
    assert ids() == [], "its process lives"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    other.close()
    with journal.open("ab") as file:
        file.write(b'{"id": "cut o')
    last = Recorder(redaction, folder)
    wait(lambda: len(ids()) == 20)
    last.close()
    assert not list(folder.iterdir())


def test_a_journal_has_an_end_and_what_is_dropped_is_told(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "JOURNAL_BYTES", 1000)
    database = Database()
    database.away = True
    recorder = Recorder(redaction, tmp_path, database)
    (journal,) = _eventually(tmp_path)
    for number in range(50):
        recorder.record(event(number))
        time.sleep(0.002)
    wait(lambda: "is full" in caplog.text)
    recorder.close()
    kept = journal.read_bytes().count(b"\n")
    assert 3 <= kept < 50
    assert all(json.loads(line)["application"] == "reviews" for line in journal.read_text().splitlines())


def _eventually(folder: Path) -> list[Path]:
    wait(lambda: list(folder.glob("*.jsonl")))
    return list(folder.glob("*.jsonl"))


def test_what_cannot_be_redacted_is_not_kept(storage: Path, tmp_path: Path) -> None:
    def broken(_: Any) -> Any:
        raise ValueError("no")

    recorder = Recorder(broken, tmp_path)
    recorder.record(event(1, "ada@example.com"))
    recorder.close()
    (row,) = events.read()
    assert (row["id"], row["request"], row["answer"]) == ("r1", None, None)


def test_feedback_is_of_an_event_and_may_be_said_again(storage: Path, either_database: str) -> None:
    with pytest.raises(events.UnknownRequestError, match="no answer of reviews has the request id 'r1'"):
        events.say(Feedback("r1", rating=1), "reviews")
    recorder = Recorder(redaction, storage / "journals")
    recorder.record(event(1))
    recorder.close()
    events.say(Feedback("r1", rating=1, comment="good\0"), "reviews")
    with pytest.raises(events.UnknownRequestError):
        events.say(Feedback("r1\0", rating=1), "reviews")
    events.say(Feedback("r1", rating=-1, label="negative"), "reviews")
    with pytest.raises(events.UnknownRequestError, match="no answer of support has the request id 'r1'"):
        events.say(Feedback("r1", rating=1), "support")
    (row,) = events.read()
    said = {name: row["feedback"][name] for name in ("rating", "label", "comment", "correction")}
    assert said == {"rating": -1, "label": "negative", "comment": "good\ufffd", "correction": None}


def test_journals_lie_where_nobody_else_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(events.tempfile, "tempdir", str(tmp_path))
    folder = events.journals()
    assert folder.parent.stat().st_mode & 0o077 == 0
    assert events.journals() == folder
    folder.parent.chmod(0o755)  # somebody else's, made before us
    assert events.journals().parent != folder.parent


def test_a_journal_is_held_by_its_process_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([b"{}"])
    assert list(Journal.left_behind(tmp_path)) == []
    journal.close()
    assert list(Journal.left_behind(tmp_path)) == [journal.path]
