"""The share of a model's parameters that `training.adapter` or `training.layers` leaves to train.

A fresh head is left out: it has as many parameters as a few rows of a weight.
"""

from __future__ import annotations

import math
import re

from lib.planner import architecture
from lib.planner.architecture import Architecture
from lib.settings import AdapterSettings, Settings

# `bert.encoder.layer.3.output.dense.weight` → the list, the number in it, the rest.
IN_A_LIST = re.compile(r"(.*?)\.(\d+)\.(.+)")


def share(model: Architecture, settings: Settings) -> float:
    """Trained parameters by all parameters, adapters against those of the model beside them.

    Of `model.base` by the names and shapes of its tensors; of `plan.architecture` by its widths, `targets`
    then being all linear maps.
    """
    training = settings.training
    if not training.adapter and not training.layers:
        return settings.plan.trainable
    if settings.plan.architecture:
        count = _of_widths(model, settings)
    else:
        shapes = architecture.shapes(settings.model.base)
        count = (
            _low_rank(shapes, training.adapter)
            if training.adapter
            else _last(shapes, training.layers or model.layers)
        )
    return min(1.0, max(count, 1) / model.parameters)


def _of_widths(model: Architecture, settings: Settings) -> int:
    training, h = settings.training, model.width
    queries, keys = model.heads * model.head_width, model.key_value_heads * model.head_width
    maps = [(h, queries), (h, keys), (h, keys), (queries, h), (model.inner, h)]
    maps += [(h, model.inner)] * (2 if model.gated else 1)
    if training.adapter:
        return model.layers * sum(_adapter(pair, training.adapter) for pair in maps)
    each = sum(a * b for a, b in maps)
    outside = max(0, model.multiplied - model.layers * each) if model.vocabulary_head else 0
    return min(training.layers or model.layers, model.layers) * each + outside


def _adapter(shape: tuple[int, int], adapter: AdapterSettings) -> int:
    """Two matrices of low rank, and for DoRA a magnitude for each output (`shape` is input, output)."""
    return adapter.rank * sum(shape) + (shape[1] if adapter.kind == "dora" else 0)


def _layers(shapes: dict[str, tuple[int, ...]]) -> str:
    """Name of the list with the most parameters."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if found := IN_A_LIST.fullmatch(name):
            sizes[found[1]] = sizes.get(found[1], 0) + math.prod(shape)
    return max(sizes, key=lambda stem: sizes[stem], default="")


def _low_rank(shapes: dict[str, tuple[int, ...]], adapter: AdapterSettings) -> int:
    stem, count = _layers(shapes), 0
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or len(shape) != 2:
            continue
        if adapter.targets == "all-linear":
            wanted = name.startswith(f"{stem}.")
        else:
            wanted = any(module == t or module.endswith(f".{t}") for t in adapter.targets)
        if wanted:
            count += _adapter((shape[1], shape[0]), adapter)
    return count


def _last(shapes: dict[str, tuple[int, ...]], layers: int) -> int:
    stem = _layers(shapes)
    numbers = {name: int(f[2]) for name in shapes if (f := IN_A_LIST.fullmatch(name)) and f[1] == stem}
    lowest = max(numbers.values(), default=0) + 1 - layers
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        # What is not in a layer and no embedding (nor its norm) comes after the layers.
        if (numbers[name] >= lowest if name in numbers else not _before(name))
    )


def _before(name: str) -> bool:
    return architecture.is_embedding(name) or "embeddings." in name
