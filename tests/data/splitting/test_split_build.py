"""Splits by group, by time and label by label, as datasets have them: what each promises, on Ray."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lib.artifacts import SPLITS
from lib.data.alike.dedup import hash_texts
from lib.data.build import build
from lib.data.plan import plan
from lib.data.splitting.split import assign
from lib.errors import DataError
from lib.settings import Settings
from tests.data.test_build import read, settings, varied, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "storage")]
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that resemble no other, of 30 users, who write at any time."""
    rng = random.Random(seed)
    days = [rng.randrange(200) for _ in range(count)]
    return [
        {
            "text": varied(i),
            "label": 1 + (i % 5 == 0),
            "user": None if i % 17 == 0 else f"user {i % 30}",
            "when": f"2024-{1 + days[i] // 28:02}-{1 + days[i] % 28:02}T{i % 24:02}:00:00",
        }
        for i in range(count)
    ]


def in_files(folder: Path, rows: list[dict[str, Any]], files: int, seed: int) -> str:
    """The same rows in another order, and in several files."""
    folder.mkdir()
    rows = random.Random(seed).sample(rows, len(rows))
    for number in range(files):
        write_jsonl(folder / f"{number}.jsonl", rows[number::files])
    return str(folder)


def homes(uri: str) -> dict[str, str]:
    """Text → its split."""
    return {text: name for name, t in read(uri).items() for text in t["text"].to_pylist()}


def built(base: Path, source: str, **data: Any) -> tuple[dict[str, str], dict[str, Any]]:
    planned = plan(settings(base, source, **data))
    manifest = build(planned)
    return homes(planned.ref.uri), manifest


def test_rows_of_a_group_fall_into_one_split(tiny_base: Path, tmp_path: Path) -> None:
    rows = reviews(300)
    found, manifest = built(
        tiny_base, in_files(tmp_path / "a", rows, 2, 1), split={"group": "user", **SHARES}, rows_per_shard=25
    )
    assert manifest["split"] == {"by": "group", "column": "user"}
    assert len(found) == 300
    of_users = defaultdict(set)
    for row in rows:
        of_users[row["user"]].add(found[row["text"]])
    alone = of_users.pop(None)  # a row without a user goes by its text
    assert {len(places) for places in of_users.values()} == {1}
    assert {split for places in of_users.values() for split in places} == set(SPLITS) == alone
    again, _ = built(
        tiny_base, in_files(tmp_path / "b", rows, 5, 2), split={"group": "user", **SHARES}, rows_per_shard=70
    )
    assert again == found


def test_near_duplicates_bring_their_groups_together(tiny_base: Path, tmp_path: Path) -> None:
    rows, group = reviews(300), {"group": "user", **SHARES}
    data = settings(tiny_base, "a.jsonl", split=group).data
    users = [f"user {i}" for i in range(30)]
    places = dict(zip(users, assign(hash_texts(pa.array(users))[1], data).tolist(), strict=True))
    other = next(i for i in range(4, 17) if places[f"user {i}"] != places["user 3"])
    # A sentence of user 3 that another one repeats nearly: whatever both have written belongs together.
    rows += [{**rows[3], "text": varied(3, 1), "user": f"user {other}"}]
    apart, _ = built(tiny_base, write_jsonl(tmp_path / "a.jsonl", rows), split=group, leakage="off")
    assert apart[varied(3)] != apart[varied(other)] == apart[varied(3, 1)]
    found, manifest = built(tiny_base, write_jsonl(tmp_path / "a.jsonl", rows), split=group)
    of_users = defaultdict(set)
    for row in rows:
        if row["user"]:
            of_users[row["user"]].add(found[row["text"]])
    assert {len(places) for places in of_users.values()} == {1}
    assert of_users["user 3"] == of_users[f"user {other}"] == {apart[varied(3)]}  # where the first row goes
    assert manifest["leakage"]["moved"] == sum(found[text] != apart[text] for text in found) > 5
    # Where but one of these sentences stays, nothing joins their writers.
    near = {"duplicates": "drop"}
    dropped, manifest = built(
        tiny_base, write_jsonl(tmp_path / "a.jsonl", rows), split=group, near=near, rows_per_shard=50
    )
    assert manifest["leakage"]["moved"] == 0
    assert dropped == {text: place for text, place in apart.items() if text != varied(3, 1)}


