"""A model over a whole split, on Ray: actors that each hold the engine that will serve it.

The rows go through the task's own `load` and `predict_rows`, from text to logits, so what is measured is
what a client will get: the model's tokeniser, the serving engine, its precision.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import SPLITS, DatasetRef, TaskFile, check_model_directory
from lib.errors import DataError, ResourceError
from lib.evaluation import baselines
from lib.evaluation.baselines import Baseline
from lib.evaluation.metrics import Floats
from lib.progress import Progress
from lib.settings import EvaluationSettings, ServingSettings, Settings
from lib.tasks import load_task

if TYPE_CHECKING:
    import ray

# Small enough for a moving progress bar, large enough that batches of like lengths can be formed.
ROWS_AT_ONCE = 512
FEATURES = ("input_ids", "labels", "truncated")


@dataclass(frozen=True)
class Scored:
    """A split, sorted by id, with what the model answered."""

    rows: pa.Table
    """The task's items (`Task.items`): whole rows, or the words in them."""
    probabilities: Floats
    """[N, C'] over the model's own labels."""
    labels: list[str]
    """The model's own labels."""
    engine: str
    rows_per_second: float
    """Rows of the dataset that one actor answered in a second of work, loading not counted."""


@dataclass(frozen=True)
class Part:
    """Rows `start` to `start + rows` of one shard: what an actor is given at a time."""

    shard: str
    start: int
    rows: int


@dataclass(frozen=True)
class Answers:
    """What the model says to the rows of a part."""

    items: pa.Table
    logits: np.ndarray
    """float32 [N, C']"""
    rows: int
    engine: str
    seconds: float


class Scorer:
    """An actor of `score`: holds the model, and the shard that it read last."""

    def __init__(self, task: str, model_uri: str, serving: ServingSettings) -> None:
        self.task, self.model_uri, self.serving = load_task(task), model_uri, serving
        self.predictor: Any = None
        self.shard: tuple[str, pa.Table] | None = None

    def answer(self, part: Part) -> Answers:
        # Loaded here, not above: an error in a method reaches the caller as itself, with its one line.
        if self.predictor is None:
            with storage.local_copy(self.model_uri) as folder:
                self.predictor = self.task.load(folder, self.serving)
        if self.shard is None or self.shard[0] != part.shard:
            self.shard = (part.shard, _read_shard(part.shard))
        rows = self.shard[1].slice(part.start, part.rows)
        began = time.perf_counter()
        logits = self.task.predict_rows(self.predictor, rows)["logits"]
        seconds = time.perf_counter() - began
        return Answers(self.task.items(rows), logits, len(rows), self.predictor.encoder.name, seconds)


def read_task(model_uri: str) -> TaskFile:
    """What a model directory is for. Raises ModelError for one that cannot be used."""
    with storage.local_copy(model_uri) as folder:
        check_model_directory(folder)
        return TaskFile.read(folder)


def score(model_uri: str, dataset: DatasetRef, split: str, settings: Settings) -> Scored:
    """Run a model over a split. Needs a connection to Ray.

    Raises DataError for a split without rows, ModelError for a directory that cannot be used,
    ResourceError when the cluster is too small for the actors.
    """
    import ray
    from ray.util import ActorPool

    info = read_task(model_uri)
    parts = parts_of(dataset, split)
    # Nobody waits for a single answer here, so the engine may take larger batches than when it serves.
    serving = settings.serving.model_copy(update={"tokens_per_batch": settings.evaluation.tokens_per_batch})
    actor = ray.remote(Scorer).options(num_cpus=serving.cpus_per_replica, num_gpus=serving.gpus_per_replica)
    workers = min(settings.evaluation.workers, len(parts))
    check_resources(workers, serving)
    pool = ActorPool([actor.remote(info.task, model_uri, serving) for _ in range(workers)])
    total = sum(part.rows for part in parts)
    progress = Progress(total, f"scoring {split}", "rows", sys.stdout.isatty())
    answers: list[Answers] = []
    for some in pool.map_unordered(lambda scorer, part: scorer.answer.remote(part), parts):
        answers.append(some)
        progress.to(progress.done + some.rows)
    progress.close()
    items = pa.concat_tables([some.items for some in answers])
    order = pc.sort_indices(items["id"])
    logits = np.concatenate([some.logits for some in answers]).astype(np.float64)
    return Scored(
        rows=items.take(order),
        probabilities=softmax(logits[order.to_numpy()]),
        labels=info.labels,
        engine=answers[0].engine,
        rows_per_second=sum(some.rows for some in answers) / sum(some.seconds for some in answers),
    )


