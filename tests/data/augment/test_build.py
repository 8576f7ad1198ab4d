"""Augmented datasets as they are made on Ray: new rows train, none tells what is held out, and training reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.preprocess import report
from lib import storage as files
from lib.data import passes
from lib.data.build import build
from lib.data.plan import plan
from lib.errors import ConfigError
from lib.settings import Settings
from lib.tasks import load_task
from lib.training import batches
from tests.data.splitting.test_split_build import in_files
from tests.data.test_build import contents, read, sentence, settings, varied, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "storage")]


def reviews(count: int, good: int = 5) -> list[dict[str, Any]]:
    """Every so many of them good."""
    return [{"text": varied(i), "label": 2 if i % good == 0 else 1, "kind": str(i % 3)} for i in range(count)]


def made(uri: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows that were there, and those that were made of them, by id."""
    rows = sorted(read(uri)["train"].to_pylist(), key=lambda row: str(row["id"]))
    return [r for r in rows if not r["augmented_by"]], [r for r in rows if r["augmented_by"]]


def test_new_rows_train_and_say_where_they_come_from(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", reviews(200))
    plain = plan(settings(tiny_base, source, slices={"kind": "kind"}))
    build(plain)
    given = {"swap": {"n_aug": 2}, "delete": True, "spelling": {"alpha": 0.3}}
    planned = plan(settings(tiny_base, source, slices={"kind": "kind"}, augment=given))
    assert planned.ref != plain.ref
    manifest = build(planned)
    before, after = read(plain.ref.uri), read(planned.ref.uri)
    for split in ("validation", "test"):
        assert after[split].equals(before[split])
    old, new = made(planned.ref.uri)
    extra = ("augmented_from", "augmented_by")
    assert [{k: v for k, v in row.items() if k not in extra} for row in old] == sorted(
        before["train"].to_pylist(), key=lambda row: str(row["id"])
    )
    assert Counter(row["augmented_by"] for row in new) == {
        "swap": 2 * len(old),
        "delete": len(old),
        "spelling": len(old),
    }
    assert manifest["augmented"] == {
        "swap": 2 * len(old),
        "delete": len(old),
        "spelling": len(old),
        "known": 0,
    }
    sources = {row["id"]: row for row in old}
    for row in new:
        source_row = sources[row["augmented_from"]]
        assert row["text"] != source_row["text"]
        assert [row[k] for k in ("label", "kind")] == [source_row[k] for k in ("label", "kind")]
        assert row["length"] == len(row["input_ids"])
    assert len({row["id"] for row in [*old, *new]}) == len(old) + len(new)
    count = manifest["splits"]["train"]
    assert count["rows"] == 5 * len(old)
    assert count["labels"]["good"] == 5 * before["train"]["label"].to_pylist().count(1)
    # A window of training is a sample of old and new ones.
    first = read(planned.ref.uri)["train"].slice(0, 60)["augmented_by"].to_pylist()
    assert 2 < sum(by is None for by in first) < 30

    report(planned, manifest)
    assert f"augmented    {len(old):,} by delete, {len(old):,} by spelling, {2 * len(old):,} by swap\n" in (
        capsys.readouterr().out
    )


def test_training_reads_no_column_more(tiny_base: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", reviews(60))
    planned = plan(settings(tiny_base, source, augment={"swap": True}))
    build(planned)
    shards = planned.ref.shards("train")
    assert batches.columns(shards[0]) == ["label", "input_ids", "length", "truncated"]
    window = pa.concat_tables(list(batches.read(shards, 40)))
    batch = load_task("sentiment").collate(window, 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_neither_order_nor_machines_change_new_rows(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, given = reviews(200), {"swap": True, "spelling": True, "balance": {}}
    found = []
    for name, count, size in (("a", 1, 60), ("b", 3, 17)):
        source = in_files(tmp_path / name, rows, count, count)
        planned = plan(settings(tiny_base, source, augment=given, rows_per_shard=size))
        build(planned)
        found.append(made(planned.ref.uri))
    assert found[0] == found[1]
    first = contents(planned.ref.uri)
    files.remove(planned.ref.uri)
    monkeypatch.setattr(passes, "parallel_tasks", lambda: 1)
    build(plan(settings(tiny_base, source, augment=given, rows_per_shard=17)))
    assert contents(planned.ref.uri) == first
    other = plan(settings(tiny_base, source, augment=given, split={"seed": 1}))
    build(other)
    texts = {row["text"] for row in found[0][1]}
    assert not texts & {row["text"] for row in made(other.ref.uri)[1]}


def test_nothing_that_is_held_out_is_made(tiny_base: Path, tmp_path: Path) -> None:
    # Of three words in each order: what a swap makes of one text is another text of the source.
    words = [sentence(i).split()[1:] for i in range(20**3)]
    rows = [{"text": " ".join(w), "label": 1} for w in words if len(set(w)) == 3][:1500]
    given = {"swap": {"n_aug": 3, "alpha": 0.1}}
    for extra in (
        {},
        {"split": {"stratified": True}},
        {"test_source": write_jsonl(tmp_path / "t", rows[:99])},
    ):
        if "test_source" in extra:
            source = write_jsonl(tmp_path / "b.jsonl", rows[99:])
            extra["format"] = "jsonl"
        else:
            source = write_jsonl(tmp_path / "a.jsonl", rows)
        planned = plan(settings(tiny_base, source, leakage="off", augment=given, **extra))
        manifest = build(planned)
        held_out = {
            row["text"] for s in ("validation", "test") for row in read(planned.ref.uri)[s].to_pylist()
        }
        _, new = made(planned.ref.uri)
        assert not {row["text"] for row in new} & held_out
        assert not {row["text"] for row in new} & {row["text"] for row in rows}
        assert manifest["augmented"]["known"] > 50


def test_labels_are_filled_up_after_undersampling(tiny_base: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", reviews(500))
    given = {"undersample": {"bad": 0.5}, "augment": {"swap": True, "delete": True, "balance": {"to": 0.8}}}
    planned = plan(settings(tiny_base, source, **given))
    manifest = build(planned)
    old, new = made(planned.ref.uri)
    bad, good = (sum(row["label"] == label for row in old) for label in (0, 1))
    assert bad + manifest["dropped"]["undersampled"] > 1.5 * bad
    assert {row["label"] for row in new} == {1}
    assert good + len(new) == pytest.approx(0.8 * bad, abs=15)
    assert manifest["splits"]["train"]["labels"] == {"bad": bad, "good": good + len(new)}


def test_labels_are_filled_up_with_what_weights_repeat(tiny_base: Path, tmp_path: Path) -> None:
    rows = reviews(2000)
    parts = [
        write_jsonl(tmp_path / f"{label}.jsonl", [r for r in rows if r["label"] == label]) for label in (1, 2)
    ]
    source = [{"uri": parts[0], "weight": 0.5}, {"uri": parts[1], "weight": 1.5}]
    given = {"swap": True, "delete": True, "balance": {"to": "largest"}}
    manifest = build(plan(settings(tiny_base, source, augment=given)))
    labels = manifest["splits"]["train"]["labels"]
    assert labels["good"] == pytest.approx(labels["bad"], abs=60)
    assert 560 < labels["bad"] < 720  # half of four fifths of 1,600; of the others there are 480


def test_synonyms_come_from_a_file_or_the_base(tiny_base: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", reviews(100))
    words = tmp_path / "words.txt"
    words.write_text("dress: gown, frock\nshirt: blouse\n")
    given = {"synonyms": {"alpha": 0.5}, "thesaurus": str(words)}
    planned = plan(settings(tiny_base, source, augment=given))
    build(planned)
    old, new = made(planned.ref.uri)
    assert len(new) == len(old)
    for row in new:
        back = row["text"].replace("gown", "dress").replace("frock", "dress").replace("blouse", "shirt")
        assert back == next(o["text"] for o in old if o["id"] == row["augmented_from"])
    words.write_text("dress: gown\nshirt: blouse\n")
    assert plan(settings(tiny_base, source, augment=given)).ref != planned.ref
    moved = tmp_path / "moved.txt"
    moved.write_text("dress: gown, frock\nshirt: blouse\n")
    again = plan(settings(tiny_base, source, augment={**given, "thesaurus": str(moved)}))
    assert again.ref == planned.ref  # what it holds counts, not where it lies
    near = plan(settings(tiny_base, source, augment={"insert": True, "least_similarity": 0.0}))
    assert build(near)["augmented"]["insert"] > 50


def test_dialogues_and_sentences(tiny_base: Path, tiny_chat_base: Path, tmp_path: Path) -> None:
    talk = [{"question": varied(i), "answer": varied(1000 + i)} for i in range(80)]
    values = {
        "name": "talk",
        "task": "chat",
        "data": {"source": write_jsonl(tmp_path / "c.jsonl", talk), "augment": {"swap": True}},
        "model": {"base": str(tiny_chat_base), "max_length": 256},
    }
    planned = plan(Settings.model_validate(values))
    build(planned)
    old, new = made(planned.ref.uri)
    answers = {row["id"]: row["messages"][1] for row in old}
    assert len(new) == len(old) > 40
    assert all(row["messages"][1] == answers[row["augmented_from"]] for row in new)
    rows = [
        {"tokens": [*varied(i).split()[:6], "Ada", "Lovelace"], "tags": ["O"] * 6 + ["B-PER", "I-PER"]}
        for i in range(80)
    ]
    values = {
        "name": "tags",
        "task": "tagging",
        "data": {
            "source": write_jsonl(tmp_path / "t.jsonl", rows),
            "labels": ["PER"],
            "augment": {"delete": {"alpha": 0.4}, "spelling": True},
            "leakage": "off",
        },
        "model": {"base": str(tiny_base), "max_length": 32},
    }
    planned = plan(Settings.model_validate(values))
    manifest = build(planned)
    _, new = made(planned.ref.uri)
    assert len(new) > 100
    classes = manifest["labels"]
    for row in new:
        tags = [classes[tag] for tag in row["tags"]]
        assert len(tags) == len(row["tokens"])
        assert "I-PER" not in tags or "B-PER" in tags
    swapped = Settings.model_validate(values | {"data": values["data"] | {"augment": {"swap": True}}})
    with pytest.raises(ConfigError, match=r"data.augment.swap: a row of tagging would not keep its labels"):
        plan(swapped)


def test_several_heads_keep_all_their_labels(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": varied(i), "mood": "ab"[i % 2], "topic": ["x", "y", None][i % 3]} for i in range(80)]
    heads = {
        "mood": {"column": "mood", "labels": ["a", "b"]},
        "topic": {"column": "topic", "labels": ["x", "y"]},
    }
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    planned = plan(settings(tiny_base, source, labels=None, heads=heads, augment={"swap": True}))
    build(planned)
    old, new = made(planned.ref.uri)
    labels = {row["id"]: (row["label"], row["label:topic"]) for row in old}
    assert len(new) == len(old) == len(labels)
    assert all((row["label"], row["label:topic"]) == labels[row["augmented_from"]] for row in new)
