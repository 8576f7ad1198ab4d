"""What a SELECT gives, as rows to read: from SQLite and from PostgreSQL, asked once, and without a password anywhere."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sqlalchemy import create_engine, text

from lib.data.build import build
from lib.data.plan import plan
from lib.data.reading.queries import BATCH_ROWS, check, is_database, snapshot
from lib.data.reading.readers import read_tables
from lib.data.reading.sources import find_files
from lib.errors import ConfigError, DataError
from lib.settings import DataSettings, load_settings
from tests.data.test_build import read, sentence, settings
from tests.servers import Postgres

QUERY = "SELECT body AS text, stars AS label, price, at, note FROM reviews ORDER BY id"
ROWS = 2 * BATCH_ROWS + 50


@pytest.fixture(params=["sqlite", "postgresql"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database with reviews, as a configuration names it."""
    if request.param == "sqlite":
        url = named = f"sqlite:///{tmp_path}/shop.db"
    else:
        url = request.getfixturevalue("postgres").fresh()
        monkeypatch.setenv("SHOP_PASSWORD", "se/cr@t:")
        named = url.replace("secret", "${SHOP_PASSWORD}")
    engine = create_engine(url)
    with engine.begin() as connection:
        kinds = "id integer, body text, stars integer, price numeric(8, 2), at timestamp, note text"
        connection.execute(text(f"create table reviews ({kinds})"))
        rows = [
            {
                "id": i,
                "body": sentence(i),
                "stars": 1 + i % 2,
                "price": 1.5,
                "at": datetime(2026, 1, 2, 3, 4),
                "note": None,
            }
            for i in range(ROWS)
        ]
        connection.execute(text("insert into reviews values (:id, :body, :stars, :price, :at, :note)"), rows)
    yield named
    engine.dispose()


def change(named: str, statement: str) -> None:
    engine = create_engine(named.replace("${SHOP_PASSWORD}", "secret"))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def shown(named: str) -> str:
    return named.replace("${SHOP_PASSWORD}", "***")


@pytest.mark.usefixtures("storage")
def test_the_rows_of_a_query_are_those_of_a_file(shop: str) -> None:
    (file,) = find_files([shop], query=QUERY)
    assert file.name == shown(shop)
    assert "t:" not in file.name + file.uri
    tables = list(read_tables(file, ["text", "label", "price", "at", "note"], 1000))
    table = pa.concat_tables(tables)
    assert table["text"].to_pylist() == [sentence(i) for i in range(ROWS)]
    assert set(table["label"].to_pylist()) == {"1", "2"}
    assert {float(price) for price in table["price"].to_pylist()} == {1.5}
    assert {at.replace(" ", "T").partition(".")[0] for at in table["at"].to_pylist()} == {
        "2026-01-02T03:04:00"
    }
    assert set(table["note"].to_pylist()) == {None}
    assert file.columns == ("text", "label", "price", "at", "note")


@pytest.mark.usefixtures("storage")
def test_the_same_rows_have_one_name_and_other_rows_another(shop: str) -> None:
    first = snapshot(shop, QUERY, "data.source", fresh=True)
    assert snapshot(shop, QUERY + " ;", "data.source", fresh=True) == first
    change(shop, "update reviews set body = 'other' where id = 7")
    # Whoever comes behind means the rows that were read.
    assert snapshot(shop, QUERY, "data.source", fresh=False) == first
    second = snapshot(shop, QUERY, "data.source", fresh=True)
    assert second.content != first.content
    assert not Path(first.uri.removeprefix("file://")).exists()
    assert Path(second.uri.removeprefix("file://")).exists()