def start_baselines(
    task: str, dataset: DatasetRef, classes: int, evaluation: EvaluationSettings
) -> ray.ObjectRef[Any]:
    """Fit the baselines in a task of its own, while the model is being loaded and run.

    The reference gives name → Baseline, items of the test split sorted by id.
    """
    import ray

    shards = {split: dataset.shards(split) for split in SPLITS}
    return ray.remote(num_cpus=1)(fit_baselines).remote(task, shards, classes, evaluation.baseline_rows)


def fit_baselines(task: str, shards: dict[str, list[str]], classes: int, limit: int) -> dict[str, Baseline]:
    """Both baselines, fitted on at most `limit` evenly spaced training rows. `shards`: split → URIs."""
    train, validation = (read_texts(task, shards[split], limit) for split in ("train", "validation"))
    test, _ = read_texts(task, shards["test"])
    kind = load_task(task).BASELINE
    if kind == "tfidf":
        strong = baselines.tfidf(train, validation, test, classes)
    else:
        strong = baselines.lookup(train, test, classes)
    return {kind: strong, "majority": baselines.majority(train[1], len(test), classes)}


def read_texts(task: str, shards: list[str], most: int | None = None) -> tuple[list[str], np.ndarray]:
    """Texts and labels int64 of a split's items, sorted by id; those of at most `most` evenly spaced rows."""
    if not shards:
        return [], np.zeros(0, np.int64)
    rows = pa.concat_tables([_read_shard(shard) for shard in shards]).sort_by("id")
    if most is not None and len(rows) > most:
        rows = rows.take(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    items = load_task(task).items(rows).sort_by("id")
    return items["text"].to_pylist(), items["label"].to_numpy().astype(np.int64)


def softmax(logits: Floats) -> Floats:
    """Probabilities [N, C] from logits [N, C]."""
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Floats = exponents / exponents.sum(-1, keepdims=True)
    return shares


def check_resources(workers: int, serving: ServingSettings) -> None:
    """Ray would wait for ever for an actor that no node can hold."""
    import ray

    has = ray.cluster_resources()
    for kind, each in (("CPU", serving.cpus_per_replica), ("GPU", serving.gpus_per_replica)):
        if workers * each > has.get(kind, 0):
            raise ResourceError(
                f"{workers} scoring actor(s) want {workers * each:g} {kind}, and the cluster has"
                f" {has.get(kind, 0):g}; lower evaluation.workers or serving.{kind.lower()}s_per_replica"
            )


def parts_of(dataset: DatasetRef, split: str, size: int = ROWS_AT_ONCE) -> list[Part]:
    """A split in pieces of at most `size` rows. Raises DataError when it has none."""
    found = []
    for shard in dataset.shards(split):
        fs, inside = storage.filesystem(shard)
        rows = pq.read_metadata(inside, filesystem=fs).num_rows
        starts = range(0, rows, size)
        found += [Part(shard, start, min(size, rows - start)) for start in starts]
    if not found:
        raise DataError(
            f"the {split} split of {dataset.name}/{dataset.fingerprint} has no rows;"
            f" raise data.split.{split} or data.limit and run python -m jobs.preprocess again"
        )
    return found


def _read_shard(shard: str) -> pa.Table:
    fs, inside = storage.filesystem(shard)
    columns = [name for name in pq.read_schema(inside, filesystem=fs).names if name not in FEATURES]
    return pq.read_table(inside, filesystem=fs, columns=columns)
