"""ChatterBot's corpus: conversations become messages; what is no corpus is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.data.reading import readers, sources
from lib.errors import DataError


def read(path: Path, batch_rows: int = 100) -> list[dict[str, str]]:
    (file,) = sources.find_files([str(path)])
    assert file.format == "chatterbot"
    tables = list(readers.read_tables(file, readers.column_names(file), batch_rows, frozenset({"messages"})))
    assert all(table.num_rows <= batch_rows for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def test_conversations_alternate_between_user_and_assistant(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    path.write_text("categories: [a, b]\nconversations:\n- [Hi, Hello, 3]\n- - 'It''s é'\n  - Yes\n")
    rows = read(path, batch_rows=1)
    assert [row["category"] for row in rows] == ["a, b", "a, b"]
    assert [[(t["role"], t["content"]) for t in json.loads(row["messages"])] for row in rows] == [
        [("user", "Hi"), ("assistant", "Hello"), ("user", "3")],
        [("user", "It's é"), ("assistant", "Yes")],
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [b\nc: d", r"x\.yml line 2 is not valid YAML"),
        ("- a", "holds no `conversations`"),
        ("conversations:\n- [a, b]\n- {a: b}", r"x\.yml row 2 is no list of texts"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read(path)


def test_the_samples_hold_what_they_say() -> None:
    counts = {}
    for name in ("tech-support", "small-talk"):
        rows = [
            row["messages"]
            for file in sources.find_files([f"sample://{name}"])
            for table in readers.read_tables(file, ["messages"], 5000, frozenset({"messages"}))
            for row in table.to_pylist()
        ]
        counts[name] = (len(rows), len(set(rows)))
    assert counts["tech-support"] == (1050, 10)
    assert counts["small-talk"] == (715, 628)
