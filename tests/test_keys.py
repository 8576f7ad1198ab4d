"""API keys: what is stored, what opens what, what a user can get wrong."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from lib import database, keys, tracking
from lib.errors import ConfigError, RegistryError, StorageError
from serve.keys import main


def test_a_key_is_found_by_its_secret_which_is_stored_nowhere(either_database: str) -> None:
    key, secret = keys.create("shop", ["support", "reviews"], requests_per_minute=60)
    assert keys.find(secret) == key
    assert keys.find(secret + "x") is None
    assert key.opens("support")
    assert not key.opens("other")
    assert keys.create("all", ["*"])[0].opens("other")
    with database.engine().connect() as connection:
        written = str(connection.execute(select(keys.KEYS)).all())
    assert "shop" in written
    assert secret.removeprefix(keys.PREFIX) not in written


def test_revoked_and_expired_are_not_valid(either_database: str) -> None:
    key, secret = keys.create("shop", ["*"], days=1)
    assert key.is_valid()
    assert not key.is_valid(time.time() + 86_401)
    revoked = keys.revoke(key.id)
    assert not revoked.is_valid()
    found = keys.find(secret)
    assert found is not None
    assert found.revoked == revoked.revoked
    assert keys.revoke(key.id).revoked == revoked.revoked, "the first time counts"


def test_two_keys_are_never_alike(either_database: str) -> None:
    secrets = {keys.create(str(i), ["*"])[1] for i in range(20)}
    assert len(secrets) == 20
    assert {len(secret) for secret in secrets} == {len(keys.PREFIX) + 43}
    assert [key.name for key in keys.listed()] == [str(i) for i in range(20)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": " "}, "--name is empty"),
        ({"scopes": ["", " "]}, "--scopes is empty"),
        ({"name": "n" * 101}, "--name has 101 characters; at most 100"),
        ({"scopes": ["s" * 1001]}, "--scopes has 1,001 characters; at most 1,000"),
        ({"requests_per_minute": 0}, "--requests-per-minute 0 must be above 0"),
        ({"days": -1.0}, "--days -1.0 must be above 0"),
    ],
)
def test_what_makes_no_key_is_one_line(storage: Path, values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keys.create(**{"name": "shop", "scopes": ["*"], **values})
    assert keys.listed() == []


def test_the_command(either_database: str, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_processes_that_make_the_tables_at_once(either_database: str) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tracking.database_url(),)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert keys.listed() == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret@127.0.0.1:1/nothing", "Connection refused"),
        ("postgresql+nothing://me:secret@127.0.0.1/nothing", "is postgresql+nothing; it must be"),
        ("postgresql://me:secret@127.0.0.1:port/nothing", "WHORL_DATABASE"),
        ("postgres://me:secret@127.0.0.1/nothing", "is postgres; it must be sqlite:///path or postgresql://"),
        ("mysql://me:secret@127.0.0.1/nothing", "is mysql; it must be"),
        ("secret.db", "is no URL; it must be"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line(
    monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    monkeypatch.setenv("WHORL_DATABASE", url)
    for opened in (keys.listed, tracking.client):
        with pytest.raises(StorageError, match="WHORL_DATABASE") as told:
            opened()
        assert said in str(told.value)
        assert "secret" not in str(told.value)
