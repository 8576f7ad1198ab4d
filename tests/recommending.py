"""A small catalogue and people with habits, as a dataset of `lib.data.recommending.build` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import SPLITS, DatasetRef, ModelRef, TaskFile
from lib.encoders import base_tokenizer, lists
from lib.recommender import items as catalogue
from lib.recommender import vectors
from lib.recommender.items import Scale
from lib.registry import VERSION_FILE
from lib.settings import Settings
from tests.tiny import WORDS

ITEMS = 24
GENRES = ["old", "new", "odd"]


def settings_for(base: Path | str, training: dict[str, Any] | None = None, **recommender: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "films",
            "task": "recommend",
            "data": {
                "source": "unused.csv",
                "items": {"source": "unused.csv", "numbers": ["year"]},
                "users": {"source": "unused.csv", "numbers": ["age"]},
            },
            "model": {
                "base": str(base),
                "max_length": 16,
                "recommender": {"width": 8, "text": "none", **recommender},
            },
            "training": {"cpus_per_worker": 0.5, "precision": "fp32", **(training or {})},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
        }
    )


def item_rows(base: Path, count: int = ITEMS, seen: int | list[int] = 5) -> pa.Table:
    """Titles of two words, a genre or none, and a price that is not always known."""
    titles = [f"{WORDS[i % len(WORDS)]} {WORDS[(i * 7 + 3) % len(WORDS)]}" for i in range(count)]
    encoded = base_tokenizer(str(base), 16).encode_batch(titles)
    ids, lengths = lists([np.array(one.ids, np.int32) for one in encoded])
    prices = np.where(np.arange(count) % 5 == 4, np.nan, np.arange(count))
    return pa.table(
        {
            "item": [f"film-{i}" for i in range(count)],
            "title": titles,
            "text": titles,
            "categories": pa.array(
                [[f"genre={GENRES[i % 3]}"] if i % 4 else [] for i in range(count)], pa.list_(pa.string())
            ),
            "numbers": pa.array([[price] for price in prices], pa.list_(pa.float32(), 1)),
            "input_ids": ids,
            "length": lengths,
            "interactions": pa.array([seen] * count if isinstance(seen, int) else seen, pa.int32()),
        }
    )


def sequences(rows: list[tuple[list[int], int]], fresh: bool = False, seed: int = 0) -> pa.Table:
    """Of (items, targets): an interaction an hour, of either event, by users of two towns."""
    random = np.random.default_rng(seed)
    items, lengths = lists([np.array(row, np.int32) for row, _ in rows])

    def beside(make: Any) -> list[list[Any]]:
        return [make(len(row)) for row, _ in rows]

    return pa.table(
        {
            "id": [f"{i:016x}" for i in range(len(rows))],
            "user": [f"user-{i}" for i in range(len(rows))],
            "items": items,
            "times": pa.array(beside(lambda n: (np.arange(n) * 3600).tolist()), pa.list_(pa.int64())),
            "events": pa.array(beside(lambda n: random.integers(0, 2, n).tolist()), pa.list_(pa.int16())),
            "weights": pa.array(
                beside(lambda n: random.choice([0.5, 2.0], n).tolist()), pa.list_(pa.float32())
            ),
            "targets": pa.array([targets for _, targets in rows], pa.int32()),
            "fresh": [fresh] * len(rows),
            "length": lengths,
            "user_categories": pa.array(
                [[i % 2] if i % 3 else [] for i in range(len(rows))], pa.list_(pa.int32())
            ),
            "user_numbers": pa.array([[float(i % 3 - 1)] for i in range(len(rows))], pa.list_(pa.float32())),
        }
    )


def walks(count: int, seed: int = 0) -> list[list[int]]:
    """Of users who go from each item to the one behind it, mostly."""
    random = np.random.default_rng(seed)
    found = []
    for start in random.integers(1, ITEMS, count):
        steps = np.where(random.random(7) < 0.8, 1, random.integers(2, ITEMS, 7))
        found.append(np.unique((start + np.cumsum(steps)) % (ITEMS - 1) + 1, return_index=True))
    return [values[np.argsort(order)].tolist() for values, order in found]


def walked(count: int) -> dict[str, pa.Table]:
    """A train and a validation split of walks, of which the last step is foretold."""
    rows = [row for row in walks(count) if len(row) > 2]
    return {
        "train": sequences([(row[:-1], len(row) - 2) for row in rows]),
        "validation": sequences([(row, 1) for row in rows]),
    }


def dataset_of(
    items: pa.Table, splits: dict[str, pa.Table], fingerprint: str = "0123456789abcdef"
) -> DatasetRef:
    """Published in the storage of the test."""
    ref = DatasetRef("films", fingerprint)
    with storage.publish(ref.uri) as folder:
        for name, rows in {"items": items, **splits}.items():
            (folder / name).mkdir()
            half = len(rows) // 2
            pq.write_table(rows.slice(0, half), folder / name / "part-00000.parquet")
            pq.write_table(rows.slice(half), folder / name / "part-00001.parquet")
        manifest = {
            "name": ref.name,
            "fingerprint": fingerprint,
            "labels": [],
            "slices": [],
            "events": ["view", "buy"],
            "users_known": {"categories": ["town=a", "town=b"], "numbers": vars(Scale([40.0], [10.0]))},
            "items": {"rows": len(items)},
            "splits": {name: {"rows": len(splits[name]) if name in splits else 0} for name in SPLITS},
        }
        storage.write_json(str(folder / "manifest.json"), manifest)
    return ref


def clustered(count: int, width: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [count, width] of length about 1 and int64 [count], which heap each is of: some hundred or thousand heaps
    of different sizes, in turn within a few larger ones, as items lie by what they are and by who takes them."""
    heaps = max(int(2 * count**0.5), 1)
    kinds = random.standard_normal((max(heaps // 25, 1), width), np.float32)
    centers = kinds[random.integers(0, len(kinds), heaps)]
    centers += 0.7 * random.standard_normal((heaps, width), np.float32)
    of = random.choice(heaps, count, p=random.dirichlet(np.ones(heaps)))
    vectors = centers[of] + 0.6 * random.standard_normal((count, width), np.float32)
    return (vectors / (1.36 * width**0.5)).astype(np.float32), of


def companions(of: np.ndarray, users: int, size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Histories of `size` different items, a user's out of a few heaps (`clustered`)."""
    order, starts = np.argsort(of, kind="stable"), np.cumsum(np.bincount(of)) - np.bincount(of)
    found = []
    for _ in range(users):
        heaps = starts[of[random.integers(0, len(of), 3)]]
        near = np.concatenate([order[start : start + size] for start in heaps])
        found.append(random.permutation(np.unique(near))[:size])
    return found


def publish_many(base: Path, settings: Settings, count: int) -> None:
    """films@1 with `count` items in heaps, and users who keep to a few of them."""
    import torch

    from lib.tasks import recommend

    random = np.random.default_rng(0)
    heaped, of = clustered(count, settings.model.recommender.width, random)
    rows = sequences([(row.tolist(), 1) for row in companions(of, 200, 12, random)])
    ref = dataset_of(item_rows(base, count), {"train": rows, "validation": rows})
    torch.manual_seed(0)
    model = recommend.build(base, settings, ref).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.id.weight.copy_(torch.from_numpy(heaped))
        model.id_bias.weight.copy_(torch.from_numpy(random.normal(0, 0.5, (count, 1))))
    publish_model(model, base, ref)


def publish_films(base: Path, settings: Settings) -> None:
    """films@1: random weights, large enough that what somebody did counts."""
    import torch

    from lib.tasks import recommend

    ref = dataset_of(item_rows(base, seen=[0, *[5] * (ITEMS - 1)]), walked(80))
    encode = vectors.Encode(settings)
    with storage.publish_from_workers(vectors.uri_of(settings, ref)) as scratch:
        for shard in catalogue.shards(ref):
            encode.shard(shard, storage.join(scratch, vectors.name_of(shard)))
    torch.manual_seed(0)
    model = recommend.build(base, settings, ref).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    publish_model(model, base, ref)


def publish_model(model: Any, base: Path, ref: DatasetRef) -> None:
    """films@1."""
    from lib.tasks import recommend

    info = TaskFile("recommend", [], 16, str(base), ref.fingerprint)
    with storage.publish(ModelRef("films", 1).uri) as folder:
        recommend.save(model, base, info, folder)
        write_version(folder)


def write_version(folder: Path) -> None:
    """As the registry leaves a model directory."""
    files = {
        str(path.relative_to(folder)): storage.checksum(str(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    storage.write_json(str(folder / VERSION_FILE), {"files": files})