@pytest.mark.usefixtures("storage")
def test_pipelines_side_by_side_keep_their_own_rows(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHORL_PIPELINE", "one")
    first = snapshot(shop, QUERY, "data.source", fresh=True)
    change(shop, "delete from reviews where id > 5")
    monkeypatch.setenv("WHORL_PIPELINE", "two")
    second = snapshot(shop, QUERY, "data.source", fresh=True)
    assert (first.rows, second.rows) == (ROWS, 6)
    monkeypatch.setenv("WHORL_PIPELINE", "one")
    assert snapshot(shop, QUERY, "data.source", fresh=False).content == first.content
    monkeypatch.delenv("WHORL_PIPELINE")
    assert snapshot(shop, QUERY, "data.source", fresh=False).content == second.content


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize(
    ("query", "said"),
    [
        (None, "data.source is a database; say what is read of it: {uri: …, query: SELECT …}"),
        ("  ;", "the query must be one SELECT, and begins with ''"),
        ("delete from reviews", "the query must be one SELECT, and begins with 'delete'"),
        (
            "select 1; delete from reviews",
            "the query must be one statement; leave out what stands behind the ;",
        ),
        ("with gone as (delete from reviews returning *) select * from gone", ""),
        ("select body from review", "review"),
        ("select body as a, stars as a from reviews", "gives two columns 'a'; name one of them with AS"),
        ("select pg_sleep(0), nothing from reviews", ""),
    ],
)
def test_what_is_no_reading_query(shop: str, storage: Path, query: str | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_files([shop], query=query)
    line = str(caught.value)
    assert line.startswith("data.source")
    assert said in line
    assert "se/cr@t" not in line
    assert not list(storage.rglob("*.parquet"))
    change(shop, "update reviews set stars = 1")  # nothing is held, and nothing gone
    assert snapshot(shop, "select * from reviews", "data.source", fresh=True).rows == ROWS


def test_texts_and_comments_of_a_query_may_hold_anything() -> None:
    for query in (
        "select ';' from a -- ; drop",
        "SELECT \"a;b\" FROM a /* ; */ WHERE t LIKE '%10:30;%' ;\n",
        "with b as (select $$;$$) select * from b",
        "(select 1)",
        "-- what this is\nselect 1",
    ):
        assert check("data.source", query)
    with pytest.raises(ConfigError, match="one statement"):
        check("data.source", "select ''';' ; drop table a")


@pytest.mark.usefixtures("storage")
def test_a_query_is_sent_as_it_is(shop: str) -> None:
    asked = "select body as text from reviews where body like '%fits%' and '10:30' <> '%s' and id < 3"
    assert snapshot(shop, asked, "data.source", fresh=True).rows == 3


@pytest.mark.usefixtures("storage")
def test_databases_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite3.connect(tmp_path / "shop.db").close()
    with pytest.raises(
        ConfigError, match=r"data\.source: sqlite:///.*shops\.db does not exist; did you mean 'shop\.db'"
    ):
        find_files([f"sqlite:///{tmp_path}/shops.db"], query="select 1")
    assert not (tmp_path / "shops.db").exists()
    with pytest.raises(ConfigError, match=r"the environment variable NO_SUCH is not set"):
        find_files(["postgresql://me:${NO_SUCH}@127.0.0.1/shop"], query="select 1")
    monkeypatch.setenv("NO_SUCH", "top-secret")
    with pytest.raises(
        ConfigError, match=r"data\.source: postgresql://me:\*\*\*@127\.0\.0\.1:1/shop: "
    ) as caught:
        find_files(["postgresql://me:${NO_SUCH}@127.0.0.1:1/shop"], query="select 1")
    assert "top-secret" not in str(caught.value)
    monkeypatch.setenv("SHOP", f"sqlite:///{tmp_path}/shop.db")
    assert is_database("${SHOP}")
    with pytest.raises(ConfigError, match=r"shop\.db: no such table: reviews"):
        find_files(["${SHOP}"], query="select * from reviews")


@pytest.mark.usefixtures("storage")
def test_values_of_other_kinds(postgres: Postgres) -> None:
    url = postgres.fresh()
    change(url, "create table t (a jsonb, b text[], c boolean, d double precision, e bytea, f uuid)")
    change(
        url,
        """insert into t values ('[{"role": "user"}]', '{x,y}', true, 'NaN', 'x', '00000000-0000-0000-0000-000000000001')""",
    )
    named = url.replace("secret", "${NOBODY}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOBODY", "secret")
        (file,) = find_files([named], query="select a, b, c, d, f from t")
        (table,) = read_tables(file, ["a", "b", "c", "d", "f"], 10, {"a", "b"})
        assert [value.as_py() for (value,) in table.columns] == [
            '[{"role": "user"}]', '["x", "y"]', "true", None, "00000000-0000-0000-0000-000000000001",
        ]  # fmt: skip
        with pytest.raises(DataError, match=r"row 1: 'e' holds bytes; select a text or a number instead"):
            find_files([named], query="select e from t")


@pytest.mark.parametrize(
    "source",
    [
        "postgresql://me:secret@host/shop",
        "postgresql+psycopg://me:secret${X}@host/shop",
        "postgresql://host/shop?user=me&password=secret",
        ["a.csv", "postgresql://me:secret@host/shop"],
    ],
)
def test_a_password_does_not_belong_into_a_configuration(source: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    values = {"name": "a", "task": "sentiment", "data": {"source": source}, "model": {"base": "b"}}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert "data.source: a database's password does not belong into a configuration" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_urls_without_one_do() -> None:
    for source in (
        "postgresql://me:${SHOP}@host/shop",
        "postgresql://me@host:5432/shop",
        "sqlite:///a/b:c@d.db",
        "${SHOP}",
    ):
        assert DataSettings.model_validate({"source": source}).source == source


def test_rows_that_nobody_will_read_do_not_stay(shop: str, tiny_base: Path, storage: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'words' \(data\.columns\.text\)"):
        plan(settings(tiny_base, shop, query=QUERY, columns={"text": "words"}))
    assert not list(storage.rglob("*.parquet"))
    with pytest.raises(ConfigError, match=r"data\.test_source is a database; say what is read of it"):
        plan(settings(tiny_base, shop, query=QUERY, test_source=shop))
    with pytest.raises(ConfigError, match=r"score\.source is a database, and only data\.source, "):
        find_files([shop], key="score.source")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_of_a_query(shop: str, tiny_base: Path, storage: Path) -> None:
    given = settings(tiny_base, shop, query=QUERY, rows_per_shard=1000)
    planned = plan(given)
    manifest = build(planned)
    (source,) = manifest["sources"]
    assert (source["uri"], source["query"], source["rows"]) == (shown(shop), QUERY, ROWS)
    texts = pa.concat_tables(read(planned.ref.uri).values())["text"].to_pylist()
    assert sorted(texts) == sorted(sentence(i) for i in range(ROWS))
    planned.forget()
    assert not list((storage / "snapshots").glob("*.parquet"))
    change(shop, "delete from reviews where id = 0")
    assert plan(given, fresh=False).ref == planned.ref
    assert plan(given).ref != planned.ref
    written = " ".join(p.read_text() for p in storage.rglob("*.json"))
    assert "se/cr@t" not in written
    assert "SHOP_PASSWORD" not in json.dumps(manifest)
