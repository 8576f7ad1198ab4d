"""Datasets that are made on Ray hold no personal data, say what was replaced, and depend on how it was."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.artifacts import SPLITS
from lib.data.build import build
from lib.data.plan import plan
from lib.data.redact import names
from lib.errors import ConfigError
from lib.settings import Settings
from lib.tasks import load_task
from tests.tiny import WORDS

ADDRESSES = re.compile(r"[\w.]+@example\.com|4111 1111 1111 1111")


def settings(base: Path, source: Path, **data: Any) -> Settings:
    section = {"source": str(source), "labels": {1: "bad", 2: "good"}, "rows_per_shard": 40}
    section |= {"leakage": "off", **data}  # the rows are alike but for a word
    values = {"name": "test", "task": "sentiment", "data": section}
    return Settings.model_validate({**values, "model": {"base": str(base), "max_length": 12}})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """100 rows with an address each, of which the last 20 are like others but for the address; each with its writer."""
    rows = []
    for i in range(100):
        said = f"{WORDS[i % 80 % 20]} {WORDS[i % 80 // 20]} fits"
        text = f"{said} write u{i}@example.com, u{i}@example.com or 4111 1111 1111 1111"
        rows.append({"text": text, "label": 1 + i % 80 % 2, "writer": f"u{i % 3}@example.com"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(uri: str) -> pa.Table:
    folder = Path(uri.removeprefix("file://"))
    return pa.concat_tables(pq.read_table(p) for split in SPLITS for p in sorted((folder / split).glob("*")))


@pytest.mark.usefixtures("storage")
def test_how_personal_data_is_treated_is_part_of_the_fingerprint(
    tiny_base: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = {plan(settings(tiny_base, source)).ref.fingerprint}
    for redact in (False, {"kinds": ["EMAIL"]}, {"regions": ["US"]}):
        prints.add(plan(settings(tiny_base, source, redact=redact)).ref.fingerprint)
    for key in ("a key of sixteen bytes or more", "another key of sixteen bytes"):
        monkeypatch.setenv("A_KEY", key)
        prints.add(plan(settings(tiny_base, source, redact={"key_env": "A_KEY"})).ref.fingerprint)
    assert len(prints) == 6
    monkeypatch.delenv("A_KEY")
    with pytest.raises(ConfigError, match="the environment has no A_KEY"):
        plan(settings(tiny_base, source, redact={"key_env": "A_KEY"}))


def test_each_task_says_which_columns_people_wrote() -> None:
    assert {name: sorted(load_task(name).TEXTS) for name in ("sentiment", "tagging", "recommend")} == {
        "sentiment": ["text"],
        "tagging": ["tokens"],
        "recommend": [],
    }
    assert {"messages", "conversations", "question", "answer", "system", "output"} <= load_task("chat").TEXTS
    assert {"prompt", "chosen", "rejected", "system"} == load_task("preference").TEXTS


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_nothing_personal_is_written(tiny_base: Path, source: Path) -> None:
    planned = plan(settings(tiny_base, source, slices={"writer": "writer"}))
    manifest = build(planned)
    table = read(planned.ref.uri)
    assert not any(ADDRESSES.search(str(value)) for column in table.columns for value in column.to_pylist())
    assert all(text.endswith("write <EMAIL_1>, <EMAIL_1> or <CARD_1>") for text in table["text"].to_pylist())
    # Its own writer in 3 rows, another person in the others; counted before duplicates are dropped.
    assert manifest["redacted"] == {"CARD": 100, "EMAIL": 197, "rows": 100}
    assert manifest == planned.ref.manifest()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_ids_and_duplicates_are_those_of_what_is_written(tiny_base: Path, source: Path) -> None:
    planned = plan(settings(tiny_base, source))
    manifest = build(planned)
    table = read(planned.ref.uri)
    assert manifest["dropped"]["duplicate"] == 20
    for text, name in zip(table["text"].to_pylist(), table["id"].to_pylist(), strict=True):
        assert name == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_it_can_be_switched_off(tiny_base: Path, source: Path) -> None:
    planned = plan(settings(tiny_base, source, redact=False))
    manifest = build(planned)
    assert "redacted" not in manifest
    assert all(ADDRESSES.search(text) for text in read(planned.ref.uri)["text"].to_pylist())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_pseudonyms_go_through_all_rows(
    tiny_base: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "a key of sixteen bytes or more")
    planned = plan(settings(tiny_base, source, redact={"key_env": "A_KEY"}, slices={"writer": "writer"}))
    manifest = build(planned)
    table = read(planned.ref.uri)
    writers = set(table["writer"].to_pylist())
    assert len(writers) == 3
    assert all(re.fullmatch(r"<EMAIL_[0-9a-f]{12}>", writer) for writer in writers)
    assert len({re.findall("<CARD_.*?>", text)[0] for text in table["text"].to_pylist()}) == 1
    assert "sixteen" not in json.dumps(manifest)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_sentences_of_words_keep_their_tags(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    rows = [
        {"tokens": ["fits", WORDS[i], "+44", "20", "7946", f"09{i:02d}"], "tags": ["O", "O", *["B-TEL"], *["I-TEL"] * 3]}
        for i in range(20)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"name": "test", "task": "tagging", "data": {"source": str(path), "labels": ["TEL"]}}
    planned = plan(Settings.model_validate({**values, "model": {"base": str(tiny_base), "max_length": 40}}))
    manifest = build(planned)
    assert manifest["redacted"] == {"PHONE": 20, "rows": 20}
    for row in read(planned.ref.uri).to_pylist():
        assert row["tokens"][2:] == ["<PHONE_1>"] * 4
        assert len(row["tokens"]) == len(row["tags"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_texts_of_items_are_redacted_and_ids_are_not(tiny_base: Path, tmp_path: Path) -> None:
    items = ["id,title", *(f"i{i},{WORDS[i]} from seller{i}@example.com" for i in range(8))]
    (tmp_path / "items.csv").write_text("\n".join(items))
    done = [
        f"u{u}@example.com,i{(u + s) % 8},{1_700_000_000 + u * 100 + s}" for u in range(20) for s in range(5)
    ]
    (tmp_path / "done.csv").write_text("\n".join(["user,item,time", *done]))
    section = {
        "source": str(tmp_path / "done.csv"),
        "items": {"source": str(tmp_path / "items.csv"), "id": "id", "text": ["title"]},
    }
    values = {"name": "shop", "task": "recommend", "data": section, "model": {"base": str(tiny_base)}}
    planned = plan(Settings.model_validate(values))
    manifest = build(planned)
    assert manifest["redacted"] == {"EMAIL": 8, "rows": 8}
    folder = Path(planned.ref.uri.removeprefix("file://"))
    catalogue = pa.concat_tables(pq.read_table(path) for path in (folder / "items").glob("*.parquet"))
    assert all(text.endswith("from <EMAIL_1>") for text in catalogue["text"].to_pylist())
    users = pq.read_table(folder / "train")["user"].to_pylist()
    assert all(user.endswith("@example.com") for user in users)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_names_by_a_model_directory(tiny_base: Path, source: Path, tmp_path: Path) -> None:
    """One that says the same of every word: that it is asked, once, and that what it says is written."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from lib.artifacts import TaskFile

    folder = tmp_path / "tagger"
    model = AutoModelForTokenClassification.from_pretrained(tiny_base, num_labels=3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    TaskFile("tagging", ["O", "B-PER", "I-PER"], 64, str(tiny_base), "test/none").write(folder)
    section = {"kinds": ["EMAIL"], "names": {"model": str(folder), "labels": {"PER": "PERSON"}}}
    whole = {"train": 1, "validation": 0, "test": 0}  # all of them say the same then
    planned = plan(settings(tiny_base, source, redact=section, duplicates="keep", split=whole))
    manifest = build(planned)
    assert manifest["redacted"]["rows"] == 100
    assert manifest["redacted"]["PERSON"] >= 100
    assert all(text.startswith("<PERSON_1>") for text in read(planned.ref.uri)["text"].to_pylist())
    wrong = section | {"names": {"model": str(folder), "labels": {"PERS": "PERSON"}}}
    with pytest.raises(ConfigError, match="has no label 'PERS'; did you mean 'PER'"):
        plan(settings(tiny_base, source, redact=wrong))
    names._model.cache_clear()
