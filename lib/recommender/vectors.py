"""The encoder's vectors of a catalogue's texts, computed once on the cluster: what training puts a learned map on.

    vectors/NAME/FINGERPRINT/part-*.npy     float32 [items of the shard, D], a file for each shard of the items

Named by the dataset and by all that the base's vectors depend on: a second run with the same finds them there.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import DatasetRef
from lib.errors import ModelError
from lib.recommender import items
from lib.retrieval.embedding import Embedder, base_checksum
from lib.settings import ServingSettings, Settings

# Part of every name. Raise it when the same texts would get other vectors.
FORMAT = 1
ITEMS_AT_ONCE = 1024


def wanted(settings: Settings) -> bool:
    """Whether training reads them."""
    return settings.task == "recommend" and settings.model.recommender.text == "frozen"


def uri_of(settings: Settings, dataset: DatasetRef) -> str:
    identity = {
        "format": FORMAT,
        "dataset": dataset.fingerprint,
        "base": base_checksum(settings.model.base),
    }
    return storage.join(storage.root(), "vectors", dataset.name, storage.fingerprint(identity))


def make(settings: Settings, dataset: DatasetRef) -> str:
    """Compute them on the connected cluster, unless they are there; where they lie.

    Raises ModelError for a base that is no encoder.
    """
    import ray
    from ray.util import ActorPool

    uri = uri_of(settings, dataset)
    if storage.published(uri):
        return uri
    training, shards = settings.training, items.shards(dataset)
    workers = min(training.least_workers, len(shards))
    print("the encoder's vectors of the catalogue's texts", flush=True)
    actor = ray.remote(Encode).options(num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker)
    pool = ActorPool([actor.remote(settings) for _ in range(workers)])
    with storage.publish_from_workers(uri) as scratch:
        parts = [(shard, storage.join(scratch, name_of(shard))) for shard in shards]
        for _ in pool.map_unordered(lambda a, part: a.shard.remote(*part), parts):
            pass
    return uri


def read(settings: Settings, dataset: DatasetRef) -> np.ndarray:
    """float32 [N, D]. Raises ModelError when they were never computed."""
    uri = uri_of(settings, dataset)
    if not storage.published(uri):
        raise ModelError(
            f"no text vectors of dataset {dataset.name}/{dataset.fingerprint}; train it with jobs.finetune"
        )
    parts = []
    for shard in items.shards(dataset):
        with storage.open_file(storage.join(uri, name_of(shard))) as file:
            parts.append(np.load(io.BytesIO(file.read()), allow_pickle=False))
    return np.concatenate(parts)


def name_of(shard: str) -> str:
    """The file of the vectors of a shard of items."""
    return shard.rsplit("/", 1)[-1].replace(".parquet", ".npy")


class Encode:
    """An actor: the encoder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._embedder: Any = None

    def shard(self, source: str, destination: str) -> None:
        """Write the vectors of one shard of items."""
        if self._embedder is None:
            training = self._settings.training
            engine = ServingSettings(
                gpus_per_replica=training.gpus_per_worker,
                threads=max(1, math.floor(training.cpus_per_worker)),
            )
            self._embedder = Embedder(self._settings.model.base, engine)
        with storage.open_file(source) as file:
            column = pq.read_table(file, columns=["input_ids"])["input_ids"].combine_chunks()
        rows = [np.asarray(ids.values, np.int32) for ids in column]
        parts = [
            self._embedder.encoder.vectors(rows[start : start + ITEMS_AT_ONCE])
            for start in range(0, len(rows), ITEMS_AT_ONCE)
        ]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(parts).astype(np.float32))
        with storage.open_file(destination, "wb") as file:
            file.write(buffer.getvalue())
