"""Columns made of others, and labels of one source in the words of all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lib.data.build import build
from lib.data.plan import plan
from lib.data.reading.shapes import Shape, columns_of, filled
from lib.errors import ConfigError, DataError
from lib.settings import DataSettings, load_settings
from tests.data.test_build import read, sentence, settings, write_jsonl


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{title}\n{body}", ["A\nB", "\nB", "A\n", None, None]),
        ("{{{title}}} – {body}{body}", ["{A} – BB", "{} – BB", "{A} – ", None, None]),
        ("{body}", ["B", "B", None, None, None]),
    ],
)
def test_what_is_missing_is_empty_and_what_all_miss_is_null(template: str, texts: list[str | None]) -> None:
    rows = pa.table({"title": ["A", None, "A", None, " "], "body": ["B", "B", None, None, ""]})
    assert filled(template, rows).to_pylist() == texts
    assert filled(template, rows.slice(0, 0)).to_pylist() == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{title", r"a \{ in '\{title' stands alone; write \{\{ for the sign"),
        ("title}", r"a \} in 'title\}' stands alone"),
        ("{}", "stands alone"),
        ("only words", "names no column"),
    ],
)
def test_templates_that_are_none(template: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        columns_of(template)


def test_a_column_may_be_made_of_itself_and_names_may_hold_anything() -> None:
    shape = Shape({"text": "text", "label": "label"}, {"text": "{Review: Title}. {text}"})
    assert shape.read == ["Review: Title", "text", "label"]
    made = shape.apply(pa.table({"Review: Title": ["A"], "text": ["b"], "label": ["1"]}))
    assert made.to_pylist() == [{"text": "A. b", "label": "1"}]


def rows(count: int = 60) -> list[dict[str, Any]]:
    return [
        {"title": sentence(i), "body": f"ask ada{i}@example.com" if i % 2 else None, "label": 1}
        for i in range(count)
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_a_dataset_of_made_texts_has_no_personal_data(tiny_base: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*rows(), {"title": " ", "label": 1}])
    given = {
        "templates": {"said": "{title}\n{body}"},
        "columns": {"text": "said"},
        "slices": {"kind": "title"},
    }
    planned = plan(settings(tiny_base, source, **given, leakage="off"))
    manifest = build(planned)
    assert manifest["dropped"]["empty"] == 1
    assert manifest["redacted"]["EMAIL"] == 30
    whole = pa.concat_tables(read(planned.ref.uri).values())
    assert sorted(whole["text"].to_pylist()) == sorted(
        sentence(i) + (" ask <EMAIL_1>" if i % 2 else "") for i in range(60)
    )
    assert "@" not in json.dumps(whole.select(["text", "kind"]).to_pylist())
    other = plan(
        settings(tiny_base, source, **{**given, "templates": {"said": "{title} {body}"}}, leakage="off")
    )
    assert other.ref != planned.ref


def test_columns_that_are_not_there(tiny_base: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", rows())
    with pytest.raises(
        DataError, match=r"has no column 'titel' \(data\.templates\.text\); did you mean 'title'"
    ):
        plan(settings(tiny_base, source, templates={"text": "{titel}"}))
    with pytest.raises(
        ConfigError, match=r"data\.templates\.txt: no column 'txt' is read; did you mean 'text'"
    ):
        plan(settings(tiny_base, source, templates={"text": "{title}", "txt": "{title}"}))
    assert plan(settings(tiny_base, source, templates={"text": "{title}"})).reading.columns["text"] == "text"


def corpora(folder: Path) -> dict[str, str]:
    """Three sources of 300 rows each: with the columns and labels of all; with those of its own; and texts alone, sorted into
    folders."""
    ours = [{"text": sentence(i), "label": 1 + i % 2} for i in range(300)]
    theirs = [
        {"review": sentence(1000 + i), "mood": ["neg", "pos", "1"][min(i % 2 + (i == 299) * 2, 2)]}
        for i in range(300)
    ]
    places = {
        "ours": write_jsonl(folder / "ours.jsonl", ours),
        "theirs": write_jsonl(folder / "theirs.jsonl", theirs),
    }
    for name, first in (("bad", 2000), ("good", 2150)):
        (folder / "texts" / name).mkdir(parents=True)
        (folder / "texts" / name / "a.txt").write_text("\n".join(sentence(first + i) for i in range(150)))
    return places | {"texts": f"{folder}/texts"}


def mixture(
    places: dict[str, str], ours: float = 1, theirs: float = 1, texts: float = 1
) -> list[dict[str, Any]]:
    return [
        {"uri": places["ours"], "weight": ours},
        {
            "uri": places["theirs"],
            "weight": theirs,
            "columns": {"text": "review", "label": "mood"},
            "labels": {"neg": "bad", "pos": "good"},
        },
        {
            "uri": places["texts"],
            "weight": texts,
            "columns": {"label": "folder"},
            "labels": {"bad": "bad", "good": "good"},
        },
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_sources_with_columns_labels_and_weights_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    places = corpora(tmp_path)
    with pytest.raises(DataError) as caught:
        build(plan(settings(tiny_base, mixture(places))))
    # A label of all is none of a source that has its own.
    assert "1 of 900 rows hold a label outside the mapping ('1 (not among the labels of its source)')" in str(
        caught.value
    )
    assert "theirs.jsonl row 300" in str(caught.value)
    given = {"quarantine": {"share": 0.01}, "leakage": "off"}
    even, weighed = (
        plan(settings(tiny_base, mixture(places), **given)),
        plan(settings(tiny_base, mixture(places, ours=2.5, theirs=0.4), **given)),
    )
    assert even.ref != weighed.ref
    before, after = build(even), build(weighed)
    tables = read(weighed.ref.uri)
    for split in ("validation", "test"):  # are as they were
        assert tables[split].equals(read(even.ref.uri)[split])
    was, train = (read(planned.ref.uri)["train"] for planned in (even, weighed))
    assert len(set(train["id"].to_pylist())) == len(train)
    times = Counter(train["text"].to_pylist())
    source = {sentence(first + i): first for first in (0, 1000, 2000) for i in range(300)}
    assert {times[text] for text in was["text"].to_pylist() if source[text] == 0} == {2, 3}
    assert {times[text] for text in was["text"].to_pylist() if source[text] == 1000} == {0, 1}
    assert {times[text] for text in was["text"].to_pylist() if source[text] == 2000} == {1}
    rows = Counter(source[text] for text in was["text"].to_pylist())
    now = Counter(source[text] for text in train["text"].to_pylist())
    assert now[0] == pytest.approx(2.5 * rows[0], rel=0.1)
    assert now[1000] == pytest.approx(0.4 * rows[1000], rel=0.3)
    # The manifest tells it.
    assert [file["kept"]["train"] for file in after["sources"][:2]] == [now[0], now[1000]]
    assert sum(file["kept"]["train"] for file in after["sources"][2:]) == now[2000] == rows[2000]
    assert [file["source"] for file in after["sources"]] == [0, 1, 2, 2]
    assert after["sources"][1]["weight"] == 0.4
    assert after["dropped"]["thinned"] == rows[1000] - now[1000]
    assert after["repeated"] == now[0] - rows[0]
    assert "repeated" not in before
    kept = sum(count["rows"] for count in after["splits"].values())
    assert after["rows_read"] + after["repeated"] == kept + sum(after["dropped"].values())
    label = dict(zip(train["text"].to_pylist(), train["label"].to_pylist(), strict=True))
    assert all(
        label[text] == number % 2
        for first in (0, 1000)
        for number in range(300)
        if (text := sentence(first + number)) in label
    )
    assert all(label[sentence(2000 + i)] == (i >= 150) for i in range(300) if sentence(2000 + i) in label)


def test_what_a_source_has_of_its_own_is_part_of_the_fingerprint(tiny_base: Path, tmp_path: Path) -> None:
    places = corpora(tmp_path)
    plain = plan(settings(tiny_base, places["ours"])).ref
    assert plan(settings(tiny_base, [{"uri": places["ours"]}])).ref == plain
    assert plan(settings(tiny_base, {"uri": places["ours"], "weight": 2})).ref != plain
    assert plan(settings(tiny_base, {"uri": places["ours"], "labels": {1: "good"}})).ref != plain


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": {"uri": "a.csv", "wieght": 2}}, "unknown key 'data.source.wieght'; did you mean 'weight'?"),
        ({"source": ["a.csv", {"uri": "b.csv", "weight": 0}]}, "data.source.1.weight: input should be greater than 0, got 0"),
        ({"source": [{"weight": 2}]}, "data.source.0.uri is missing; add it"),
        ({"source": []}, "data.source"),
        ({"source": {"uri": "a.csv", "columns": {"txt": "b"}}}, "source.0.columns: no column 'txt'; did you mean 'text'?"),
        ({"source": {"uri": "a.csv", "labels": {"x": "god"}}}, "source.0.labels: no label 'god'; did you mean 'good'?"),
        ({"source": "a.csv", "test_source": {"uri": "b.csv", "weight": 2}}, "test_source.0.weight: it counts in training alone; leave it out"),
        ({"source": {"uri": "postgresql://me:secret@host/shop"}}, "a database's password does not belong into a configuration"),
    ],
)  # fmt: skip
def test_mistakes_in_a_source_are_told_by_their_key(data: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {
        "name": "a",
        "task": "sentiment",
        "data": {"labels": ["bad", "good"], **data},
        "model": {"base": "b"},
    }
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert said in str(caught.value)
    assert "valid string" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_sources_on_the_command_line_and_what_they_take_from_all(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "a",
                "task": "sentiment",
                "data": {"source": "x", "labels": ["a", "b"]},
                "model": {"base": "b"},
            }
        )
    )
    words = [
        "--data.source",
        "[a.csv, {uri: 'sqlite:///b.db', query: select 2}, 'sqlite:///c.db']",
        "--data.query",
        "select 1",
    ]
    data = load_settings(path, [*words, "--data.format", "tsv", "--data.test_source", "t.csv"]).data
    told = [(entry.uri, entry.query, entry.format) for entry in data.sources[None]]
    assert told == [
        ("a.csv", "select 1", "tsv"),
        ("sqlite:///b.db", "select 2", "tsv"),
        ("sqlite:///c.db", "select 1", "tsv"),
    ]
    assert [(entry.uri, entry.query) for entry in data.sources["test"]] == [("t.csv", None)]
    again = DataSettings.model_validate(data.model_dump(mode="json"))
    assert again == data


def test_labels_of_a_source_need_rows_of_one_label(tiny_base: Path, tmp_path: Path) -> None:
    from lib.settings import Settings

    source = write_jsonl(tmp_path / "a.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    data = {"source": {"uri": source, "labels": {"PERSON": "PER"}}, "labels": ["PER"]}
    given = {
        "name": "words",
        "task": "tagging",
        "data": data,
        "model": {"base": str(tiny_base), "max_length": 12},
    }
    with pytest.raises(ConfigError, match=r"the labels of .*a\.jsonl: only rows of one label"):
        plan(Settings.model_validate(given))


def test_copies_are_drawn_apart_from_undersampling() -> None:
    import numpy as np

    from lib.data.splitting import weights
    from lib.data.splitting.split import kept

    hashes = np.random.default_rng(0).integers(-(2**63), 2**63, 20_000)
    train = np.zeros(len(hashes), np.int8)
    copies = weights.copies(np.full(len(hashes), 0.5), train, hashes, seed=3)
    under = kept(hashes, np.full(len(hashes), 0.5), 3)
    assert copies.mean() == pytest.approx(0.5, abs=0.02)
    assert (copies[under] == 1).mean() == pytest.approx(0.5, abs=0.02)
    assert (weights.copies(np.full(len(hashes), 3.0), train + 1, hashes, 3) == 1).all()
