"""Semantic near duplicates: which vectors meet, which count, and that a dataset joins what says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from lib.artifacts import SPLITS
from lib.data.alike import semantic
from lib.data.alike.semantic import Tables
from lib.data.plan import plan
from lib.settings import Settings

DIRECTIONS = 64


def directions(rows: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, DIRECTIONS)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def beside(vectors: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """Vectors at this cosine of others."""
    other = directions(len(vectors), seed)
    other -= (other * vectors).sum(1, keepdims=True) * vectors
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return (cosine * vectors + np.sqrt(1 - cosine**2) * other).astype(np.float32)


def linked(vectors: np.ndarray, tables: Tables, order: np.ndarray | None = None) -> set[tuple[int, int]]:
    """Candidates that all tables give."""
    coded = semantic.codes(vectors)
    keys = tables.keys(coded)
    positions = np.repeat(np.arange(len(vectors)), tables.tables)
    rows = pa.table(
        {
            "key": keys.ravel(),
            "position": positions,
            "code": semantic.to_binary(coded).take(pa.array(positions)),
        }
    )
    if order is not None:
        rows = rows.take(pa.array(order))
    found = semantic.candidates(rows, tables.most)
    return set(zip(found["a"].to_pylist(), found["b"].to_pylist(), strict=True))


@pytest.mark.parametrize("threshold", [0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("rows", [10, 1024, 10_000, 10**6, 10**9])
def test_tables_find_a_pair_at_the_threshold(threshold: float, rows: int) -> None:
    tables = Tables.of(threshold, rows)
    same = 1 - np.arccos(threshold) / np.pi
    found = 1 - (1 - same**tables.bits) ** tables.tables
    assert found >= 0.995 - 1e-9
    assert tables.tables <= semantic.MOST_TABLES
    assert tables.tables * tables.bits <= semantic.BITS
    if rows <= semantic.BUCKET:
        assert (tables.tables, tables.bits) == (1, 0)


def test_pairs_at_the_threshold_are_found_and_few_others() -> None:
    vectors = directions(6000)
    near = beside(vectors[:1000], 0.95)
    far = beside(vectors[1000:2000], 0.7, seed=2)
    whole = np.concatenate([vectors, near, far])
    tables = Tables.of(0.95, len(whole))
    assert tables.bits == 3
    found = linked(whole, tables)
    wanted = {(i, 6000 + i) for i in range(1000)}
    assert len(wanted & found) >= 985
    assert len(found - wanted) < 20
    shuffled = np.random.default_rng(4).permutation(len(whole) * tables.tables)
    assert linked(whole, tables, shuffled) == found


def test_of_many_alike_each_is_linked_with_few() -> None:
    vectors = beside(np.repeat(directions(1), 3000, 0), 0.999)
    found = linked(vectors, Tables.of(0.95, 500))
    assert len(found) < 3000 * 8
    assert {b for _, b in found} | {a for a, _ in found} == set(range(3000))
    from lib.data.alike.clusters import components

    links = pa.table({"a": [a for a, _ in found], "b": [b for _, b in found]})
    assert set(components(links)["root"].to_pylist()) == {0}


def test_candidates_count_by_their_cosine_alone() -> None:
    first = directions(400)
    cosines = np.linspace(0.90, 0.99, 400)
    second = np.stack([beside(first[i : i + 1], c)[0] for i, c in enumerate(cosines)])
    binary = [semantic.to_binary(side.astype(np.float16)) for side in (first, second)]
    assert semantic.cosines(*binary) == pytest.approx(cosines, abs=2e-4)
    a = np.arange(400)
    rows = pa.table(
        {
            "a": np.concatenate([a, a]),
            "position": np.concatenate([a, a + 400]),
            "value": pa.chunked_array(binary),
        }
    )
    found = semantic.verified(rows, 0.95)
    assert found["a"].to_pylist() == np.flatnonzero(semantic.cosines(*binary) >= 0.95).tolist()
    assert semantic.from_binary(binary[0].slice(7, 5), np.float16) == pytest.approx(first[7:12], abs=1e-3)


def settings(base: Path, source: Path, **data: Any) -> Settings:
    section = {"source": str(source), "labels": ["bad", "good"], "rows_per_shard": 100, **data}
    values = {"name": "test", "task": "sentiment", "data": section}
    return Settings.model_validate({**values, "model": {"base": str(base), "max_length": 32}})


def test_a_comparison_that_nobody_asks_for_is_told(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"near\.semantic: nothing is compared; set near\.duplicates"):
        settings(tiny_base, tmp_path, near={"semantic": {}}, leakage="off")
    assert settings(tiny_base, tmp_path, near={"semantic": {}}).data.near.semantic is not None


# Each line says one thing, in several ways.
SAID = [
    ["The parcel arrived two days late.", "The package was delivered two days late.",
     "My parcel came two days late."],
    ["How can I change my password?", "How do I change my password?"],
    ["The shoes are too small for me.", "These shoes are too small for me."],
    ["The dress has a hole in the sleeve."],
    ["Your shop does not ship to Norway."],
    ["I was charged twice for one order."],
    ["The colour is darker than in the picture."],
    ["The parcel arrived two days early, thank you."],
    ["How can I delete my account?"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "storage")
def test_paraphrases_are_one_row_and_others_stay(tiny_base: Path, tmp_path: Path) -> None:
    from lib.data.build import build

    texts = [text for line in SAID for text in line]
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "label": "good"}) for text in ["", *reversed(texts), texts[0]]]
    source.write_text("\n".join(lines))
    near = {
        "duplicates": "drop",
        "keep": "longest",
        "semantic": {"model": "sample://minilm-l6", "threshold": 0.85},
    }
    whole = {"train": 1, "validation": 0, "test": 0}
    kept: list[list[str]] = []
    for extra in ({}, {"rows_per_shard": 3}):
        planned = plan(settings(tiny_base, source, near=near, split=whole, **extra))
        manifest = build(planned)
        assert manifest["dropped"]["near_duplicate"] == 4
        assert manifest["dropped"]["duplicate"] == 1
        kept.append(sorted(texts_of(planned.ref.uri)))
    assert kept[0] == kept[1] == sorted(max(line, key=len) for line in SAID)
    # By their words alone they are no near duplicates.
    words = plan(settings(tiny_base, source, near={"duplicates": "drop"}, split=whole))
    assert build(words)["dropped"]["near_duplicate"] == 0
    # Where they stay, they stay together.
    checked = plan(settings(tiny_base, source, near={"semantic": near["semantic"]}))
    alone = plan(settings(tiny_base, source, leakage="off"))
    assert checked.ref != alone.ref


def texts_of(uri: str) -> list[str]:
    folder = Path(uri.removeprefix("file://"))
    files = [path for split in SPLITS for path in sorted((folder / split).glob("*.parquet"))]
    return [text for path in files for text in pq.read_table(path)["text"].to_pylist()]
