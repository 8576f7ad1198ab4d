"""Which files are scored by which model, and where the scores will lie: looked at before any row is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from lib import storage
from lib.artifacts import IndexRef
from lib.data.blocks import Reading
from lib.data.reading import shapes, sources
from lib.data.reading.readers import column_names
from lib.data.redact import Rules
from lib.errors import ConfigError
from lib.settings import Settings
from lib.tasks import load_task, scores_files, served_as

# Part of every fingerprint. Raise it when the same input would give other files.
FORMAT = 1
# Readers of Parquet, ours too, leave out what begins with an underscore.
MANIFEST = "_manifest.json"
# Before the names of the columns of `score.keep` on their way, where others have names of their own.
KEPT = "keep:"


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
    rules: Rules | None = None
    """How personal data leaves what the model is asked."""

    @property
    def texts(self) -> frozenset[str]:
        """The columns that the model is asked."""
        return frozenset(name for name in self.reading.columns if not name.startswith(KEPT))

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
    rules = Rules.of(wanted.redact, "score.redact") if wanted.redact else None
    if wanted.redact and rules:
        identity["redaction"] = [wanted.redact.model_dump(mode="json"), rules.identity()]
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
    return Planned(settings, task, model, reading, checksums, uri, fingerprint, engine, knowledge, rules)


def _engine(settings: Settings, task: str) -> Literal["predictor", "vllm"]:
    if task != "chat" or settings.score.engine == "transformers":
        return "predictor"
    # vLLM reads a model from a path that all machines see.
    if find_spec("vllm") is not None and storage.is_local(storage.filesystem(storage.root())[0]):
        return "vllm"
    if settings.score.engine == "vllm":
        raise ConfigError(
            "score.engine vllm: it is not installed, or WHORL_STORAGE is no disk; take transformers"
        )
    return "predictor"
