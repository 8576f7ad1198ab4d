"""Names of people and postal addresses, by a tagging model: one of ours, or any directory like it (`lib.tagger`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lib import storage
from lib.artifacts import ModelRef, TaskFile
from lib.base_models import base_directory
from lib.data.redact import Entity
from lib.errors import ConfigError, ModelError, nearest
from lib.settings import NameSettings, ServingSettings
from lib.tagger import Predictor, Request, load, predict

_BETWEEN = ("", " ", ", ")


def placed(names: NameSettings) -> NameSettings:
    """The same by the model's place: the tasks that ask it may have another storage in their environment. Raises
    ModelError for a version that is not there."""
    name, at, version = names.model.rpartition("@")
    if not at or "/" in names.model:
        return names
    ref = ModelRef(name, int(version))
    if not storage.published(ref.uri):
        raise ModelError(f"no model version {ref} in storage; python -m jobs.promote registers one")
    return names.model_copy(update={"model": ref.uri})


def check(names: NameSettings) -> str:
    """A digest of the model. Raises ConfigError for a label that it has not, ModelError for what is no tagging model."""
    where = base_directory(names.model)
    known = dict.fromkeys(label[2:] for label in TaskFile.read(where, "tagging").labels if label[1:2] == "-")
    for label in names.labels:
        if label not in known:
            raise ConfigError(
                f"data.redact.names.labels: {names.model} has no label {label!r}{nearest(label, known)} "
                f"(known: {', '.join(known)})"
            )
    return storage.fingerprint({p.name: storage.checksum(str(p)) for p in sorted(where.glob("*.*"))})


def find(texts: Sequence[str], names: NameSettings) -> list[list[Entity]]:
    """Entities of each text, of the kinds that `names` maps."""
    if not any(texts):
        return [[] for _ in texts]
    said = [text or " " for text in texts]
    results = predict(_model(names.model), Request.model_construct(inputs=list(said))).results
    return [
        _joined(
            text,
            [
                (entity.start, entity.end, names.labels[entity.label])
                for entity in answer.entities
                if entity.label in names.labels and entity.score >= names.min_score
            ],
        )
        for text, answer in zip(texts, results, strict=True)
    ]


def _joined(text: str, entities: list[Entity]) -> list[Entity]:
    """Entities of one kind that stand side by side, such as a street and its town, as one."""
    joined: list[Entity] = []
    for start, end, kind in entities:
        if joined and joined[-1][2] == kind and text[joined[-1][1] : start] in _BETWEEN:
            start = joined.pop()[0]
        joined.append((start, end, kind))
    return joined


@lru_cache(maxsize=1)
def _model(place: str) -> Predictor:
    """Once in a process, whose tasks have many blocks. One thread: as many tasks run as there are cores."""
    return load(base_directory(place), ServingSettings(threads=1))
