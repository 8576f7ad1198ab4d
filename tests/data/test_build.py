"""Datasets as they are made on Ray: the right rows, once, in one split, the same however they were made."""

from __future__ import annotations

import csv
import hashlib
import json
import lzma
import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib.artifacts import SPLITS
from lib.data import passes, shuffles, stream
from lib.data.alike import near_passes
from lib.data.build import build
from lib.data.plan import Plan, plan
from lib.errors import DataError
from lib.settings import Settings
from tests.tiny import WORDS

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


def test_rows_of_archives_saved_datasets_and_arrays_are_one_dataset(tiny_base: Path, tmp_path: Path) -> None:
    table = pa.table({"text": [sentence(i) for i in range(90)], "label": [1 + i % 2 for i in range(90)]})
    parts = [table.slice(start, 30).combine_chunks() for start in (0, 30, 60)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("in/a.parquet", "w") as file:
        pq.write_table(parts[0], file)
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(tmp_path / "saved" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(parts[1])
    (tmp_path / "saved" / "state.json").write_text(
        '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'
    )
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (tmp_path / "c.json.xz").write_bytes(lzma.compress(json.dumps(parts[2].to_pylist()).encode()))
    places = [f"{tmp_path}/{name}" for name in ("a.zip", "saved", "c.json.xz")]
    planned = plan(settings(tiny_base, places))
    manifest = build(planned)
    assert [source["uri"] for source in manifest["sources"]] == [
        f"zip://in/a.parquet::{tmp_path}/a.zip",
        f"{tmp_path}/saved/data-00000-of-00001.arrow",
        f"{tmp_path}/c.json.xz",
    ]
    texts = pa.concat_tables(read(planned.ref.uri).values())["text"].to_pylist()
    assert sorted(texts) == sorted(table["text"].to_pylist())


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
    for module in (passes, stream):
        monkeypatch.setattr(module, "parallel_tasks", lambda: 1)
    monkeypatch.setattr(stream, "RAY_BLOCK_BYTES", 128 << 20)
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


def varied(number: int, variant: int = 0) -> str:
    """A text of 40 words, another one for each number; variants differ in a word each."""
    rng = random.Random(number)
    words = rng.choices(WORDS, k=40)
    if variant:
        words[variant * 7] = "xyz"[variant - 1] * 2
    return " ".join(words)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def near_rows() -> list[dict[str, Any]]:
    """30 texts in 1 to 4 variants each, one behind the other of another text; some of another label, rated."""
    return [
        {"text": varied(i, variant), "label": 1 + (variant == 3), "rated": str(variant)}
        for variant in range(4)
        for i in range(30)
        if variant <= i % 4
    ]


@pytest.mark.parametrize(
    ("keep", "variant"),
    [({"keep": "first"}, lambda i: 0), ({"keep": "best", "column": "rated"}, lambda i: i % 4)],
)
def test_of_near_duplicates_the_best_stays(
    tiny_base: Path, tmp_path: Path, keep: dict[str, str], variant: Callable[[int], int]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", near_rows())
    planned = plan(settings(tiny_base, source, near={"duplicates": "drop", **keep}))
    manifest = build(planned)
    dropped = manifest["dropped"]
    assert dropped["near_duplicate"] + dropped["near_conflicting"] == len(near_rows()) - 30
    assert dropped["near_conflicting"] == (7 if keep["keep"] == "first" else 21)
    assert manifest["leakage"] == {"mode": "check", "moved": 0, "leaking": 0}
    texts = pa.concat_tables(read(planned.ref.uri).values())["text"].to_pylist()
    assert sorted(texts) == sorted(varied(i, variant(i)) for i in range(30))


@pytest.mark.slow
def test_near_duplicates_lie_in_one_split_and_are_counted(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", near_rows())
    split = {"train": 0.4, "validation": 0.3, "test": 0.3}
    unchecked = plan(settings(tiny_base, source, split=split, leakage="off"))
    before = {text: name for name, t in read_after(unchecked).items() for text in t["text"].to_pylist()}
    checked = plan(settings(tiny_base, source, split=split))
    manifest = build(checked)
    after = {text: name for name, t in read(checked.ref.uri).items() for text in t["text"].to_pylist()}
    assert set(after) == set(before)
    for i in range(30):
        places = {after[varied(i, variant)] for variant in range(i % 4 + 1)}
        assert places == {before[varied(i)]}  # where the first of them goes, whatever the others are
    moved = sum(after[text] != before[text] for text in after)
    assert manifest["leakage"] == {"mode": "check", "moved": moved, "leaking": 0}
    assert moved > 10
    reported = plan(settings(tiny_base, source, split=split, leakage="report"))
    manifest = build(reported)
    assert manifest["leakage"] == {"mode": "report", "moved": moved, "leaking": 0}
    assert contents(reported.ref.uri) == contents(unchecked.ref.uri)
    # With other machines, smaller partitions, and clusters that no task could join alone.
    first = contents(checked.ref.uri)
    files.remove(checked.ref.uri)
    monkeypatch.setattr(shuffles, "PARTITION_BYTES", 2000)
    monkeypatch.setattr(near_passes.clusters, "LOCAL_LINKS", 0)
    for module in (passes, stream):
        monkeypatch.setattr(module, "parallel_tasks", lambda: 1)
    build(plan(settings(tiny_base, source, split=split)))
    assert contents(checked.ref.uri) == first


def read_after(planned: Plan) -> dict[str, pa.Table]:
    build(planned)
    return read(planned.ref.uri)


def test_training_rows_that_resemble_a_given_test_row_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": varied(i), "label": 1 + i % 2} for i in range(40)]
    test = [{"text": varied(i, 1), "label": 1} for i in range(10)] + [
        rows[10],
        {"text": varied(90), "label": 1},
    ]
    given = {"test_source": write_jsonl(tmp_path / "test.jsonl", test)}
    source = write_jsonl(tmp_path / "train.jsonl", rows)
    for extra in ({}, {"near": {"duplicates": "drop"}}):
        planned = plan(settings(tiny_base, source, **given, **extra))
        manifest = build(planned)
        assert manifest["dropped"]["leaking"] == 11
        assert manifest["leakage"]["leaking"] == 11
        assert manifest["splits"]["test"]["rows"] == 12
        tables = read(planned.ref.uri)
        assert sorted(tables["test"]["text"].to_pylist()) == sorted(row["text"] for row in test)
        kept = [text for split in ("train", "validation") for text in tables[split]["text"].to_pylist()]
        assert sorted(kept) == sorted(varied(i) for i in range(11, 40))
    # Where duplicates are kept, equals leak just as well.
    keeping = plan(settings(tiny_base, source, **given, duplicates="keep"))
    assert build(keeping)["leakage"]["leaking"] == 11
    reported = build(plan(settings(tiny_base, source, **given, duplicates="keep", leakage="report")))
    assert reported["leakage"] == {"mode": "report", "moved": 0, "leaking": 11}
    assert sum(count["rows"] for count in reported["splits"].values()) == 52


def test_many_equals_and_odd_texts_are_no_trouble(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": varied(1) + " " * (i % 3), "label": 1} for i in range(30_000)]
    rows += [
        {"text": varied(1, 1), "label": 1},
        {"text": "fits " * 200_000, "label": 2},
        {"text": "okay", "label": 2},
    ]
    rows += [{"text": "", "label": 1}] + [
        {"text": f"{word} {i}", "label": 1} for word in WORDS for i in range(5)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    manifest = build(plan(settings(tiny_base, source, rows_per_shard=20_000, near={"duplicates": "drop"})))
    assert manifest["dropped"]["duplicate"] == 29_999
    assert manifest["dropped"]["near_duplicate"] == 1
    keeping = plan(settings(tiny_base, source, rows_per_shard=20_000, duplicates="keep", split={"seed": 1}))
    manifest = build(keeping)
    assert sum(count["rows"] for count in manifest["splits"].values()) == len(rows) - 1
    homes = {name for name, t in read(keeping.ref.uri).items() if varied(1) in t["text"].to_pylist()}
    assert len(homes) == 1


def test_cleaning_mends_and_leaves_out_and_says_so(tiny_base: Path, tmp_path: Path) -> None:
    english = "The dress arrived on Tuesday and I have worn it every day since then, number"
    rows = [{"text": f"<p>{english} {i * 7919}</p>", "label": 1 + i % 2} for i in range(60)]
    rows[5:5] = [{"text": "Das Kleid kam am Dienstag an, und ich trage es jeden Tag", "label": 1}] * 2
    rows[9:9] = [{"text": "no", "label": 1}, {"text": "<br>", "label": 1}, {"text": "", "label": 1}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    wanted = {"html": True, "languages": ["en"], "length": {"words": {"least": 3}}, "samples": 1}
    # All of them are near duplicates, and so of one split.
    with pytest.raises(
        DataError, match=r"the validation split would be empty: \d+ of 60 rows went where their near"
    ):
        build(plan(settings(tiny_base, source, clean=wanted)))
    planned = plan(settings(tiny_base, source, clean=wanted, leakage="off"))
    manifest = build(planned)
    dropped = manifest["dropped"]
    assert {name: dropped[name] for name in ("empty", "emptied", "length", "languages", "duplicate")} == {
        "empty": 1, "emptied": 1, "length": 1, "languages": 2, "duplicate": 0,
    }  # fmt: skip
    assert manifest["cleaned"]["changed"] == {"html": 61}
    assert manifest["cleaned"]["rejected"]["languages"] == [
        {"row": f"{source} row 6", "measured": "de (1.00)", "text": rows[5]["text"]}
    ]
    assert set(manifest["cleaned"]["rejected"]) == {"emptied", "length", "languages"}
    texts = pa.concat_tables(read(planned.ref.uri).values())["text"].to_pylist()
    assert sorted(texts) == sorted(f"{english} {i * 7919}" for i in range(60))
    with pytest.raises(
        DataError,
        match=r"no usable row in .*: of 65, 1 have no text and 0 no label; 64 do not pass data\.clean",
    ):
        build(
            plan(settings(tiny_base, source, clean={"languages": ["ja"], "length": {"words": {"least": 3}}}))
        )


@pytest.mark.slow
def test_dialogues_are_cleaned_and_compared_by_what_opens_them(tiny_chat_base: Path, tmp_path: Path) -> None:
    def dialogue(question: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    questions = [
        f"How do I change the size {i * i} of my order {i * 31} before it is sent to me at home"
        for i in range(40)
    ]
    rows = [dialogue(question, f"<b>You do</b> {i}") for i, question in enumerate(questions)]
    rows += [dialogue(question.replace("at home", "at last"), "Another answer") for question in questions]
    rows += [dialogue("Hi", "<!-- nothing -->")]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    values = {
        "source": source,
        "split": {"train": 0.4, "validation": 0.3, "test": 0.3},
        "clean": {"html": True},
    }
    model = {"base": str(tiny_chat_base), "max_length": 128}
    planned = plan(Settings.model_validate({"name": "talk", "task": "chat", "data": values, "model": model}))
    manifest = build(planned)
    assert manifest["dropped"]["emptied"] == 1
    assert manifest["leakage"]["moved"] > 10
    opened = {
        messages[0]["content"]: name
        for name, table in read(planned.ref.uri).items()
        for messages in table["messages"].to_pylist()
    }
    assert len(opened) == 80
    assert all(opened[question] == opened[question.replace("at home", "at last")] for question in questions)
    answers = {m[1]["content"] for t in read(planned.ref.uri).values() for m in t["messages"].to_pylist()}
    assert answers == {*(f"You do {i}" for i in range(40)), "Another answer"}


def test_what_is_no_number_in_the_column_of_the_best_is_told(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": varied(i), "label": 1, "rated": "3" if i != 7 else "good"} for i in range(20)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    near = {"duplicates": "drop", "keep": "best", "column": "rated"}
    with pytest.raises(
        DataError, match=r"row 8 holds 'good' in the column of data\.near\.column, which is no number"
    ):
        build(plan(settings(tiny_base, source, near=near)))
    with pytest.raises(DataError, match=r"no column 'rating' \(data\.near\.column\)"):
        plan(settings(tiny_base, source, near={**near, "column": "rating"}))


def test_limit_and_seed_and_shares(tiny_base: Path, source: Path) -> None:
    split = {"train": 0.5, "validation": 0.5, "test": 0, "seed": 3}
    planned = plan(settings(tiny_base, str(source), limit=120, split=split))
    manifest = build(planned)
    assert manifest["rows_read"] == 120
    assert manifest["splits"]["test"] == {
        "rows": 0, "tokens": 0, "truncated": 0, "labels": {"bad": 0, "good": 0}, "shards": [], "lengths": {}
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
