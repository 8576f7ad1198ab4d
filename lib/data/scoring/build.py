"""Files scored by a registered model, on Ray Data: actors that each hold the predictor which serving uses.

Rows are read as `jobs.preprocess` reads them, in blocks of `score.rows_per_shard`; the actor that scores a block
writes its shard. Each row of the source is a row of the scores: a bad one has no answer, but says why.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lib import storage, tracking
from lib.data import blocks
from lib.data.scoring.grounded import grounded, prompter_of
from lib.data.scoring.plan import FORMAT, MANIFEST, Planned
from lib.data.scoring.shards import BAD_SHOWN, asked_of, kept_of, shard_name, write_shard
from lib.errors import DataError
from lib.tasks import Asked, Task, load_task

if TYPE_CHECKING:
    import ray.data

    from lib.retrieval.prompt import Prompter

# Rows that the predictor is given at a time: enough that batches of like lengths can be formed.
ROWS_AT_ONCE = 512
SAY_SECONDS = 10

OpenModel = Callable[[], AbstractContextManager[Path]]


def run(planned: Planned, open_model: OpenModel, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Score on the connected Ray cluster and publish; the manifest. `open_model` gives a model's local directory
    and is pickled; `say` gets progress lines.

    Raises DataError, in one line, for what cannot be read or too many bad rows; then nothing is published.
    """
    with storage.publish_from_workers(planned.uri) as uri:
        began = time.monotonic()
        total = _scored(planned, open_model, uri, say)
        _check(planned, total, uri)
        manifest = _manifest(planned, total, time.monotonic() - began)
        storage.write_json(storage.join(uri, MANIFEST), manifest)
    return manifest


@dataclass
class Total:
    """What was scored."""

    rows: int
    bad: list[tuple[int, str]]
    """Position of the first bad rows of each block, and what is wrong with them."""
    bad_rows: int
    tallies: dict[str, Counter[str]]
    files: Counter[int]
    """Index of the file → rows."""
    shards: list[str]
    engine: str
    redacted: Counter[str]
    """Kind → values, once a row; `rows` that had any."""


def _scored(planned: Planned, open_model: OpenModel, uri: str, say: Callable[[str], None]) -> Total:
    from lib.data.stream import rows_of

    total, said = Total(0, [], 0, {}, Counter(), [], "", Counter()), time.monotonic()
    with ExitStack() as files:
        if planned.engine == "vllm":
            from lib.data.scoring import vllm

            counts = vllm.answered(planned, files.enter_context(open_model()), uri)
        else:
            counts = _by_predictor(planned, open_model, uri)
        for row in rows_of(counts):
            _add(total, json.loads(row["counts"]))
            if time.monotonic() - said > SAY_SECONDS and not sys.stdout.isatty():
                said = time.monotonic()
                say(f"scored {total.rows:,} rows")
    return total


def _by_predictor(planned: Planned, open_model: OpenModel, uri: str) -> ray.data.Dataset:
    import ray.data

    from lib.data.stream import source

    settings = planned.settings
    return source(planned.reading, planned.texts, planned.rules, "score").map_batches(
        Scorer,
        fn_constructor_args=(planned, open_model, uri),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=settings.score.workers),
        num_cpus=settings.serving.cpus_per_replica,
        num_gpus=settings.serving.gpus_per_replica,
    )


def _add(total: Total, block: dict[str, Any]) -> None:
    total.rows += block["rows"]
    total.bad_rows += block["bad_rows"]
    total.bad += [(position, why) for position, why in block["bad"]]
    total.files.update({int(index): rows for index, rows in block["files"].items()})
    for name, counts in block["tallies"].items():
        total.tallies.setdefault(name, Counter()).update(counts)
    total.shards.append(block["shard"])
    total.engine = block["engine"]
    total.redacted.update(block["redacted"])


