"""A model over a whole split, on Ray: actors that each hold the engine that will serve it.

The rows go through the task's own `load` and `predict_rows`, from text to logits, so what is measured is
what a client will get: the model's tokeniser, the serving engine, its precision.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import heads, storage
from lib.artifacts import SPLITS, DatasetRef, TaskFile, check_model_directory
from lib.errors import DataError, ResourceError
from lib.evaluation import baselines
from lib.evaluation.baselines import Baseline
from lib.evaluation.metrics import Floats
from lib.heads import Head
from lib.progress import Progress
from lib.settings import EvaluationSettings, ServingSettings, Settings
from lib.tasks import load_task

if TYPE_CHECKING:
    import ray
    from ray.util import ActorPool

# Small enough for a moving progress bar, large enough that batches of like lengths can be formed.
ROWS_AT_ONCE = 512
FEATURES = ("input_ids", "labels", "truncated")


@dataclass(frozen=True)
class Scored:
    """A split, sorted by id, with what one head of the model answered."""

    rows: pa.Table
    """The task's items (`Task.items`): whole rows, or the words in them. Those that have a `label`."""
    probabilities: Floats
    """[N, C'] over the model's own labels."""
    labels: list[str]
    """The model's own labels."""
    engine: str
    rows_per_second: float
    """Rows of the dataset that one actor answered in a second of work, loading not counted."""
    uncalibrated: Floats | None = None
    """`probabilities` as they would be without the model's temperature; None where it has none."""
    temperature: float = 1.0
    head: str = ""
    others: dict[str, Scored] = field(default_factory=dict)
    """The dataset's other heads."""


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

    def logits(self, rows: pa.Table) -> np.ndarray:
        """float32 [N, C'] of the items of rows that lie in no shard."""
        logits: np.ndarray = self.task.predict_rows(self._loaded(), rows)["logits"]
        return logits

    def _loaded(self) -> Any:
        # Loaded here, not above: an error in a method reaches the caller as itself, with its one line.
        if self.predictor is None:
            with storage.local_copy(self.model_uri) as folder:
                self.predictor = self.task.load(folder, self.serving)
        return self.predictor

    def answer(self, part: Part) -> Answers:
        predictor = self._loaded()
        if self.shard is None or self.shard[0] != part.shard:
            self.shard = (part.shard, _read_shard(part.shard))
        rows = self.shard[1].slice(part.start, part.rows)
        began = time.perf_counter()
        logits = self.task.predict_rows(predictor, rows)["logits"]
        seconds = time.perf_counter() - began
        return Answers(self.task.items(rows), logits, len(rows), predictor.encoder.name, seconds)


def read_task(model_uri: str) -> TaskFile:
    """What a model directory is for. Raises ModelError for one that cannot be used."""
    with storage.local_copy(model_uri) as folder:
        check_model_directory(folder)
        return TaskFile.read(folder)


def scorers(model_uri: str, settings: Settings, most: int | None = None) -> ActorPool:
    """Actors for `score` and `answer_rows`, at most `most`. Needs a connection to Ray.

    Raises ModelError for a directory that cannot be used, ResourceError when the cluster is too small for them.
    """
    import ray
    from ray.util import ActorPool

    info = read_task(model_uri)
    # Nobody waits for a single answer here, so the engine may take larger batches than when it serves.
    serving = settings.serving.model_copy(update={"tokens_per_batch": settings.evaluation.tokens_per_batch})
    actor = ray.remote(Scorer).options(num_cpus=serving.cpus_per_replica, num_gpus=serving.gpus_per_replica)
    workers = min(settings.evaluation.workers, most or settings.evaluation.workers)
    check_resources(workers, serving)
    return ActorPool([actor.remote(info.task, model_uri, serving) for _ in range(workers)])


def score(
    model_uri: str, dataset: DatasetRef, split: str, settings: Settings, pool: ActorPool | None = None
) -> Scored:
    """Run a model over a split, with actors of its own unless `pool` is given; the dataset's first head, and
    the `others`.

    Raises DataError for a split without rows, and what `scorers` raises.
    """
    info = read_task(model_uri)
    parts = parts_of(dataset, split)
    pool = pool or scorers(model_uri, settings, most=len(parts))
    total = sum(part.rows for part in parts)
    progress = Progress(total, f"scoring {split}", "rows", sys.stdout.isatty())
    answers: list[Answers] = []
    for some in pool.map_unordered(lambda scorer, part: scorer.answer.remote(part), parts):
        answers.append(some)
        progress.to(progress.done + some.rows)
    progress.close()
    items = pa.concat_tables([some.items for some in answers])
    order = pc.sort_indices(items["id"])
    logits = np.concatenate([some.logits for some in answers]).astype(np.float64)[order.to_numpy()]
    speed = sum(some.rows for some in answers) / sum(some.seconds for some in answers)
    first, *others = (
        _head(items.take(order), logits, wanted, found, answers[0].engine, speed)
        for wanted, found in matched(heads.of_manifest(dataset.manifest()), heads.of_model(info))
    )
    return replace(first, others={other.head: other for other in others})


