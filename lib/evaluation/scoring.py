"""A model over a whole split, on Ray: actors that each hold the engine that will serve it.

The rows go through the task's own `load` and `predict_rows`, from text to logits, so what is measured is
what a client will get: the model's tokeniser, the serving engine, its precision.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import DatasetRef, TaskFile, check_model_directory
from lib.errors import DataError
from lib.evaluation import baselines
from lib.evaluation.baselines import Baseline
from lib.evaluation.metrics import Floats
from lib.settings import EvaluationSettings, ServingSettings, Settings
from lib.tasks import load_task

if TYPE_CHECKING:
    import ray

# Small enough for a moving progress bar, large enough that batches of like lengths can be formed.
ROWS_AT_ONCE = 512
FEATURES = ("input_ids", "truncated")


@dataclass(frozen=True)
class Scored:
    """A split, sorted by id, with what the model answered."""

    rows: pa.Table
    """The dataset's columns except the token ids."""
    probabilities: Floats
    """[N, C'] over the model's own labels."""
    labels: list[str]
    """The model's own labels."""
    engine: str
    rows_per_second: float
    """Rows that one actor answered in a second of work, loading not counted."""


class Scorer:
    """An actor of `score`: loads the model once, then answers block after block."""

    def __init__(self, task: str, model_uri: str, serving: ServingSettings) -> None:
        self.task = load_task(task)
        with storage.local_copy(model_uri) as folder:
            self.predictor = self.task.load(folder, serving)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Add `logits` list<float> and, on each row, the engine and the seconds the row took."""
        began = time.perf_counter()
        logits = np.asarray(self.task.predict_rows(self.predictor, rows)["logits"], np.float32)
        seconds = (time.perf_counter() - began) / len(rows)
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * logits.shape[1]
        rows = rows.append_column(
            "logits", pa.ListArray.from_arrays(pa.array(offsets), pa.array(logits.ravel()))
        )
        rows = rows.append_column("engine", pa.array([self.predictor.encoder.name] * len(rows)))
        return rows.append_column("seconds", pa.array(np.full(len(rows), seconds)))


def read_task(model_uri: str) -> TaskFile:
    """What a model directory is for. Raises ModelError for one that cannot be used."""
    with storage.local_copy(model_uri) as folder:
        check_model_directory(folder)
        return TaskFile.read(folder)


def score(model_uri: str, dataset: DatasetRef, split: str, settings: Settings) -> Scored:
    """Run a model over a split. Needs a connection to Ray.

    Raises DataError for a split without rows, ModelError for a directory that cannot be used.
    """
    import ray

    info = read_task(model_uri)
    shards = _shards(dataset, split)
    fs, _ = storage.filesystem(shards[0])
    columns = [c for c in _columns(shards[0]) if c not in FEATURES]
    serving = _serving(settings)
    scored = ray.data.read_parquet(shards, filesystem=fs, columns=columns).map_batches(
        Scorer,
        fn_constructor_args=(info.task, model_uri, serving),
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=settings.evaluation.workers),
        num_cpus=serving.cpus_per_replica,
        num_gpus=serving.gpus_per_replica or None,
    )
    rows = pa.concat_tables(cast("list[pa.Table]", ray.get(scored.to_arrow_refs()))).sort_by("id")
    logits = rows["logits"].combine_chunks().flatten().to_numpy().reshape(len(rows), len(info.labels))
    return Scored(
        rows=rows.drop_columns(["logits", "engine", "seconds"]),
        probabilities=softmax(logits.astype(np.float64)),
        labels=info.labels,
        engine=rows["engine"][0].as_py(),
        rows_per_second=len(rows) / float(np.sum(rows["seconds"].to_numpy())),
    )


def start_baselines(dataset: DatasetRef, classes: int, evaluation: EvaluationSettings) -> ray.ObjectRef[Any]:
    """Fit the baselines in a task of its own, while the model is being loaded and run.

    The reference gives name → Baseline, rows of the test split sorted by id.
    """
    import ray

    return ray.remote(num_cpus=1)(fit_baselines).remote(dataset, classes, evaluation.baseline_rows)


def fit_baselines(dataset: DatasetRef, classes: int, limit: int) -> dict[str, Baseline]:
    """Both baselines, fitted on at most `limit` evenly spaced training rows."""
    train, validation, test = (
        read_texts(dataset, split, most)
        for split, most in (("train", limit), ("validation", limit), ("test", None))
    )
    return {
        "tfidf": baselines.tfidf(train, validation, test[0], classes),
        "majority": baselines.majority(train[1], len(test[0]), classes),
    }


def read_texts(dataset: DatasetRef, split: str, most: int | None = None) -> tuple[list[str], np.ndarray]:
    """Texts and labels int64 of a split, sorted by id; at most `most`, evenly spaced."""
    shards = dataset.shards(split)
    if not shards:
        return [], np.zeros(0, np.int64)
    fs, _ = storage.filesystem(shards[0])
    paths = [storage.filesystem(shard)[1] for shard in shards]
    rows = pq.read_table(paths, filesystem=fs, columns=["id", "text", "label"]).sort_by("id")
    if most is not None and len(rows) > most:
        rows = rows.take(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    return rows["text"].to_pylist(), rows["label"].to_numpy().astype(np.int64)


def softmax(logits: Floats) -> Floats:
    """Probabilities [N, C] from logits [N, C]."""
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Floats = exponents / exponents.sum(-1, keepdims=True)
    return shares


def _shards(dataset: DatasetRef, split: str) -> list[str]:
    rows = dataset.manifest()["splits"].get(split, {}).get("rows", 0)
    if not rows:
        raise DataError(
            f"the {split} split of {dataset.name}/{dataset.fingerprint} has no rows;"
            f" raise data.split.{split} or data.limit and run python -m jobs.preprocess again"
        )
    return dataset.shards(split)


def _columns(shard: str) -> list[str]:
    fs, inside = storage.filesystem(shard)
    return list(pq.read_schema(inside, filesystem=fs).names)


def _serving(settings: Settings) -> ServingSettings:
    """Serving's engine with evaluation's batch size: nobody waits for a single answer here."""
    return settings.serving.model_copy(update={"tokens_per_batch": settings.evaluation.tokens_per_batch})
