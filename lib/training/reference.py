"""What the base says to the training rows before anything is learned, computed once: DPO's reference.

The log-probabilities become columns of a dataset beside the one they are of, named by that dataset, the base's
weights and the precision: a second run with the same finds them there. During training no second model is in memory.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.util import ActorPool

from lib import storage
from lib.artifacts import DatasetRef
from lib.base_models import base_directory
from lib.errors import StorageError
from lib.progress import Progress
from lib.settings import Settings
from lib.tasks import load_task
from lib.tasks.preference import FEATURES, REFERENCES, collate, log_probabilities
from lib.training import batches, zero

# Part of every name. Raise it when the same model and rows would give other figures.
FORMAT = 1
READ_BY_TRAINING = ("train", "validation")
ROWS_AT_ONCE = 256


def wanted(settings: Settings) -> bool:
    """Whether the task trains against a reference."""
    return bool(getattr(load_task(settings.task), "REFERENCE", False))


def with_reference(settings: Settings, dataset: DatasetRef) -> DatasetRef:
    """The dataset that training reads: the same train and validation rows, with the base's log-probabilities.

    Needs a connection to Ray. Raises ModelError for a base that cannot be used.
    """
    ref = named(settings, dataset)
    if ref.exists():
        return ref
    manifest = dataset.manifest()
    splits = {
        split: counts if split in READ_BY_TRAINING else {**counts, "rows": 0, "tokens": 0, "shards": []}
        for split, counts in manifest["splits"].items()
    }
    try:
        with storage.publish_from_workers(ref.uri) as uri:
            _write(settings, dataset, uri)
            changed = {**manifest, "fingerprint": ref.fingerprint, "reference_of": dataset.fingerprint}
            storage.write_json(storage.join(uri, "manifest.json"), {**changed, "splits": splits})
    except StorageError:
        if not ref.exists():  # another trial of a search may have been quicker
            raise
    return ref


def named(settings: Settings, dataset: DatasetRef) -> DatasetRef:
    """Where the dataset with the reference lies, from all that its figures depend on."""
    folder = base_directory(settings.model.base)
    weights = [storage.checksum(str(file)) for file in sorted(folder.glob("*.safetensors"))]
    identity = {
        "format": FORMAT,
        "dataset": dataset.fingerprint,
        "weights": weights,
        "precision": settings.training.precision,
        "gpu": settings.training.gpus_per_worker > 0,
    }
    return DatasetRef(dataset.name, storage.fingerprint(identity))


def _write(settings: Settings, dataset: DatasetRef, uri: str) -> None:
    training, shards = settings.training, {split: dataset.shards(split) for split in READ_BY_TRAINING}
    parts = [
        (shard, start)
        for uris in shards.values()
        for shard in uris
        for start in range(0, _rows(shard), ROWS_AT_ONCE)
    ]
    if not parts:
        return
    print("the base's log-probabilities of both answers", flush=True)
    workers = min(training.least_workers, len(parts))
    actor = ray.remote(Reference).options(
        num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker
    )
    pool = ActorPool([actor.remote(settings) for _ in range(workers)])
    progress = Progress(len(parts) * ROWS_AT_ONCE, "reference", "rows", terminal=False)
    found: dict[str, dict[int, np.ndarray]] = {}
    for shard, start, values in pool.map_unordered(lambda a, part: a.score.remote(*part), parts):
        found.setdefault(shard, {})[start] = values
        progress.to(progress.done + ROWS_AT_ONCE)
    progress.close()
    write = ray.remote(num_cpus=training.cpus_per_worker)(write_shard)
    ray.get(
        [
            write.remote(shard, storage.join(uri, split, shard.rsplit("/", 1)[-1]), _joined(found[shard]))
            for split, uris in shards.items()
            for shard in uris
        ]
    )


def _joined(parts: dict[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([parts[start] for start in sorted(parts)], axis=1)


class Reference:
    """An actor: the base, in the precision in which the model will be trained."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model: Any = None

    def score(self, shard: str, start: int) -> tuple[str, int, np.ndarray]:
        """Log-probabilities float32 [2, rows] of a shard's rows from `start` on: chosen, rejected."""
        if self.model is None:
            self.model = self._load()
        training = self.settings.training
        columns = [name for names in FEATURES.values() for name in names]
        with storage.open_file(shard) as file:
            rows = pq.read_table(file, columns=[*columns, "length"]).slice(start, ROWS_AT_ONCE)
        values = np.zeros((2, rows.num_rows), np.float32)
        pad = int(getattr(self.model.config, "pad_token_id", None) or 0)
        for group in batches.cut(rows["length"].to_numpy(), training.tokens_per_batch):
            batch = collate(rows.take(pa.array(group)), pad)
            device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            with torch.inference_mode():
                values[:, group] = log_probabilities(self.model, device)[0].float().cpu().numpy()
        return shard, start, values

    def _load(self) -> Any:
        training = self.settings.training
        torch.set_num_threads(max(1, math.floor(training.cpus_per_worker)))
        model = load_task(self.settings.task).build(base_directory(self.settings.model.base), self.settings)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            zero.precision(training)
        ]
        return model.to(device="cuda" if training.gpus_per_worker else "cpu", dtype=kind).eval()


def write_shard(source: str, destination: str, values: np.ndarray) -> None:
    """Runs in a task: a shard with the reference's columns; `values` float32 [2, rows]."""
    with storage.open_file(source) as file:
        rows = pq.read_table(file)
    for name, column in zip(REFERENCES.values(), values, strict=True):
        rows = rows.append_column(name, pa.array(column))
    with storage.open_file(destination, "wb") as file:
        pq.write_table(rows, file, compression="zstd")


def _rows(shard: str) -> int:
    with storage.open_file(shard) as file:
        return int(pq.ParquetFile(file).metadata.num_rows)
