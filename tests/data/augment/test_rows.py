"""New rows of a block: what they hold, where they come from, and that nothing but a row itself decides them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.data.alike.dedup import hash_texts, row_ids
from lib.data.augment import check, counting
from lib.data.augment.rows import BY, FORMS, FROM, Augmentation, augment, form_of
from lib.data.augment.thesaurus import Thesaurus
from lib.errors import ConfigError
from lib.settings import AugmentSettings, DataSettings
from lib.tasks import load_task
from tests.data.test_build import varied

THESAURUS = Thesaurus(
    {"dress": ["gown"], "fits": ["suits"], "soft": ["smooth"], "good": ["fine", "nice"], "shirt": ["top"]}
)


def by(seed: int = 0, wanted: tuple[float, ...] | None = None, **values: Any) -> Augmentation:
    return Augmentation(AugmentSettings.model_validate(values), seed, THESAURUS, wanted)


def nothing_known(hashes: np.ndarray) -> np.ndarray:
    return np.zeros(len(hashes), bool)


def reviews(count: int) -> tuple[pa.Table, np.ndarray]:
    texts = pa.array([varied(i) for i in range(count)])
    labels = np.arange(count, dtype=np.int32) % 3
    columns = {"id": row_ids(hash_texts(texts)[0]), "text": texts, "label": pa.array(labels)}
    return pa.table(columns | {"kind": pa.array([str(i) for i in range(count)])}), labels


ALL = {"synonyms": {"n_aug": 2}, "swap": True, "delete": {"alpha": 0.2}, "insert": True, "spelling": True}


def test_each_method_makes_its_rows_of_every_row() -> None:
    rows, labels = reviews(50)
    new = augment(rows, labels, by(**ALL), nothing_known)
    table = new.rows
    synonyms = new.counts.pop("synonyms")
    assert synonyms + new.counts.pop("unchanged") == 100  # of few words with a synonym there is no second way
    assert synonyms > 90
    assert new.counts == {"swap": 50, "delete": 50, "insert": 50, "spelling": 50, "known": 0}
    assert table.column_names == [*rows.column_names, FROM, BY]
    assert len(set(table["id"].to_pylist()) | set(rows["id"].to_pylist())) == 250 + synonyms
    sources = {row["id"]: row for row in rows.to_pylist()}
    for place, row in enumerate(table.to_pylist()):
        source = sources[row[FROM]]
        assert rows["id"][int(new.sources[place])].as_py() == row[FROM]
        assert row["text"] != source["text"]
        assert (row["label"], row["kind"]) == (source["label"], source["kind"])
        assert row["id"].startswith(f"{row[FROM]}~{row[BY]}")
        said, words = row["text"].split(), source["text"].split()
        assert len(said) == len(words) or row[BY] in ("delete", "insert")


def test_neither_order_nor_other_rows_decide() -> None:
    rows, labels = reviews(40)
    whole = augment(rows, labels, by(**ALL), nothing_known).rows.to_pylist()
    order = np.random.default_rng(0).permutation(40)
    parts = [
        augment(rows.take(pa.array(part)), labels[part], by(**ALL), nothing_known).rows.to_pylist()
        for part in (order[:7], order[7:])
    ]
    assert sorted([*parts[0], *parts[1]], key=lambda r: r["id"]) == sorted(whole, key=lambda r: r["id"])
    other = augment(rows, labels, by(seed=1, **ALL), nothing_known).rows.to_pylist()
    assert sum(a["text"] == b["text"] for a, b in zip(whole, other, strict=True)) < 60


def test_what_the_source_says_is_not_new() -> None:
    rows, labels = reviews(30)
    first = augment(rows, labels, by(swap=True), nothing_known).rows["text"].to_pylist()
    held_out = hash_texts(pa.array(first[:10]))[1]
    new = augment(rows, labels, by(swap=True), lambda hashes: np.isin(hashes, held_out))
    assert new.rows["text"].to_pylist() == first[10:]
    assert new.counts == {"swap": 20, "known": 10}
    # Nothing can be swapped in a text of one word.
    one = pa.table({"id": ["a"], "text": ["fits"], "label": pa.array([0], pa.int32())})
    assert augment(one, np.zeros(1, np.int32), by(swap=True), nothing_known).counts == {
        "unchanged": 1,
        "known": 0,
    }


def test_labels_are_filled_up_by_methods_in_turn() -> None:
    rows, labels = reviews(3000)
    wanted = counting.of_counts(np.array([3000, 1000, 400]), "largest")
    assert wanted == (0.0, 2.0, 6.5)
    settings = {"swap": {"n_aug": 2}, "spelling": True, "balance": {"to": "largest"}}
    new = augment(rows, labels, by(wanted=wanted, **settings), nothing_known)
    made = np.bincount(labels[new.sources], minlength=3)
    assert made[0] == 0
    assert made[1] == 2000
    assert made[2] == pytest.approx(6500, abs=60)
    assert new.counts["swap"] / new.counts["spelling"] == pytest.approx(2, rel=0.1)
    assert "copy" not in set(new.rows[BY].to_pylist())


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("largest", (0, 9.0, 0)),
        (50, (0, 4.0, 0)),
        (0.5, (0, 4.0, 0)),
        (1.0, (0, 9.0, 0)),
        (1, (0, 0, 0)),
    ],
)
def test_what_labels_lack(to: Any, expected: tuple[float, ...]) -> None:
    given = AugmentSettings.model_validate({"swap": True, "balance": {"to": to}}).balance
    assert given is not None
    assert counting.of_counts(np.array([100, 10, 0]), given.to) == expected


def test_copies_fill_up_only_where_they_are_asked_for() -> None:
    rows = pa.table({"id": ["a", "b"], "text": ["fits", "<EMAIL_1>"], "label": pa.array([0, 1], pa.int32())})
    labels = np.array([0, 1], np.int32)
    for copies, expected in ((False, {"unchanged": 3, "known": 0}), (True, {"copy": 3, "known": 0})):
        given = by(wanted=(1.0, 2.0), swap=True, balance={"copies": copies})
        assert augment(rows, labels, given, nothing_known).counts == expected
    alone = augment(rows, labels, by(wanted=(0.0, 3.0), balance={"copies": True}), nothing_known)
    assert alone.rows["id"].to_pylist() == ["b~copy0", "b~copy1", "b~copy2"]
    # Where one method finds nothing, another has its turn.
    both = augment(
        rows, labels, by(wanted=(1.0, 0.0), swap={"n_aug": 9}, spelling=True, balance={}), nothing_known
    )
    assert both.counts == {"spelling": 1, "known": 0}


def test_of_dialogues_only_what_the_user_says_changes() -> None:
    turns = [
        {"role": "system", "content": "be good and soft"},
        {"role": "user", "content": "is the dress soft?\n\n  and good"},
        {"role": "assistant", "content": "the dress fits and is soft"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "good"},
    ]
    task = load_task("chat")
    source = {"messages": pa.array([json.dumps(turns)])}
    prepared = task.prepare(source, DataSettings.model_validate({"source": "a"}))
    rows = prepared.rows.add_column(0, "id", pa.array(["x"]))
    new = augment(rows, prepared.labels, by(**ALL), nothing_known).rows.to_pylist()
    assert {row[BY] for row in new} == {"synonyms", "swap", "delete", "insert", "spelling"}
    for row in new:
        said = row["messages"]
        assert [t["role"] for t in said] == [t["role"] for t in turns]
        assert [t for t in said if t["role"] != "user"] == [t for t in turns if t["role"] != "user"]
        assert said != turns
    assert any("\n\n" in row["messages"][1]["content"] for row in new)


def test_of_sentences_tags_stay_with_their_words() -> None:
    rows = pa.table(
        {
            "id": ["x"],
            "tokens": pa.array([["soft", "Ada", "Lovelace", "fits", "good", "Paris"]]),
            "tags": pa.array([[0, 1, 2, 0, 0, 3]], pa.list_(pa.int32())),
        }
    )
    given = by(synonyms={"n_aug": 3, "alpha": 1}, delete={"n_aug": 5, "alpha": 0.5}, spelling={"n_aug": 5})
    for row in augment(rows, np.zeros(1, np.int32), given, nothing_known).rows.to_pylist():
        assert len(row["tokens"]) == len(row["tags"])
        if row[BY] == "synonyms":
            assert row["tags"] == [0, 1, 2, 0, 0, 3]
            assert [row["tokens"][i] for i in (1, 2, 5)] == ["Ada", "Lovelace", "Paris"]
        if row[BY] == "delete":
            tags = dict(zip(row["tokens"], row["tags"], strict=True))
            assert tags.get("Lovelace", 2) == (2 if "Ada" in tags else 1) or "Lovelace" not in tags
            assert tags.get("Paris", 3) == 3


def test_what_decides_a_split_is_what_the_task_says() -> None:
    data = DataSettings.model_validate({"source": "a", "labels": ["x"]})
    turns = [{"role": "user", "content": "Is  it Soft? "}, {"role": "assistant", "content": "yes"}]
    sources = {
        "sentiment": {"text": pa.array([" Soft  dress "]), "label": pa.array(["x"])},
        "chat": {"messages": pa.array([json.dumps(turns)])},
        "tagging": {"tokens": pa.array(['["A", "b"]']), "tags": pa.array(['["O", "B-x"]'])},
    }
    for name, source in sources.items():
        prepared = load_task(name).prepare(source, data)
        (value,) = prepared.rows.select(form_of(prepared.rows.column_names).columns).to_pylist()
        decides = prepared.texts if prepared.groups is None else prepared.groups
        assert form_of(prepared.rows.column_names).key(value) == decides[0].as_py()
    assert len({type(form) for form in FORMS}) == len(sources)


@pytest.mark.parametrize(
    ("task", "labels", "given", "says"),
    [
        ("tagging", ["PER"], {"swap": True}, "data.augment.swap: a row of tagging would not keep its labels"),
        (
            "tagging",
            ["PER"],
            {"delete": True, "balance": {}},
            "data.augment.balance: a row of tagging has no label",
        ),
        ("chat", None, {"swap": True, "balance": {}}, "data.augment.balance: a row of chat has no label"),
        ("preference", None, {"swap": True}, "data.augment: no method suits the rows of preference"),
        ("recommend", None, {"swap": True}, "data.augment: no method suits the rows of recommend"),
    ],
)
def test_what_would_not_keep_its_labels_is_refused(
    task: str, labels: list[str] | None, given: dict[str, Any], says: str
) -> None:
    data = DataSettings.model_validate({"source": "a", "labels": labels, "augment": given})
    with pytest.raises(ConfigError) as caught:
        check(data, load_task(task), task)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