class Scorer:
    """An actor of Ray Data: scores blocks and writes their shards."""

    def __init__(self, planned: Planned, open_model: OpenModel, uri: str) -> None:
        self._planned, self._open_model, self._uri = planned, open_model, uri
        self._task: Task = load_task(planned.task)
        self._predictor: Any = None
        self._prompter: Prompter | None = None

    def __call__(self, row: pa.Table) -> pa.Table:
        """A packed block → one row `counts`, JSON, of what `write_shard` gives."""
        planned = self._planned
        block = blocks.from_row(row, list(planned.reading.columns))
        if block.problem:
            raise DataError(block.problem)
        if not block.rows.num_rows:
            return pa.table({"counts": pa.array([], pa.string())})
        asked = asked_of(planned, block.rows)
        answers, bad = self._grounded(asked) if planned.knowledge else self._answers(asked)
        positions = block.rows[blocks.POSITION].to_numpy()
        kept = kept_of(planned, block.rows)
        counts = write_shard(planned, self._uri, shard_name(block), positions, kept, asked.rows, answers, bad)
        counts["engine"] = getattr(self._predictor, "encoder", self._predictor).name
        counts["redacted"] = blocks.redacted_of(row)
        return pa.table({"counts": [json.dumps(counts)]})

    def _grounded(self, asked: Asked) -> tuple[pa.Table, dict[int, str]]:
        self._loaded()
        assert self._prompter is not None
        found = grounded(self._planned, asked, self._prompter)
        # No row that was answered already is asked; it is not bad for that.
        answers, bad = self._answers(replace(found.asked, bad=found.asked.bad | found.said))
        return found.answered(answers), {i: why for i, why in bad.items() if i not in found.said}

    def _answers(self, asked: Asked) -> tuple[pa.Table, dict[int, str]]:
        """Answers to all rows, nulls to bad ones, and which those are: the model may refuse some more."""
        predictor, settings = self._loaded(), self._planned.settings.score
        size, bad = len(asked.inputs), dict(asked.bad)
        places = [i for i in range(size) if i not in bad]
        tables = []
        for start in range(0, max(len(places), 1), ROWS_AT_ONCE):  # once with none, for the columns
            some = places[start : start + ROWS_AT_ONCE]
            table, refused = self._task.score(predictor, [asked.inputs[i] for i in some], settings)
            bad |= {some[i]: why for i, why in refused.items()}
            tables.append(table)
        index = np.full(size, -1)
        index[places] = np.arange(len(places))
        return pa.concat_tables(tables).take(pa.array(index, mask=index < 0)), bad

    def _loaded(self) -> Any:
        # Loaded here, not above: an error in a call reaches the job as itself, with its one line.
        if self._predictor is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            settings = self._planned.settings
            # Nobody waits for a single answer, so the engine may take larger batches than when it serves.
            larger = {"tokens_per_batch": settings.evaluation.tokens_per_batch}
            with self._open_model() as folder:
                self._predictor = self._task.load(folder, settings.serving.model_copy(update=larger))
                if self._planned.knowledge:
                    self._prompter = prompter_of(settings.serving, folder)
        return self._predictor


def _check(planned: Planned, total: Total, uri: str) -> None:
    first = planned.reading.files[0].name
    if not total.rows:
        raise DataError(f"the source {first} holds no rows")
    most = planned.settings.score.bad_rows
    if total.bad_rows > most * total.rows:
        shown = "; ".join(_bad_shown(planned, total)[:3])
        raise DataError(
            f"{total.bad_rows:,} of {total.rows:,} rows cannot be scored, more than score.bad_rows allows ({most:g}): "
            f"{shown}"
        )
    # Workers on other machines write to their own disk when the folder is a plain local path.
    if set(total.shards) - set(storage.ls(uri)):
        raise DataError(
            f"{storage.display(uri)} lacks shards that workers wrote; it must be a place that all machines of the "
            "cluster share"
        )


def _bad_shown(planned: Planned, total: Total) -> list[str]:
    return [f"{planned.reading.place(position)} {why}" for position, why in sorted(total.bad)[:BAD_SHOWN]]


def _manifest(planned: Planned, total: Total, seconds: float) -> dict[str, Any]:
    settings = planned.settings
    return {
        "format": FORMAT,
        "fingerprint": planned.fingerprint,
        "name": settings.name,
        "task": planned.task,
        "model": planned.model,
        "engine": total.engine,
        "rows": total.rows,
        "bad": {"rows": total.bad_rows, "first": _bad_shown(planned, total)},
        **({"redacted": dict(sorted(total.redacted.items()))} if planned.rules else {}),
        "figures": {name: dict(counts.most_common()) for name, counts in total.tallies.items()},
        "shards": sorted(total.shards),
        "sources": [
            {"uri": file.name, "rows": total.files.get(i, 0), "checksum": checksum}
            for i, (file, checksum) in enumerate(zip(planned.reading.files, planned.checksums, strict=True))
        ],
        "settings": settings.score.model_dump(mode="json", exclude={"source", "output"}),
        "seconds": round(seconds, 1),
        "versions": tracking.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