@pytest.mark.parametrize("near", ["keep", "drop"])
def test_whoever_writes_in_the_given_test_split_is_in_no_other(
    tiny_base: Path, tmp_path: Path, near: str
) -> None:
    rows = reviews(300)
    test = [{**row, "text": varied(1000 + i)} for i, row in enumerate(rows[1:4])]
    found, manifest = built(
        tiny_base,
        write_jsonl(tmp_path / "a.jsonl", rows),
        test_source=write_jsonl(tmp_path / "test.jsonl", test),
        split={"group": "user"},
        near={"duplicates": near},
    )
    tested = {row["user"] for row in test}
    assert manifest["leakage"]["leaking"] == sum(row["user"] in tested for row in rows) > 20
    assert {row["text"] for row in rows if row["user"] not in tested} == {
        text for text, split in found.items() if split != "test"
    }
    assert {text for text, split in found.items() if split == "test"} == {row["text"] for row in test}


def test_by_time_no_row_trains_that_is_later_than_one_that_tests(tiny_base: Path, tmp_path: Path) -> None:
    rows = reviews(400)
    rows += [{"text": varied(5), "label": 1, "when": "2024-12-31"}]  # twice: the first stays, with its time
    source = in_files(tmp_path / "a", rows[:-1], 3, 1)
    write_jsonl(tmp_path / "a" / "z.jsonl", rows[-1:])
    found, manifest = built(tiny_base, source, split={"time": "when", **SHARES}, rows_per_shard=30)
    times = {split: [r["when"] for r in rows[:-1] if found[r["text"]] == split] for split in SPLITS}
    assert max(times["train"]) < min(times["validation"]) <= max(times["validation"]) < min(times["test"])
    assert len(times["train"]) == pytest.approx(240, abs=3)
    assert len(times["test"]) == pytest.approx(80, abs=3)
    assert manifest["split"] == {
        "by": "time",
        "column": "when",
        "validation_from": f"{min(times['validation'])}+00:00",
        "test_from": f"{min(times['test'])}+00:00",
    }
    again, _ = built(tiny_base, in_files(tmp_path / "b", rows[:-1], 1, 2), split={"time": "when", **SHARES})
    assert again == found
    dated = {"time": "when", "validation_from": "2024-05-01", "test_from": "2024-06-15T12:00:00Z"}
    found, manifest = built(tiny_base, source, split=dated)
    for row in rows[:-1]:
        late = (row["when"] >= "2024-05-01") + (row["when"] >= "2024-06-15T12:00:00")
        assert found[row["text"]] == SPLITS[late]
    assert manifest["split"]["test_from"] == "2024-06-15T12:00:00+00:00"


def test_by_time_a_training_row_that_resembles_a_later_test_row_is_left_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"text": varied(i), "label": 1 + i % 2, "when": str(1_700_000_000 + i)} for i in range(100)]
    rows[97] = {**rows[97], "text": varied(10, 1)}
    rows[99] = {**rows[99], "text": varied(12, 1)}
    rows[20] = {**rows[20], "text": varied(21, 1)}  # both train, and stay
    source = in_files(tmp_path / "a", rows, 2, 5)
    found, manifest = built(tiny_base, source, split={"time": "when"})
    assert manifest["leakage"] == {"mode": "check", "moved": 0, "leaking": 2}
    assert manifest["dropped"]["leaking"] == 2
    assert sorted(found) == sorted(row["text"] for i, row in enumerate(rows) if i not in (10, 12))
    assert all(found[row["text"]] == "test" for row in rows[90:])
    reported, manifest = built(tiny_base, source, split={"time": "when"}, leakage="report")
    assert manifest["leakage"] == {"mode": "report", "moved": 0, "leaking": 2}
    assert len(reported) == 100


