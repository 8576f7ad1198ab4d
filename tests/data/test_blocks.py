"""Rows as blocks: every row once, in order, in blocks of bounded size that do not depend on the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data import blocks
from lib.data.blocks import Reading, from_row, pack, read_blocks, to_row, unpack
from lib.data.reading.sources import find_files

COLUMNS = {"text": "review", "label": "stars", "kind": "stars"}


def reading(folder: Path, block_rows: int = 10, limit: int | None = None) -> Reading:
    return Reading(tuple(find_files([str(folder)])), COLUMNS, frozenset(), block_rows, limit)


def files(folder: Path, sizes: Sequence[int], text: str = "text") -> list[str]:
    texts = []
    for i, size in enumerate(sizes):
        rows = [f"{text} {i}.{row}" for row in range(size)]
        pq.write_table(pa.table({"review": rows, "stars": [1] * size}), folder / f"{i:03d}.parquet")
        texts += rows
    return texts


def test_blocks_cross_files_and_keep_the_order(tmp_path: Path) -> None:
    texts = files(tmp_path, [7, 0, 18, 3])
    source = reading(tmp_path)
    assert source.fragments() == [(0, 4)]
    found = list(read_blocks(source, 0, (0, 4)))
    assert [b.rows.num_rows for b in found] == [10, 10, 8]
    assert [b.number for b in found] == [0, 1, 2]
    rows = pa.concat_tables([b.rows for b in found])
    assert rows["text"].to_pylist() == texts
    assert rows["kind"].to_pylist() == ["1"] * 28
    positions = rows["position"].to_pylist()
    assert positions == sorted(positions)
    assert source.place(positions[0]).endswith("000.parquet row 1")
    assert source.place(positions[7]).endswith("002.parquet row 1")
    assert source.place(positions[-1]).endswith("003.parquet row 3")


def test_large_files_are_fragments_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, [1] * 6)
    size = (tmp_path / "000.parquet").stat().st_size
    monkeypatch.setattr(blocks, "FRAGMENT_BYTES", size * 2)
    source = reading(tmp_path)
    assert source.fragments() == [(0, 2), (2, 4), (4, 6)]
    monkeypatch.setattr(blocks, "FRAGMENT_BYTES", 1)
    assert source.fragments() == [(i, i + 1) for i in range(6)]


@pytest.mark.parametrize("limit", [1, 7, 12, 25, 100])
def test_limit_takes_the_first_rows(tmp_path: Path, limit: int) -> None:
    texts = files(tmp_path, [7, 18])
    source = reading(tmp_path, limit=limit)
    (fragment,) = source.fragments()
    rows = pa.concat_tables([b.rows for b in read_blocks(source, 0, fragment)])
    assert rows["text"].to_pylist() == texts[:limit]


def test_long_texts_make_blocks_of_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = files(tmp_path, [50], text="x" * 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    found = list(read_blocks(reading(tmp_path, block_rows=100), 0, (0, 1)))
    assert max(b.rows.nbytes for b in found) < 5000 + 2000
    assert pa.concat_tables([b.rows for b in found])["text"].to_pylist() == texts


def test_a_problem_ends_the_fragment_and_keeps_what_was_before(tmp_path: Path) -> None:
    files(tmp_path, [12])
    (tmp_path / "001.jsonl").write_text('{"review": "a", "stars": 1}\nbroken\n')
    found = list(read_blocks(reading(tmp_path), 0, (0, 2)))
    assert [b.rows.num_rows for b in found] == [10, 0]
    assert found[0].problem is None
    assert "001.jsonl line 2 is not valid JSON" in str(found[1].problem)


def test_a_block_survives_its_packing(tmp_path: Path) -> None:
    files(tmp_path, [12])
    for block in read_blocks(reading(tmp_path), 3, (0, 1)):
        row = to_row(block)
        assert row.num_rows == 1
        again = from_row(row, list(COLUMNS))
        assert (again.fragment, again.number, again.problem) == (3, block.number, None)
        assert again.rows.equals(block.rows.select(again.rows.column_names))


def test_unpack_flattens_many_rows() -> None:
    rows = pa.concat_tables([pack({"x": pa.array(v, pa.int64())}, {}) for v in ([1, 2], [], [3])])
    assert unpack(rows, ["x"])["x"].to_pylist() == [1, 2, 3]
    assert unpack(rows.combine_chunks(), ["x"])["x"].to_pylist() == [1, 2, 3]
