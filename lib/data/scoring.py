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
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.artifacts import IndexRef
from lib.data import blocks, shapes, sources
from lib.data.blocks import Block, Reading
from lib.data.readers import column_names
from lib.errors import ConfigError, DataError
from lib.settings import Settings
from lib.tasks import Asked, Task, load_task, scores_files, served_as

if TYPE_CHECKING:
    import ray.data

    from lib.retrieval.prompt import Prompter

# Part of every fingerprint. Raise it when the same input would give other files.
FORMAT = 1
# Readers of Parquet, ours too, leave out what begins with an underscore.
MANIFEST = "_manifest.json"
# Rows that the predictor is given at a time: enough that batches of like lengths can be formed.
ROWS_AT_ONCE = 512
BAD_SHOWN = 20
# Before the names of the columns of `score.keep` on their way, where others have names of their own.
KEPT = "keep:"
SAY_SECONDS = 10

OpenModel = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True)
class Planned:
    """Scores that are to be: what they are made of and where they will lie."""

    settings: Settings
    task: str
    """Whose models are scored with: `chat` for `preference`."""
    model: str
    """NAME@VERSION."""
    reading: Reading
    checksums: tuple[str, ...]
    """Of the files, in order."""
    uri: str
    fingerprint: str
    engine: Literal["predictor", "vllm"] = "predictor"
    """What computes the answers: the task's own predictor, or vLLM in its place."""
    knowledge: IndexRef | None = None
    """chat: what the answers are grounded in, as they are when it serves."""

    def manifest(self) -> dict[str, Any] | None:
        """What lies there already, of the same input and model.

        Raises ConfigError when something else does.
        """
        if storage.published(self.uri):
            found: dict[str, Any] = storage.read_json(storage.join(self.uri, MANIFEST))
            if found.get("fingerprint") == self.fingerprint:
                return found
            raise ConfigError(
                f"score.output: {storage.display(self.uri)} holds the scores of another input or model "
                f"({found.get('fingerprint')}); give another folder"
            )
        if self.settings.score.output and storage.ls(self.uri):
            raise ConfigError(
                f"score.output: {storage.display(self.uri)} holds files already; give a folder that is not there"
            )
        return None


def plan(settings: Settings, model: str, digest: str) -> Planned:
    """Look at the source and name the scores, without reading rows or starting Ray.

    `model` is NAME@VERSION, `digest` stands for its files. Raises ConfigError, DataError or StorageError, in one
    line, for a source that cannot be used, RegistryError for a knowledge base without an index.
    """
    wanted, task = settings.score, served_as(settings)
    if task not in scores_files():
        raise ConfigError(f"task {task} scores no files (those that do: {', '.join(scores_files())})")
    if not wanted.sources:
        raise ConfigError("score.source is missing; give --score.source URI")
    files = sources.find_files(wanted.sources, wanted.format, key="score.source")
    templates = settings.data.templates
    inputs = load_task(task).input_columns(settings.data, [*column_names(files[0]), *templates])
    if taken := inputs.keys() & wanted.keep.keys():
        raise ConfigError(
            f"score.keep: {taken.pop()!r} is the name of a column of the scores; choose another"
        )
    columns = {**inputs, **{KEPT + name: column for name, column in wanted.keep.items()}}
    keys = {f"columns.{name}": column for name, column in inputs.items()}
    kept = {f"keep.{name}": column for name, column in wanted.keep.items()}
    with ThreadPoolExecutor(8) as pool:
        for file, present in zip(files, pool.map(column_names, files), strict=True):
            for key, column in shapes.wanted(keys, templates):
                sources.check_columns(file, {key: column}, present)
            sources.check_columns(file, kept, present, section="score")
        checksums = tuple(pool.map(storage.checksum, [file.uri for file in files]))
    engine = _engine(settings, task)
    identity = {
        "format": FORMAT,
        "model": [model, digest],
        "engine": [
            engine,
            settings.serving.engine,
            settings.serving.precision,
            settings.serving.gpus_per_replica > 0,
        ],
        "sources": [
            [file.format, file.name, checksum] for file, checksum in zip(files, checksums, strict=True)
        ],
        "columns": columns,
        "templates": templates,
        "score": wanted.model_dump(
            mode="json", include={"limit", "rows_per_shard", "max_tokens", "temperature"}
        ),
    }
    knowledge = None
    if task == "chat" and settings.serving.knowledge is not None:
        from lib.data.grounding import identity as grounded
        from lib.retrieval.index import current

        knowledge = replace(current(settings.serving.knowledge.index), root=storage.root())
        unknown = settings.serving.knowledge.unknown
        identity["knowledge"] = grounded(settings, knowledge) | {"unknown": unknown}
    fingerprint = storage.fingerprint(identity)
    folder = wanted.output or storage.join(storage.root(), "scores", settings.name, fingerprint)
    lists = load_task(task).LISTS.intersection(inputs)
    shape = shapes.Shape(columns, templates, lists)
    reading = Reading(
        tuple(files),
        columns,
        lists,
        wanted.rows_per_shard,
        wanted.limit,
        shapes=(shape,) if templates else (),
    )
    uri = storage.uri(folder)
    return Planned(settings, task, model, reading, checksums, uri, fingerprint, engine, knowledge)


