"""Datasets as they are made on Ray: the right rows, once, in one split, the same however they were made."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib.artifacts import SPLITS
from lib.data import passes
from lib.data.build import build
from lib.data.plan import plan
from lib.errors import DataError
from lib.settings import Settings
from tests.conftest import WORDS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "storage")]


def settings(base: Path, source: Any, **data: Any) -> Settings:
    section = {"source": source, "labels": {1: "bad", 2: "good"}, "rows_per_shard": 40, **data}
    values = {"name": "test", "task": "sentiment", "data": section}
    return Settings.model_validate({**values, "model": {"base": str(base), "max_length": 12}})


def sentence(number: int) -> str:
    """A different text for each number below 20³, of words that the tiny tokeniser knows."""
    words = [WORDS[number // 20**i % 20] for i in range(3)]
    return " ".join(["fits", *words])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """300 rows in three formats: 5 without text, 3 without label, 10 repeated, 4 of these with another label."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows: list[tuple[str | None, int | None, str]] = [
        (sentence(i), 1 + i % 2, "even" if i % 2 else "odd") for i in range(278)
    ]
    rows[20:20] = [("", 1, "x"), ("  \u200b", 1, "x"), (None, 1, "x"), ("\n", 2, "x"), (None, None, "x")]
    rows[200:200] = [(sentence(900), None, "x")] * 3
    for i in range(10):
        rows.append((f" {sentence(i * 7)}\n", 1 + i * 7 % 2 if i >= 4 else 2 - i * 7 % 2, "repeated"))
    rows += [(sentence(1000 + i), 1, "late") for i in range(4)]
    assert len(rows) == 300
    names = ["text", "label", "kind"]
    table = pa.table(dict(zip(names, zip(*rows[:100], strict=True), strict=True)))
    pq.write_table(table, folder / "a.parquet", row_group_size=17)
    with (folder / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows[100:200]])
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows[200:]]
    (folder / "c.jsonl").write_text("\n".join(lines))
    return folder


def read(uri: str) -> dict[str, pa.Table]:
    folder = Path(uri.removeprefix("file://"))
    return {
        split: pa.concat_tables([pq.read_table(p) for p in sorted((folder / split).glob("*.parquet"))])
        for split in SPLITS
    }


def test_a_dataset_holds_every_good_row_once(tiny_base: Path, source: Path) -> None:
    planned = plan(settings(tiny_base, str(source), slices={"kind": "kind"}))
    assert not planned.ref.exists()
    manifest = build(planned)
    assert planned.ref.exists()
    assert manifest == planned.ref.manifest()
    assert manifest["rows_read"] == 300
    assert manifest["dropped"] == {
        "empty": 5,
        "unlabelled": 3,
        "duplicate": 6,
        "conflicting": 4,
        "near_duplicate": 0,
        "near_conflicting": 0,
        "leaking": 0,
        "undersampled": 0,
    }
    assert [s["rows"] for s in manifest["sources"]] == [100, 100, 100]

    tables = read(planned.ref.uri)
    whole = pa.concat_tables(tables.values())
    expected = {sentence(i): i % 2 for i in range(278)} | {sentence(1000 + i): 0 for i in range(4)}
    assert dict(zip(whole["text"].to_pylist(), whole["label"].to_pylist(), strict=True)) == expected
    assert whole.num_rows == len(expected)
    assert set(whole["kind"].to_pylist()) == {"even", "odd", "late"}
    for text, name in zip(whole["text"].to_pylist(), whole["id"].to_pylist(), strict=True):
        assert name == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16]
    for split, table in tables.items():
        count = manifest["splits"][split]
        assert table.num_rows == count["rows"] > 0
        assert Counter(table["label"].to_pylist()) == {
            i: count["labels"][name] for i, name in enumerate(["bad", "good"]) if count["labels"][name]
        }
        assert table["length"].to_pylist() == [len(ids) for ids in table["input_ids"].to_pylist()]
        assert sum(table["length"].to_pylist()) == count["tokens"]


def test_columns_and_tokens_are_what_training_reads(tiny_base: Path, source: Path) -> None:
    from transformers import AutoTokenizer

    planned = plan(settings(tiny_base, str(source), slices={"kind": "kind"}))
    build(planned)
    table = read(planned.ref.uri)["train"]
    assert {f.name: str(f.type) for f in table.schema} == {
        "id": "string",
        "text": "string",
        "label": "int32",
        "kind": "string",
        "input_ids": "list<element: int32>",
        "length": "int32",
        "truncated": "bool",
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = table.slice(0, 20).to_pylist()
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=12)
    assert [row["input_ids"] for row in rows] == encoded["input_ids"]