def test_dialogues_that_open_alike_do_not_lie_on_both_sides_of_a_date(
    tiny_chat_base: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": varied(i % 40), "answer": varied(100 + i), "when": f"2024-{1 + i // 10:02}-01"}
        for i in range(60)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    split = {"time": "when", "test_from": "2024-05-01", "validation_from": "2024-04-01"}
    planned = plan(
        Settings.model_validate(
            {
                "name": "talk",
                "task": "chat",
                "data": {"source": source, "split": split},
                "model": {"base": str(tiny_chat_base), "max_length": 256},
            }
        )
    )
    manifest = build(planned)
    # Questions 0 to 19 are asked again in May and June.
    assert manifest["dropped"]["leaking"] == 20
    assert {name: count["rows"] for name, count in manifest["splits"].items()} == {
        "train": 10,
        "validation": 10,
        "test": 20,
    }


def test_each_label_has_its_share_of_each_split(tiny_base: Path, tmp_path: Path) -> None:
    rows = reviews(500)
    repeated = [{**row, "text": f" {row['text']} "} for row in rows[:40]]  # duplicates count once
    stratified = {"stratified": True, **SHARES}
    found, manifest = built(
        tiny_base, in_files(tmp_path / "a", rows + repeated, 3, 1), split=stratified, rows_per_shard=60
    )
    assert manifest["split"] == {"by": "stratified"}
    counts = Counter((row["label"], found[row["text"]]) for row in rows)
    for label, size in ((1, 400), (2, 100)):
        for split, share in SHARES.items():
            assert abs(counts[label, split] - share * size) <= 1
    again, _ = built(tiny_base, in_files(tmp_path / "b", rows, 1, 2), split=stratified)
    assert again == found
    by_chance, _ = built(tiny_base, write_jsonl(tmp_path / "c.jsonl", rows), split=SHARES)
    assert (
        0.8 < sum(by_chance[text] == found[text] for text in found) / 500 < 1
    )  # most rows are where they were


def test_several_heads_are_stratified_by_all_their_labels(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": varied(i), "mood": "ab"[i % 2], "topic": "xyz"[i % 7 % 3]} for i in range(420)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    heads = {
        "mood": {"column": "mood", "labels": ["a", "b"]},
        "topic": {"column": "topic", "labels": ["x", "y", "z"]},
    }
    found, _ = built(tiny_base, source, labels=None, heads=heads, split={"stratified": True, **SHARES})
    counts = Counter((row["mood"], row["topic"], found[row["text"]]) for row in rows)
    sizes = Counter((row["mood"], row["topic"]) for row in rows)
    for mood, topic in sizes:
        for split, share in SHARES.items():
            assert abs(counts[mood, topic, split] - share * sizes[mood, topic]) <= 1


def test_mistakes_are_one_line(tiny_base: Path, tmp_path: Path) -> None:
    rows = reviews(40)
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"has no column 'usr' \(data.split.group\); did you mean 'user'\?"):
        plan(settings(tiny_base, source, split={"group": "usr"}))
    with pytest.raises(DataError, match=r"test split would be empty: no row of 'when' is of its time"):
        build(plan(settings(tiny_base, source, split={"time": "when", "test_from": "2030-01-01"})))
    late = write_jsonl(tmp_path / "b.jsonl", [*rows[:4], {**rows[4], "when": "later"}, *rows[5:]])
    with pytest.raises(DataError, match=r"b.jsonl row 5 is wrong in the column of data.split.time: 'later'"):
        build(plan(settings(tiny_base, late, split={"time": "when"})))
    one = write_jsonl(tmp_path / "c.jsonl", [{**row, "user": "me"} for row in rows])
    with pytest.raises(DataError, match=r"or too many of them have the same group \('user'\)"):
        build(plan(settings(tiny_base, one, split={"group": "user"})))
