"""API keys: what is stored, what opens what, what a user can get wrong."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest

from lib import database, keys
from lib.errors import ConfigError, RegistryError, StorageError
from serve.keys import main


def test_a_key_is_found_by_its_secret_which_is_stored_nowhere(storage: Path) -> None:
    key, secret = keys.create("shop", ["support", "reviews"], requests_per_minute=60)
    assert keys.find(secret) == key
    assert keys.find(secret + "x") is None
    assert key.opens("support")
    assert not key.opens("other")
    assert keys.create("all", ["*"])[0].opens("other")
    written = b"".join(file.read_bytes() for file in storage.glob("whorl.db*"))
    assert b"shop" in written
    assert secret.encode() not in written
    assert secret.removeprefix(keys.PREFIX).encode() not in written


def test_revoked_and_expired_are_not_valid(storage: Path) -> None:
    key, secret = keys.create("shop", ["*"], days=1)
    assert key.is_valid()
    assert not key.is_valid(time.time() + 86_401)
    revoked = keys.revoke(key.id)
    assert not revoked.is_valid()
    found = keys.find(secret)
    assert found is not None
    assert found.revoked == revoked.revoked
    assert keys.revoke(key.id).revoked == revoked.revoked, "the first time counts"


def test_two_keys_are_never_alike(storage: Path) -> None:
    secrets = {keys.create(str(i), ["*"])[1] for i in range(20)}
    assert len(secrets) == 20
    assert {len(secret) for secret in secrets} == {len(keys.PREFIX) + 43}
    assert [key.name for key in keys.listed()] == [str(i) for i in range(20)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": " "}, "--name is empty"),
        ({"scopes": ["", " "]}, "--scopes is empty"),
        ({"requests_per_minute": 0}, "--requests-per-minute 0 must be above 0"),
        ({"days": -1.0}, "--days -1.0 must be above 0"),
    ],
)
def test_what_makes_no_key_is_one_line(storage: Path, values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keys.create(**{"name": "shop", "scopes": ["*"], **values})
    assert keys.listed() == []


def test_the_command(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["create", "--name", "shop", "--scopes", "support,reviews", "--requests-per-minute", "60"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    key = keys.find(out.strip())
    assert key is not None
    assert f"key {key.id} of shop for reviews support; it is not shown again" in err
    assert main(["revoke", key.id]) == 0
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert out.strip() not in listed
    assert [line.split() for line in listed.splitlines()[1:]][1][:2] == [key.id, "shop"]
    assert listed.rstrip().endswith("revoked")
    assert main(["revoke", "nothing"]) == 2
    assert "no key 'nothing'; python -m serve.keys list shows them" in capsys.readouterr().err
    with pytest.raises(RegistryError):
        keys.revoke("nothing")


def _make(url: str) -> None:
    database.engine(url)


def test_processes_that_make_the_tables_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'whorl.db'}"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    with sqlite3.connect(tmp_path / "new" / "whorl.db") as opened:
        names = {row[0] for row in opened.execute("select name from sqlite_master where type = 'table'")}
    assert "whorl_keys" in names


def test_a_database_that_cannot_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHORL_DATABASE", "postgresql://me:secret@127.0.0.1:1/nothing")
    with pytest.raises(StorageError, match="WHORL_DATABASE") as told:
        keys.listed()
    assert "secret" not in str(told.value)
