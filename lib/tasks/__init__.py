"""A task is the only thing that knows what a model is for.

`load_task("sentiment")` imports `lib.tasks.sentiment`; the module itself fulfils the `Task` protocol.
There is no list to keep: adding a task is adding a file. Every other module is generic and reaches
the model through these functions.

Shapes: B rows in a batch, T tokens in its longest row, C classes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lib.errors import ConfigError, nearest
from lib.settings import ModelSettings, ServingSettings, Settings, task_names

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from pydantic import BaseModel
    from torch import nn

    from lib.artifacts import TaskFile

    Batch = dict[str, torch.Tensor]
    Outputs = dict[str, np.ndarray]


class Task(Protocol):
    """What a module of `lib.tasks` offers."""

    Request: type[BaseModel]
    """What a client sends: the HTTP schema and the batch-scoring schema are the same."""
    Response: type[BaseModel]

    def encode(self, rows: pa.Table, model: ModelSettings) -> pa.Table:
        """Normalised rows → the same rows with the feature columns that training reads.

        Runs inside Ray Data's map_batches. Always adds `length` int32, the tokens of each row.
        """

    def build(self, base: Path, settings: Settings) -> nn.Module:
        """A module ready to train, from a checked base directory."""

    def collate(self, rows: pa.Table, pad: int) -> Batch:
        """Rows → padded tensors on the CPU. `pad` is the padding token's id."""

    def weight(self, rows: pa.Table, settings: Settings, balance: dict[str, float]) -> float:
        """The loss's denominator for these rows: losses are sums, divided by the weight of the whole
        batch over all workers, so that the gradient does not depend on how rows fell into batches."""

    def loss(
        self, model: nn.Module, batch: Batch, settings: Settings, balance: dict[str, float]
    ) -> tuple[torch.Tensor, Outputs]:
        """Sum of the weighted losses of the rows (a scalar), and, in evaluation, the outputs that `metrics` reads.

        `balance` holds the weight of each label.
        """

    def balance(self, manifest: dict[str, Any], settings: Settings) -> dict[str, float]:
        """The weight of each label, from the dataset's manifest and `training.class_weights`."""

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """Metric names → values over all rows of a split."""

    def save(self, model: nn.Module, base: Path, info: TaskFile, folder: Path) -> None:
        """Write a model directory: safetensors weights, tokenizer, task.json."""

    def load(self, folder: Path, serving: ServingSettings) -> Any:
        """A predictor from a model directory. Raises ModelError."""

    def predict(self, predictor: Any, request: Any) -> Any:
        """Answer one validated request; used by serving and by batch scoring alike."""

    def predict_rows(self, predictor: Any, rows: pa.Table) -> Outputs:
        """`logits` [B, C] for rows of a dataset, in their order and tokenised as the model itself does;
        used by evaluation."""


def load_task(name: str) -> Task:
    """The task of this name. Raises ConfigError with the nearest known one."""
    known = task_names()
    if name not in known:
        raise ConfigError(f"no task {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return cast(Task, importlib.import_module(f"lib.tasks.{name}"))
