"""report.html of a dataset: what its manifest and its rows say, as a page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib.data import report
from lib.data.build import build
from lib.data.plan import plan
from lib.data.shards import LENGTH_ENDS, SplitCount, length_classes
from tests.data.test_build import sentence, settings

EVIL = "<script>alert(1)</script>"


def manifest(**other: Any) -> dict[str, Any]:
    split = {
        "rows": 6,
        "tokens": 60,
        "truncated": 1,
        "labels": {"bad": 2, "good": 4},
        "shards": ["p.parquet"],
    }
    split["lengths"] = {"5": 2, "11": 4}
    return {
        "name": "test", "fingerprint": "f00d", "task": "sentiment", "base": "tiny", "max_length": 12,
        "created": "now", "labels": ["bad", "good"], "rows_read": 20, "dropped": {"empty": 2, "duplicate": 0},
        "splits": dict.fromkeys(("train", "validation", "test"), split),
        "redacted": {"EMAIL": 3, "rows": 2}, "sources": [{"uri": "a.csv", "rows": 20, "checksum": "c0de"}],
        "examples": {"empty": [{"row": "a.csv row 7", "text": EVIL}]},
        "cleaned": {"changed": {"html": 4}, "rejected": {}}, "leakage": {"mode": "check", "moved": 0, "leaking": 0},
        "settings": {"seed": 0}, "versions": {"ray": "2.60"}, **other,
    }  # fmt: skip


def figures(page: str) -> dict[str, bytes]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    return {name: base64.b64decode(data) for name, data in found}


def test_lengths_are_counted_in_classes_that_lose_no_row() -> None:
    assert LENGTH_ENDS[:9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert np.all(np.diff(LENGTH_ENDS) > 0)
    found = length_classes(np.array([0, 1, 9, 8, 10, 512, 609, 2**30]))
    assert sum(found.values()) == 8
    assert (found[1], found[8], found[10], found[512]) == (2, 2, 1, 1)
    one = SplitCount(rows=2, lengths={8: 2})
    one.add(SplitCount(rows=1, lengths=json.loads(json.dumps({8: 1, 512: 1}))))
    assert one.manifest([])["lengths"] == {"8": 3, "512": 1}


def test_the_page_says_what_the_manifest_says_and_runs_nothing() -> None:
    rows = {"train": [{"text": EVIL, "label": "good"}], "validation": [], "test": []}
    page = report.render_page(manifest(), rows)
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(1)") == 2  # in an example and in a row
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a.csv row 7" in page
    assert "10.00%" in page  # 2 of 20 are empty
    assert re.search(r"<td>EMAIL</td><td>3</td>", page)
    drawn = figures(page)
    assert set(drawn) == {"what became of the rows", "lengths", "labels"}
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_the_page_tells_of_splits_and_of_new_rows_where_there_are_any() -> None:
    bare = report.render_page(manifest(split={"by": "random"}), {})
    assert "Split by" not in bare
    assert "Augmented" not in bare
    split = {"by": "time", "column": "created", "test_from": "2024-03-01T00:00:00+00:00"}
    page = report.render_page(manifest(split=split, augmented={"back_translation": 1234}), {})
    assert "Split by time (created), test from 2024-03-01T00:00:00+00:00." in page
    assert "<td>back translation</td><td>1,234</td>" in page


def test_a_figure_is_of_its_numbers() -> None:
    same = figures(report.render_page(manifest(), {}))
    assert figures(report.render_page(manifest(), {})) == same
    other = figures(report.render_page(manifest(rows_read=21), {}))
    assert other["what became of the rows"] != same["what became of the rows"]
    assert other["labels"] == same["labels"]


def test_without_labels_and_lengths_there_are_no_such_figures() -> None:
    bare = manifest(task="chat", labels=[])
    for split in bare["splits"].values():
        split |= {"lengths": {}, "labels": {}}
    assert set(figures(report.render_page(bare, {}))) == {"what became of the rows"}


def test_rows_of_any_task_are_shown_without_features(tmp_path: Path) -> None:
    said = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho" * 400}]] * 9
    (tmp_path / "train").mkdir()
    table = pa.table(
        {"id": ["a"] * 9, "messages": said, "label": [1] * 9, "label:topic": [0] * 9, "input_ids": [[1, 2]] * 9,
         "tokens": [["Ada", "said"]] * 9, "length": [2] * 9}
    )  # fmt: skip
    pq.write_table(table, tmp_path / "train/p.parquet")
    of = manifest(heads={"topic": ["price", "fit"]})
    for split in ("validation", "test"):
        of["splits"][split] = {**of["splits"][split], "shards": []}
    shown = report.examples(str(tmp_path), of)
    assert len(shown["train"]) == report.SHOWN
    first = shown["train"][0]
    assert set(first) == {"messages", "label", "label:topic", "tokens"}
    assert first["messages"].startswith("user: hi\nassistant: hoho")
    assert len(first["messages"]) == report.SHOWN_CHARACTERS + 1
    assert (first["label"], first["label:topic"], first["tokens"]) == ("good", "price", "Ada said")
    assert shown["validation"] == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_a_dataset_has_its_page_and_examples_of_what_was_left_out(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": sentence(i * 37), "label": 1 + i % 2} for i in range(200)]
    rows[3] = {"text": " ", "label": 1}
    rows[50] = {"text": f"{rows[40]['text']}", "label": rows[40]["label"]}
    rows[60] = {"text": "fits and mail ada@example.com", "label": None}
    rows[150] = {"text": rows[40]["text"], "label": 3 - rows[40]["label"]}
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    planned = plan(settings(tiny_base, str(source), leakage="off"))
    found = build(planned)
    places = {why: [int(one["row"].split()[-1]) for one in some] for why, some in found["examples"].items()}
    assert places == {"empty": [4], "unlabelled": [61], "duplicate": [51], "conflicting": [151]}
    assert found["examples"]["unlabelled"][0]["text"] == "fits and mail <EMAIL_1>"
    for split in found["splits"].values():
        assert sum(split["lengths"].values()) == split["rows"]
    page = files.read_bytes(files.join(planned.ref.uri, report.FILE)).decode()
    assert planned.ref.fingerprint in page
    assert "ada@example.com" not in page
    assert f"<td>{source} row 151</td>" in page
    train = pq.read_table(planned.ref.shards("train")[0]).to_pylist()
    assert train[0]["text"] in page