def answer_rows(pool: ActorPool, tables: Sequence[pa.Table]) -> list[np.ndarray]:
    """The model's logits [N, ΣC'] for the items of each table of a dataset's rows."""
    parts = [
        (place, table.slice(start, ROWS_AT_ONCE))
        for place, table in enumerate(tables)
        for start in range(0, len(table), ROWS_AT_ONCE)
    ]
    found: list[list[np.ndarray]] = [[] for _ in tables]
    answers = pool.map(lambda scorer, part: scorer.logits.remote(part[1]), parts)
    for (place, _), logits in zip(parts, answers, strict=True):
        found[place].append(logits)
    return [np.concatenate(some) for some in found]


def matched(wanted: Sequence[Head], own: Sequence[Head]) -> list[tuple[Head, Head | None]]:
    """Each head of a dataset with the model's of that name; a model or dataset of one head means the first."""
    names = {head.name: head for head in own}
    alike = wanted[0].name == "" or own[0].name == ""
    first = names.get(wanted[0].name) or (own[0] if alike else None)
    return [(wanted[0], first), *((head, names.get(head.name)) for head in wanted[1:])]


def _head(
    items: pa.Table, logits: Floats, wanted: Head, own: Head | None, engine: str, speed: float
) -> Scored:
    """One head's answers to the items that have its label; a head that the model lacks is as unsure as can be."""
    chosen = items[wanted.column].to_numpy() >= 0
    if not chosen.any():
        raise DataError(
            f"no row of the split has a label of the head {wanted.name}; give some in column data.heads.{wanted.name}"
        )
    rows = items.filter(pa.array(chosen))
    labels = rows[wanted.column]
    kept = [name for name in rows.column_names if name != "label" and not name.startswith("label:")]
    rows = rows.select(kept).append_column("label", labels)
    if own is None:
        flat = np.full((len(rows), len(wanted.labels)), 1 / len(wanted.labels))
        return Scored(rows, flat, wanted.labels, engine, speed, head=wanted.name)
    outputs = logits[chosen, own.outputs]
    return Scored(
        rows,
        softmax(outputs / own.temperature),
        own.labels,
        engine,
        speed,
        softmax(outputs) if own.temperature != 1.0 else None,
        own.temperature,
        wanted.name,
    )


def start_baselines(task: str, dataset: DatasetRef, evaluation: EvaluationSettings) -> ray.ObjectRef[Any]:
    """Fit the baselines in a task of its own, while the model is being loaded and run.

    The reference gives head → name → Baseline, items of the test split sorted by id.
    """
    import ray

    shards = {split: dataset.shards(split) for split in SPLITS}
    wanted = heads.of_manifest(dataset.manifest())
    return ray.remote(num_cpus=1)(fit_baselines).remote(task, shards, wanted, evaluation.baseline_rows)


def fit_baselines(
    task: str, shards: dict[str, list[str]], wanted: Sequence[Head], limit: int
) -> dict[str, dict[str, Baseline]]:
    """Both baselines of each head, fitted on at most `limit` evenly spaced training rows. `shards`: split → URIs."""
    kind = load_task(task).BASELINE
    found = {}
    for head in wanted:
        classes = len(head.labels)
        train, validation = (
            read_texts(task, shards[split], limit, head.column) for split in ("train", "validation")
        )
        test, _ = read_texts(task, shards["test"], column=head.column)
        if not train[0]:
            raise DataError(f"no training row has a label of the head {head.name}")
        if kind == "tfidf":
            strong = baselines.tfidf(train, validation, test, classes)
        else:
            strong = baselines.lookup(train, test, classes)
        found[head.name] = {kind: strong, "majority": baselines.majority(train[1], len(test), classes)}
    return found


def read_texts(
    task: str, shards: list[str], most: int | None = None, column: str = "label"
) -> tuple[list[str], np.ndarray]:
    """Texts and labels int64 of a split's items that have a label in `column`, sorted by id; those of at most
    `most` evenly spaced rows."""
    if not shards:
        return [], np.zeros(0, np.int64)
    rows = read_rows(shards)
    if most is not None and len(rows) > most:
        rows = rows.take(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    items = load_task(task).items(rows).sort_by("id")
    items = items.filter(pc.greater_equal(items[column], 0))
    return items["text"].to_pylist(), items[column].to_numpy().astype(np.int64)


def read_rows(shards: Sequence[str]) -> pa.Table:
    """A split's rows without what training alone reads, sorted by id."""
    return pa.concat_tables([_read_shard(shard) for shard in shards]).sort_by("id")


def softmax(logits: Floats) -> Floats:
    """Probabilities [N, C] from logits [N, C]."""
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Floats = exponents / exponents.sum(-1, keepdims=True)
    return shares


def check_resources(workers: int, serving: ServingSettings, key: str = "evaluation.workers") -> None:
    """Ray would wait for ever for an actor that no node can hold. `key` of the configuration says how many."""
    import ray

    has = ray.cluster_resources()
    for kind, each in (("CPU", serving.cpus_per_replica), ("GPU", serving.gpus_per_replica)):
        if workers * each > has.get(kind, 0):
            raise ResourceError(
                f"{workers} scoring actor(s) want {workers * each:g} {kind}, and the cluster has"
                f" {has.get(kind, 0):g}; lower {key} or serving.{kind.lower()}s_per_replica"
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