def test_undersampling_leaves_out_training_rows_of_its_label_alone(tiny_base: Path, source: Path) -> None:
    whole, sampled = (
        plan(settings(tiny_base, str(source), **extra)) for extra in ({}, {"undersample": {"good": 0.4}})
    )
    before, after = build(whole), build(sampled)
    kept = after["splits"]["train"]["labels"]
    assert kept["bad"] == before["splits"]["train"]["labels"]["bad"]
    assert 0 < kept["good"] < 0.6 * before["splits"]["train"]["labels"]["good"]
    left_out = before["splits"]["train"]["labels"]["good"] - kept["good"]
    assert after["dropped"]["undersampled"] == left_out
    for split in ("validation", "test"):
        assert read(sampled.ref.uri)[split].equals(read(whole.ref.uri)[split])
    assert set(read(sampled.ref.uri)["train"]["id"].to_pylist()) < set(
        read(whole.ref.uri)["train"]["id"].to_pylist()
    )


def contents(uri: str) -> dict[str, bytes]:
    folder = Path(uri.removeprefix("file://"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def test_the_same_input_gives_the_same_bytes(
    tiny_base: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(settings(tiny_base, str(source)))
    build(planned)
    first = contents(planned.ref.uri)
    assert len(first) > 6
    # With other machines: other concurrency, and Ray Data merging blocks where it can.
    files.remove(planned.ref.uri)
    monkeypatch.setattr(passes, "parallel_tasks", lambda: 1)
    monkeypatch.setattr(passes, "RAY_BLOCK_BYTES", 128 << 20)
    build(plan(settings(tiny_base, str(source))))
    assert contents(planned.ref.uri) == first


def test_new_rows_move_no_old_row_and_no_text_lies_in_two_splits(tiny_base: Path, source: Path) -> None:
    before = plan(settings(tiny_base, str(source)))
    build(before)
    old = {split: set(t["text"].to_pylist()) for split, t in read(before.ref.uri).items()}
    more = [json.dumps({"text": sentence(2000 + i % 80), "label": 1, "kind": "new"}) for i in range(100)]
    (source / "0.jsonl").write_text("\n".join(more))
    after = plan(settings(tiny_base, str(source)))
    assert after.ref != before.ref
    build(after)
    new = {split: set(t["text"].to_pylist()) for split, t in read(after.ref.uri).items()}
    assert all(old[split] <= new[split] for split in SPLITS)
    assert sum(len(texts) for texts in new.values()) == len(set().union(*new.values())) == 282 + 80


def test_duplicates_are_found_across_partitions_and_blocks(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes.dedup, "PARTITION_BYTES", 2000)
    rows = [{"text": sentence(i % 700), "label": 1 + i % 2} for i in range(2100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    planned = plan(settings(tiny_base, f"{tmp_path}/a.jsonl", rows_per_shard=100))
    manifest = build(planned)
    assert manifest["dropped"]["duplicate"] == 1400
    # The first is kept, wherever its block was read.
    assert sorted(pa.concat_tables(read(planned.ref.uri).values())["text"].to_pylist()) == sorted(
        sentence(i) for i in range(700)
    )


def test_limit_and_seed_and_shares(tiny_base: Path, source: Path) -> None:
    split = {"train": 0.5, "validation": 0.5, "test": 0, "seed": 3}
    planned = plan(settings(tiny_base, str(source), limit=120, split=split))
    manifest = build(planned)
    assert manifest["rows_read"] == 120
    assert manifest["splits"]["test"] == {
        "rows": 0, "tokens": 0, "truncated": 0, "labels": {"bad": 0, "good": 0}, "shards": []
    }  # fmt: skip
    assert 40 < manifest["splits"]["train"]["rows"] < 75
    assert planned.ref.shards("test") == []


def test_the_fingerprint_follows_content_and_config_not_paths(tiny_base: Path, source: Path) -> None:
    first = plan(settings(tiny_base, str(source))).ref
    moved = source.rename(source.with_name("moved"))
    assert plan(settings(tiny_base, str(moved))).ref == first
    changes: list[dict[str, Any]] = [
        {"labels": {2: "good", 1: "bad"}},  # another order is another class index
        {"split": {"seed": 1}},
        {"rows_per_shard": 41},
        {"slices": {"kind": "kind"}},
        {"limit": 100},
    ]
    refs = [plan(settings(tiny_base, str(moved), **change)).ref for change in changes]
    assert len({first, *refs}) == len(changes) + 1
    (moved / "b.csv").write_text((moved / "b.csv").read_text() + "fits a lot,1,x\n")
    assert plan(settings(tiny_base, str(moved))).ref != first


def test_a_failure_on_the_way_leaves_nothing(
    tiny_base: Path, source: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(settings(tiny_base, str(source)))
    # The source changes between the passes: the second finds another number of rows.
    real = passes.find_duplicates

    def slow(*arguments: Any) -> Any:
        (source / "c.jsonl").write_text('{"text": "fits", "label": 1}')
        return real(*arguments)

    monkeypatch.setattr("lib.data.build.find_duplicates", slow)
    with pytest.raises(DataError, match="changed while it was read; run again"):
        build(planned)
    assert not planned.ref.exists()
    assert list((storage / "datasets" / "test").iterdir()) == []
