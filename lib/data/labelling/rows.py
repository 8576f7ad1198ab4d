"""The second pass, a block at a time: what rules, models and people say of rows, their labels, and tasks of the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from lib import storage
from lib.data import blocks
from lib.data.alike import dedup
from lib.data.labelling import rules, studio
from lib.data.labelling.deciding import TIE, Decided, Opinion, decide
from lib.data.labelling.models import Model, models_of
from lib.data.labelling.plan import ROWS, Planned
from lib.data.labelling.rules import Voters
from lib.data.splitting import split
from lib.errors import WhorlError
from lib.labels import MISSING, UNKNOWN
from lib.text import is_empty, normalise


@dataclass(frozen=True)
class Fitted:
    """What the first pass has taught."""

    accuracies: tuple[np.ndarray, ...]
    """Of each head: those of its rules."""
    temperatures: dict[tuple[str, int], float] = field(default_factory=dict)
    """Model and head → by what its logits are divided."""


def seen(rows: pa.Table) -> tuple[pa.Array, list[str], np.ndarray]:
    """Texts as models see them, their ids, and which of them say nothing."""
    texts = normalise(blocks.flat(rows["text"]))
    high, _ = dedup.hash_texts(texts)
    return texts, dedup.row_ids(high).to_pylist(), is_empty(texts)


def gold_of(planned: Planned, rows: pa.Table) -> np.ndarray:
    """int [rows, heads]: the classes that the source has."""
    found = np.full((rows.num_rows, len(planned.heads)), MISSING)
    for place, (column, mapping) in planned.gold.items():
        found[:, place] = mapping.apply(blocks.flat(rows[column]))
    return found


def ask(models: Sequence[Model], texts: list[str]) -> dict[tuple[str, int], np.ndarray]:
    """Model and head → logits float64 [texts, classes]."""
    return {
        (model.name, place): values for model in models for place, values in enumerate(model.logits(texts))
    }


def actors(planned: Planned) -> dict[str, Any]:
    """How Ray Data runs what asks models."""
    encoder, chat = planned.label.embedding, planned.label.chat
    workers = max(encoder.workers if encoder else 1, chat.workers if chat else 1)
    return {
        "batch_size": None,
        "batch_format": "pyarrow",
        "compute": ray.data.ActorPoolStrategy(size=workers),
        "num_cpus": encoder.cpus_per_worker if encoder else 1,
        "num_gpus": encoder.gpus_per_worker if encoder else 0,
    }


def opinions(
    planned: Planned,
    fitted: Fitted,
    place: int,
    speaks: np.ndarray,
    logits: dict[tuple[str, int], np.ndarray],
) -> list[Opinion]:
    """What rules and models say of a head, from which rules speak, bool [rows, rules]."""
    voters = Voters.of(planned.label.rules, planned.heads[place])
    found = []
    if voters.places:
        own = speaks[:, voters.places]
        likely = voters.probabilities(own, fitted.accuracies[place])
        found.append(Opinion("rules", likely, np.asarray(own.any(1))))
    for (name, of), values in logits.items():
        if of == place:
            temperature = fitted.temperatures.get((name, place), 1.0)
            found.append(Opinion.of_logits(name, values, temperature))
    return found


class Labeller:
    """An actor: labels blocks by rules and models."""

    def __init__(self, planned: Planned, fitted: Fitted, uri: str) -> None:
        self._planned, self._fitted, self._uri = planned, fitted, uri
        self._models = models_of(planned.label, planned.heads, planned.key)

    def __call__(self, row: pa.Table, decided: tuple[Any]) -> pa.Table:
        try:
            return label_block(row, self._planned, self._fitted, self._uri, decided, self._models)
        except WhorlError as error:  # Ray Data would wrap it so that its kind is lost
            return pa.table({"counts": [json.dumps({"problem": str(error)})]})


def label_block(
    row: pa.Table,
    planned: Planned,
    fitted: Fitted,
    uri: str,
    decided: tuple[Any],
    models: Sequence[Model] = (),
) -> pa.Table:
    """Runs in a task or an actor: the labelled rows of one block as a shard; counts and tasks. `decided` refers to what people
    have said."""
    block = blocks.from_row(row, list(planned.reading.columns))
    if block.problem:
        return pa.table({"counts": [json.dumps({"problem": block.problem})]})
    texts, ids, empty = seen(block.rows)
    gold = gold_of(planned, block.rows)
    gold[gold == UNKNOWN] = MISSING
    answered, shares = _people(ray.get(decided[0]), ids, len(planned.heads))
    asked = np.flatnonzero(~empty & ~((gold.T >= 0) | (answered >= 0)).all(0))
    speaks = rules.spoken(texts, planned.label.rules)
    logits = _answers(models, texts, asked)
    heads = [
        decide(
            opinions(planned, fitted, place, speaks, logits),
            gold[:, place],
            answered[place],
            shares[place],
            planned.label.threshold,
        )
        for place in range(len(planned.heads))
    ]
    sure = np.stack([head.sure for head in heads]) & ~empty
    shards = []
    if sure.any():
        shard = f"part-{block.fragment:05d}-{block.number:05d}.parquet"
        with storage.open_file(storage.join(uri, ROWS, shard), "wb") as file:
            pq.write_table(_written(planned, block.rows, heads, sure), file, compression="zstd")
        shards.append(shard)
    unsure = ~sure.all(0) & ~empty
    confidence = _unsure(heads, sure)
    why = np.stack([head.why for head in heads])[confidence.argmin(0), np.arange(len(ids))]
    counts = {
        "rows": len(ids),
        "written": int(sure.any(0).sum()),
        "shards": shards,
        **_by_head(planned, heads, sure),
        "why": _counted(why[unsure]),
        "known": sorted({ids[i] for i in np.flatnonzero((answered != MISSING).any(0)).tolist()}),
        "tasks": _tasks(planned, block.rows, ids, heads, confidence, why, np.flatnonzero(unsure)),
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _people(
    said: dict[str, list[tuple[int, float]]], ids: list[str], heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """What people have decided of rows (`studio.Annotations.decided`): classes int and shares float64, [heads, rows] both."""
    nothing = [(MISSING, 0.0)] * heads
    found = np.array([said.get(name, nothing) for name in ids], float).reshape(len(ids), heads, 2)
    return found[:, :, 0].T.astype(int), found[:, :, 1].T


def _by_head(planned: Planned, heads: Sequence[Decided], sure: np.ndarray) -> dict[str, Any]:
    """Who has labelled how many rows, and which labels they have, by head."""
    by, labels = {}, {}
    for place, head in enumerate(heads):
        known = np.array(planned.heads[place].labels, object)
        name = studio.control(planned.heads[place])
        by[name] = _counted(head.by[sure[place]])
        labels[name] = _counted(known[head.label[sure[place]]])
    return {"by": by, "labels": labels}


def _answers(
    models: Sequence[Model], texts: pa.Array, asked: np.ndarray
) -> dict[tuple[str, int], np.ndarray]:
    """Logits of all rows, NaN for those that nobody is asked about."""
    found = {}
    for key, values in ask(models, texts.take(pa.array(asked)).to_pylist()).items():
        whole = np.full((len(texts), values.shape[1]), np.nan)
        whole[asked] = values
        found[key] = whole
    return found


def _written(planned: Planned, rows: pa.Table, heads: Sequence[Decided], sure: np.ndarray) -> pa.Table:
    """Rows of which something is sure; what is not sure of them is null."""
    table = {"text": rows["text"]}
    for column, name in planned.carried.items():
        table[column] = _hashed(rows[name]) if name == split.GROUP else rows[name]
    for place, head in enumerate(heads):
        label, confidence, by = planned.columns(place)
        missing = ~sure[place]
        names = np.array([*planned.heads[place].labels, None], object)[np.where(missing, -1, head.label)]
        table[label] = pa.array(names, pa.string())
        table[confidence] = pa.array(np.round(head.confidence, 4), pa.float64(), mask=missing)
        table[by] = pa.array(head.by, pa.string(), mask=missing)
    return pa.table(table).filter(pa.array(sure.any(0)))


def _hashed(groups: pa.ChunkedArray) -> pa.Array:
    """Whose a row is, so that nobody can read it, but equals are known."""
    high, _ = dedup.hash_texts(blocks.flat(groups))
    return pc.if_else(pc.is_null(blocks.flat(groups)), pa.scalar(None, pa.string()), dedup.row_ids(high))


def _tasks(
    planned: Planned,
    rows: pa.Table,
    ids: list[str],
    heads: Sequence[Decided],
    confidence: np.ndarray,
    why: np.ndarray,
    unsure: np.ndarray,
) -> list[tuple[float, dict[str, Any]]]:
    """The least sure rows of a block, each text once, as tasks."""
    least = confidence.min(0)
    order = sorted(unsure.tolist(), key=lambda i: (least[i], ids[i]))
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for i in order:
        if len(found) == planned.label.tasks:
            break
        if ids[i] in found:
            continue
        predicted = [
            (planned.heads[place], planned.heads[place].labels[head.label[i]], float(head.confidence[i]))
            for place, head in enumerate(heads)
            if head.label[i] != MISSING
        ]
        task = studio.task(ids[i], rows["text"][i].as_py(), why[i], predicted)
        found[ids[i]] = (float(least[i]), task)
    return list(found.values())


def _unsure(heads: Sequence[Decided], sure: np.ndarray) -> np.ndarray:
    """float64 [heads, rows]: confidence of what is not sure, below all others where people disagree; 2 for what is sure."""
    each = np.stack([np.where(head.why == TIE, -1.0, head.confidence) for head in heads])
    least: np.ndarray = np.where(sure, 2.0, each)
    return least


def _counted(values: np.ndarray) -> dict[str, int]:
    return dict(sorted(Counter(values.tolist()).items()))
