"""Rows and files that cannot be used: set aside up to a share, the same in both passes, without moving the others."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.blocks import Reading, from_row, read_blocks, to_row
from lib.data.build import build
from lib.data.plan import plan
from lib.data.reading import quarantine
from lib.data.reading.quarantine import Entry, Quarantined
from lib.data.reading.readers import column_names
from lib.data.reading.sources import find_files
from lib.data.redact import Rules
from lib.data.shards import write_shards
from lib.errors import ConfigError, DataError
from lib.settings import RedactionSettings, Settings
from tests.data.test_build import read, sentence, settings, write_jsonl


def good(number: int) -> str:
    return json.dumps({"text": sentence(number), "label": 1 + number % 2})


def reading(*places: Path, block_rows: int = 5, bad_rows: bool = True, limit: int | None = None) -> Reading:
    found = tuple(find_files([str(place) for place in places]))
    return Reading(found, {"text": "text", "label": "label"}, frozenset(), block_rows, limit, bad_rows)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three files: bad lines among 20 good ones; nothing that can be decompressed behind a beginning; 7 good rows and a bad one."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = [good(i) for i in range(20)]
    lines[3:3] = ["{broken by ada@example.com", "[1]"]
    lines.insert(12, '{"text": {}}')
    (folder / "a.jsonl").write_text("\n".join(lines))
    whole = gzip.compress("".join(good(100 + i) + "\n" for i in range(3000)).encode())
    (folder / "b.jsonl.gz").write_bytes(whole[:-2000])
    rows = "".join(f"{sentence(5000 + i)},1\n" for i in range(7))
    (folder / "c.csv").write_text(f"text,label\n{rows}one,too,many\n")
    return folder


@pytest.mark.parametrize("block_rows", [1, 4, 1000])
def test_blocks_hold_every_good_row_once_and_tell_the_bad_ones(mixed: Path, block_rows: int) -> None:
    source = reading(mixed, block_rows=block_rows)
    (fragment,) = source.fragments()
    found = [from_row(to_row(block), ["text", "label"]) for block in read_blocks(source, 0, fragment)]
    again = list(read_blocks(source, 0, fragment))
    assert [b.rows.equals(c.rows) and b.bad == c.bad for b, c in zip(found, again, strict=True)] == [
        True
    ] * len(found)
    assert max(block.rows.num_rows for block in found) <= block_rows
    assert [block.problem for block in found] == [None] * len(found)
    positions = [p for block in found for p in block.rows["position"].to_pylist()]
    assert positions == sorted(set(positions))
    places = [source.place(p).removeprefix(f"{mixed}/") for p in positions]
    assert places[:4] == ["a.jsonl row 1", "a.jsonl row 2", "a.jsonl row 3", "a.jsonl row 6"]
    texts = [t for block in found for t in block.rows["text"].to_pylist()]
    assert texts[:20] == [sentence(i) for i in range(20)]
    assert texts[-7:] == [sentence(5000 + i) for i in range(7)]
    assert 0 < len(texts) - 27 < 3000
    bad = [entry for block in found for entry in block.bad]
    assert [entry.position for entry in bad] == sorted(entry.position for entry in bad)
    told = [(source.place(entry.position).removeprefix(f"{mixed}/"), entry.reason) for entry in bad]
    assert told[:3] == [
        ("a.jsonl row 4", "not_json"),
        ("a.jsonl row 5", "not_json"),
        ("a.jsonl row 13", "wrong_value"),
    ]
    (damaged,) = [place for place, reason in told if reason == "damaged"]
    assert damaged == f"b.jsonl.gz row {len(texts) - 27 + 1}"
    assert told[-1] == ("c.csv row 8", "wrong_columns")
    for before, block in pairwise(found):
        last = max(before.rows["position"].to_pylist(), default=-1)
        assert all(entry.position > last for entry in block.bad)


def test_a_limit_counts_rows_that_can_be_read(mixed: Path) -> None:
    source = reading(mixed, limit=10)
    found = list(read_blocks(source, 0, source.fragments()[0]))
    assert [t for block in found for t in block.rows["text"].to_pylist()] == [sentence(i) for i in range(10)]
    assert len([entry for block in found for entry in block.bad]) == 2


def test_without_a_quarantine_the_first_problem_ends_the_fragment(mixed: Path) -> None:
    source = reading(mixed, bad_rows=False)
    (block,) = read_blocks(source, 0, source.fragments()[0])
    assert f"{mixed}/a.jsonl line 4 is not valid JSON" in str(block.problem)


def test_many_bad_rows_do_not_make_a_large_block(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("broken\n" * 1000 + good(1))
    source = reading(tmp_path / "a.jsonl", block_rows=50)
    found = list(read_blocks(source, 0, (0, 1)))
    assert max(len(block.bad) for block in found) == 50
    assert sum(len(block.bad) for block in found) == 1000
    assert sum(block.rows.num_rows for block in found) == 1


def test_columns_are_known_in_spite_of_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"broken\n{good(1)}")
    (tmp_path / "b.csv").write_text("text,label\none,too,many\n")
    (tmp_path / "c.conll").write_text("one\ntwo O\n\nword\n")
    for name, columns in (("a.jsonl", ["text", "label"]), ("b.csv", ["text", "label"])):
        (file,) = find_files([str(tmp_path / name)])
        assert column_names(file, bad_rows=True) == columns
        with pytest.raises(DataError):
            column_names(file)
    (file,) = find_files([str(tmp_path / "c.conll")])
    assert column_names(file, bad_rows=True) == ["1", "last"]


def test_shares_are_of_rows_and_of_bytes(mixed: Path) -> None:
    source = reading(mixed)
    rows = Quarantined.among(
        [Entry(3, "not_json", "is none", "x"), Entry(9, "wrong_columns", "has 3", "y", rows=4)], []
    )
    rows.unread = 5
    quarantine.check(rows, source, 95, share=0.05)
    with pytest.raises(DataError) as caught:
        quarantine.check(rows, source, 94, share=0.05)
    assert str(caught.value) == (
        "data.quarantine: 5 of 99 rows (5.05%) cannot be used, more than the share of 0.05: 4 have another number of columns, "
        f"1 are no JSON objects; first: {mixed}/a.jsonl row 4 is none; {mixed}/a.jsonl row 10 has 3; correct the source or "
        "raise data.quarantine.share"
    )
    files = Quarantined.among([Entry((1 << 40) + 7, "damaged", "is damaged: it ends", "")], [])
    size = source.files[1].size / sum(file.size for file in source.files)
    quarantine.check(files, source, 10_000, share=size + 0.001)
    with pytest.raises(
        DataError,
        match=rf"damaged files with {size:.2%} of the bytes cannot be used.*1 files are damaged; first: ",
    ):
        quarantine.check(files, source, 10_000, share=size - 0.001)
    quarantine.check(Quarantined(), source, 0, share=0.0)


def test_personal_data_is_out_before_anything_is_cut() -> None:
    text = "x" * 110 + " write to ada@example.com or call +44 20 7946 0958 " + "y" * 400
    entry = Entry(1, "unknown_label", f"holds the label {text!r}, which is none", text)
    (shown,) = quarantine.without_personal_data([entry], Rules.of(RedactionSettings()))
    assert "ada" not in shown.text + shown.why
    assert "7946" not in shown.why
    assert (len(shown.text), len(shown.why)) == (120, 300)
    (raw,) = quarantine.without_personal_data([entry], None)
    assert "ada@example" in raw.why


def test_of_rows_that_cannot_be_encoded_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.data import shards
    from lib.tasks import UnencodableError, sentiment

    class Picky:
        """sentiment, but for some texts."""

        counts = staticmethod(sentiment.counts)

        @staticmethod
        def encode(rows: pa.Table, model: Any) -> pa.Table:
            for number, text in enumerate(rows["text"].to_pylist()):
                if text.endswith("7"):
                    raise UnencodableError(number, f"refuses {text}")
            return rows.append_column("length", pa.array([1] * len(rows), pa.int32()))

    monkeypatch.setattr(shards, "ENCODE_ROWS", 8)
    rows = pa.table({"text": [f"text {i}" for i in range(60)], "label": pa.array([0] * 60, pa.int32())})
    refused = {0: "has no room"}
    places = pa.array([i % 2 for i in range(60)]).to_numpy()
    written = write_shards(rows, places, 0, str(tmp_path), Picky, None, ["a"], refused)  # type: ignore[arg-type]
    assert sorted(refused) == [0, 7, 17, 27, 37, 47, 57]
    assert refused[17] == "refuses text 17"
    assert [count.rows for count in written.values()] == [29, 24]
    texts = [
        t for split in ("train", "validation") for t in pq.read_table(tmp_path / split)["text"].to_pylist()
    ]
    assert sorted(texts) == sorted(f"text {i}" for i in range(60) if i not in refused)
    with pytest.raises(UnencodableError, match="refuses text 7") as caught:
        write_shards(rows, places, 0, str(tmp_path), Picky, None, ["a"])  # type: ignore[arg-type]
    assert caught.value.row == 7


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
class TestBuilt:
    def test_the_dataset_is_that_of_the_good_rows(self, tiny_base: Path, mixed: Path, tmp_path: Path) -> None:
        lines = (mixed / "a.jsonl").read_text().splitlines()
        lines.insert(15, json.dumps({"text": "odd, ask bob@example.com", "label": "nobody@example.com"}))
        (mixed / "a.jsonl").write_text("\n".join(lines))
        planned = plan(settings(tiny_base, str(mixed), quarantine={"share": 0.99}, rows_per_shard=9))
        said: list[str] = []
        manifest = build(planned, said.append)
        lost = manifest["quarantine"]
        assert lost == {
            "share": 0.99,
            "rows": 5,
            "reasons": {
                "not_json": 2,
                "wrong_columns": 1,
                "wrong_value": 1,
                "unknown_label": 1,
                "damaged": 1,
            },
            "damaged": [f"{mixed}/b.jsonl.gz"],
        }
        assert manifest["dropped"]["quarantined"] == 5
        kept = sum(count["rows"] for count in manifest["splits"].values())
        assert manifest["rows_read"] == kept + sum(manifest["dropped"].values())
        folder = Path(planned.ref.uri.removeprefix("file://"))
        entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert not (folder / "quarantine").exists()
        assert [(Path(e["file"]).name, e["reason"]) for e in entries] == [
            ("a.jsonl", "not_json"), ("a.jsonl", "not_json"), ("a.jsonl", "wrong_value"), ("a.jsonl", "unknown_label"),
            ("b.jsonl.gz", "damaged"), ("c.csv", "wrong_columns"),
        ]  # fmt: skip
        assert [e["row"] for e in entries if e["file"].endswith("a.jsonl")] == [4, 5, 13, 16]
        assert entries[0]["text"] == "{broken by <EMAIL_1>"
        assert entries[3]["text"] == "odd, ask <EMAIL_1>"
        assert "@" not in json.dumps(entries)
        assert [row["row"] for row in manifest["examples"]["quarantined"]] == [
            f"{mixed}/a.jsonl row {row}" for row in (4, 5, 13)
        ]
        # The same rows alone give the same texts in the same splits.
        texts = {name: table["text"].to_pylist() for name, table in read(planned.ref.uri).items()}
        rows = [{"text": text, "label": 1} for some in texts.values() for text in some]
        clean = plan(settings(tiny_base, write_jsonl(tmp_path / "clean.jsonl", rows)))
        build(clean)
        assert {n: sorted(t["text"].to_pylist()) for n, t in read(clean.ref.uri).items()} == {
            n: sorted(t) for n, t in texts.items()
        }

    def test_above_the_share_nothing_is_published(
        self, tiny_base: Path, tmp_path: Path, storage: Path
    ) -> None:
        lines = [good(i) for i in range(195)]
        lines[50:50] = ["broken"] * 3 + ['{"text": "fits", "label": 9}'] * 2
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        planned = plan(settings(tiny_base, f"{tmp_path}/a.jsonl", quarantine={"share": 0.02}))
        with pytest.raises(DataError) as caught:
            build(planned)
        assert str(caught.value).startswith(
            "data.quarantine: 5 of 200 rows (2.50%) cannot be used, more than the share of 0.02: 3 are no JSON objects, "
            f"2 hold a label outside the mapping; first: {tmp_path}/a.jsonl row 51 is not valid JSON"
        )
        assert list((storage / "datasets" / "test").iterdir()) == []
        build(plan(settings(tiny_base, f"{tmp_path}/a.jsonl", quarantine={"share": 0.025})))

    def test_a_file_without_a_beginning_is_set_aside_too(self, tiny_base: Path, tmp_path: Path) -> None:
        table = pa.table(
            {"text": [sentence(i) for i in range(200)], "label": [1 + i % 2 for i in range(200)]}
        )
        pq.write_table(table, tmp_path / "b.parquet")
        pq.write_table(table.slice(0, 1), tmp_path / "a.parquet")
        (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
        with pytest.raises(DataError, match=r"a\.parquet is not readable Parquet"):
            plan(settings(tiny_base, f"{tmp_path}/*.parquet"))
        planned = plan(settings(tiny_base, f"{tmp_path}/*.parquet", quarantine={"share": 0.3}))
        manifest = build(planned)
        assert manifest["quarantine"]["damaged"] == [f"{tmp_path}/a.parquet"]
        assert manifest["rows_read"] == 200
        with pytest.raises(DataError, match=r"a\.parquet is not readable Parquet"):
            plan(settings(tiny_base, f"{tmp_path}/a.parquet", quarantine={"share": 0.3}))

    def test_malformed_sentences(self, tiny_base: Path, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"tokens": sentence(i).split(), "tags": ["O", "B-PER", "O", "O"]} for i in range(80)
        ]
        rows[10] = {"tokens": ["fits", "well"], "tags": ["O"]}
        rows[20] = {"tokens": ["fits", "well"], "tags": ["O", "B-ORG"]}
        source = write_jsonl(tmp_path / "a.jsonl", rows)
        data = {"source": source, "labels": ["PER"], "quarantine": {"share": 0.05}, "leakage": "off"}
        planned = plan(
            Settings.model_validate(
                {
                    "name": "words",
                    "task": "tagging",
                    "data": data,
                    "model": {"base": str(tiny_base), "max_length": 12},
                }
            )
        )
        manifest = build(planned)
        assert manifest["quarantine"]["reasons"] == {"malformed": 1, "unknown_label": 1}
        lines = Path(planned.ref.uri.removeprefix("file://"), "quarantine.jsonl").read_text().splitlines()
        first, second = map(json.loads, lines)
        assert (first["row"], second["row"]) == (11, 21)
        assert first["why"] == "has 2 tokens and 1 tags; each token needs one tag"
        assert second["why"] == "holds the label 'B-ORG', which is not in data.labels"
        assert first["text"] == '["fits", "well"]'


def test_recommendations_have_none(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,time\na,b,1\n")
    (tmp_path / "items.csv").write_text("item,title\nb,B\n")
    data = {
        "source": f"{tmp_path}/a.csv",
        "items": {"source": f"{tmp_path}/items.csv"},
        "quarantine": {"share": 0.1},
    }
    given = {"name": "shop", "task": "recommend", "data": data, "model": {"base": str(tiny_base)}}
    with pytest.raises(ConfigError, match=r"data\.quarantine: recommend needs every row"):
        plan(Settings.model_validate(given))