def _engine(settings: Settings, task: str) -> Literal["predictor", "vllm"]:
    if task != "chat" or settings.score.engine == "transformers":
        return "predictor"
    from lib.data import scoring_vllm

    if scoring_vllm.available():
        return "vllm"
    if settings.score.engine == "vllm":
        raise ConfigError(
            "score.engine vllm: it is not installed, or WHORL_STORAGE is no disk; take transformers"
        )
    return "predictor"


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


def _scored(planned: Planned, open_model: OpenModel, uri: str, say: Callable[[str], None]) -> Total:
    from lib.data.stream import rows_of

    total, said = Total(0, [], 0, {}, Counter(), [], ""), time.monotonic()
    with ExitStack() as files:
        if planned.engine == "vllm":
            from lib.data import scoring_vllm

            counts = scoring_vllm.answered(planned, files.enter_context(open_model()), uri)
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

    from lib.data.stream import packed_blocks

    settings = planned.settings
    return packed_blocks(planned.reading, "score").map_batches(
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


def shard_name(block: Block) -> str:
    return f"part-{block.fragment:05d}-{block.number:05d}.parquet"


def asked_of(planned: Planned, rows: pa.Table) -> Asked:
    """What is asked of a block's rows."""
    names = [name for name in planned.reading.columns if not name.startswith(KEPT)]
    inputs = {name: blocks.flat(rows[name]) for name in names}
    return load_task(planned.task).ask(inputs, planned.settings.data)


def kept_of(planned: Planned, rows: pa.Table) -> dict[str, pa.Array]:
    """The columns of a block that are carried into its shard."""
    return {name: blocks.flat(rows[KEPT + name]) for name in planned.settings.score.keep}


def write_shard(
    planned: Planned,
    uri: str,
    shard: str,
    positions: np.ndarray,
    kept: dict[str, pa.Array],
    asked: pa.Table,
    answers: pa.Table,
    bad: dict[int, str],
) -> dict[str, Any]:
    """Write a block's rows and answers, all of one length; what they come to, for `Total`."""
    if taken := kept.keys() & {*asked.column_names, *answers.column_names}:
        raise ConfigError(
            f"score.keep: {sorted(taken)[0]!r} is the name of a column of the scores; choose another"
        )
    files, numbers = positions >> blocks.ROW_BITS, positions & ((1 << blocks.ROW_BITS) - 1)
    table = pa.table(
        {"file": pa.array([planned.reading.files[i].name for i in files], pa.string())}
        | {"row": pa.array(numbers + 1, pa.int64()), **kept}
        | {name: asked[name] for name in asked.column_names}
        | {name: answers[name] for name in answers.column_names}
        | {"problem": pa.array([bad.get(i) for i in range(len(positions))], pa.string())}
    )
    with storage.open_file(storage.join(uri, shard), "wb") as file:
        pq.write_table(table, file, compression="zstd")
    found, file_rows = np.unique(files, return_counts=True)
    good = pa.array([i for i in range(len(positions)) if i not in bad], pa.int64())
    return {
        "shard": shard,
        "rows": len(positions),
        "bad_rows": len(bad),
        "bad": [(int(positions[i]), bad[i]) for i in sorted(bad)[:BAD_SHOWN]],
        "files": dict(zip(found.tolist(), file_rows.tolist(), strict=True)),
        "tallies": load_task(planned.task).tally(answers.take(good)),
    }


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
        return pa.table({"counts": [json.dumps(counts)]})

    def _grounded(self, asked: Asked) -> tuple[pa.Table, dict[int, str]]:
        self._loaded()
        assert self._prompter is not None
        from lib.data.scoring_grounded import grounded

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
                    from lib.data.scoring_grounded import prompter_of

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
