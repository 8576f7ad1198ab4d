"""How many rows each part gives, and that the same seed gives the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.mix import Stream, shares


def test_shares_go_by_the_root_of_the_size() -> None:
    sizes = {"large": 9000, "small": 1000}
    assert shares(sizes, 1) == sizes
    assert shares(sizes, 2) == {"large": 7500, "small": 2500}  # 3 to 1, of 10,000
    even = shares(sizes, 1e9)
    assert even["large"] == even["small"] == 5000
    assert shares({"large": 10_000_000, "one": 1}, 1)["one"] == 1


def stream(folder: Path, count: int, seed: int = 0) -> list[int]:
    rows = Stream("a", [str(p) for p in sorted(folder.glob("*.parquet"))], 100, count, [seed])
    tables = [rows.take(count // 3), rows.take(count // 3), rows.take(count - 2 * (count // 3))]
    assert all(table is None or set(table["part"].to_pylist()) == {"a"} for table in tables)
    return [value for table in tables if table is not None for value in table["a/label"].to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(2):
        table = pa.table(
            {
                "id": [f"{j}" for j in range(50)],
                "text": ["x"] * 50,
                "label": pa.array(np.arange(i * 50, i * 50 + 50), pa.int32()),
                "length": pa.array([1] * 50, pa.int32()),
            }
        )
        pq.write_table(table, tmp_path / f"part-{i}.parquet")
    return tmp_path


def test_a_part_is_repeated_and_the_rest_is_drawn_without_repetition(folder: Path) -> None:
    found = stream(folder, 230)
    counts = np.bincount(found, minlength=100)
    assert len(found) == 230
    assert counts.min() == 2
    assert counts.max() == 3


def test_a_part_is_thinned(folder: Path) -> None:
    found = stream(folder, 30)
    assert len(set(found)) == 30
    assert max(found) >= 50  # from all of it, not from its beginning
    assert stream(folder, 30) == found
    assert stream(folder, 30, seed=1) != found
    assert stream(folder, 0) == []
