"""Columns made of others, and labels of one source in the words of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lib.data.build import build
from lib.data.plan import plan
from lib.data.shapes import Shape, columns_of, filled
from lib.errors import ConfigError, DataError
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
        sentence(i) + ("\nask <EMAIL_1>" if i % 2 else "") for i in range(60)
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
