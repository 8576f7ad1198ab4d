"""Several classifications by one encoder: where each head lies in the dataset's columns and the model's outputs.

One linear layer holds all heads side by side, so that the directory stays one that plain transformers and
every engine read; a head is a slice of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lib.artifacts import TaskFile
from lib.settings import DataSettings, HeadSettings


@dataclass(frozen=True)
class Head:
    """One of a model's heads. A model of one head has one with an empty name."""

    name: str
    labels: list[str]
    outputs: slice
    column: str
    """Of the dataset: int32 class of each row, MISSING where it has none."""
    temperature: float = 1.0

    def title(self, label: str) -> str:
        """A label among those of all heads."""
        return f"{self.name}/{label}" if self.name else label


def column(name: str, place: int) -> str:
    """The dataset's column of the head at `place`. The first is the main one, as `label` alone would be."""
    return f"label:{name}" if place else "label"


def laid_out(heads: Iterable[tuple[str, list[str], float]]) -> list[Head]:
    """Name, labels and temperature of each → the heads, side by side."""
    found: list[Head] = []
    start = 0
    for place, (name, labels, temperature) in enumerate(heads):
        outputs = slice(start, start + len(labels))
        found.append(Head(name, list(labels), outputs, column(name, place), temperature))
        start = outputs.stop
    return found


def of_data(data: DataSettings) -> list[Head]:
    """The heads that a configuration asks for."""
    return laid_out((name, head.label_names, 1.0) for name, head in settings_of(data).items())


def settings_of(data: DataSettings) -> dict[str, HeadSettings]:
    """Head → its settings; the short form is one head with an empty name."""
    if data.heads:
        return data.heads
    return {"": HeadSettings.model_construct(column=data.columns.label, labels=data.labels)}


def of_model(info: TaskFile) -> list[Head]:
    """The heads that a model directory holds."""
    if not info.heads:
        return laid_out([("", info.labels, info.temperature)])
    return laid_out((name, head["labels"], head["temperature"]) for name, head in info.heads.items())


def of_manifest(manifest: dict[str, Any]) -> list[Head]:
    """The heads whose labels a dataset holds."""
    named = manifest.get("heads") or {"": manifest["labels"]}
    return laid_out((name, list(labels), 1.0) for name, labels in named.items())
