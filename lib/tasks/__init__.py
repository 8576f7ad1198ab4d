"""A task is the only thing that knows what a model is for.

`load_task("sentiment")` imports `lib.tasks.sentiment`; the module itself fulfils the `Task` protocol.
There is no list to keep: adding a task is adding a file. Every other module is generic and reaches
the model through these functions.

Shapes: B rows in a batch, T tokens in its longest row, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lib.errors import ConfigError, DataError, nearest
from lib.settings import (
    DataSettings,
    ModelSettings,
    ScoreSettings,
    ServingSettings,
    Settings,
    task_names,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from pydantic import BaseModel
    from torch import nn

    from lib.artifacts import DatasetRef, TaskFile

    Batch = dict[str, torch.Tensor]
    Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Prepared:
    """Rows of a source as a task understands them."""

    rows: pa.Table
    """What `encode` reads and the dataset keeps; a row for each row of the source."""
    texts: pa.Array
    """string: what a row says. Equal texts are duplicates, and all of them fall into one split."""
    labels: np.ndarray
    """int32: what is to be learned of a row; duplicates with different ones conflict. Below 0: MISSING or
    UNKNOWN of `lib.labels`."""
    values: pa.Array
    """string: what the source gives for a label, for messages about those that are UNKNOWN."""
    empty: np.ndarray
    """bool: rows that say nothing."""
    malformed: dict[int, str]
    """Row → what is wrong with its form."""
    groups: pa.Array | None = None
    """string: rows of one group fall into one split; None where equal texts are the groups."""
    compared: pa.Array | None = None
    """string: what near duplicates are told by; None where it is `texts`."""


@dataclass(frozen=True)
class Asked:
    """Rows of a source as what a request asks."""

    rows: pa.Table
    """What the scores repeat of each row."""
    inputs: list[Any]
    """What a request holds for each row; of no meaning for a bad one."""
    bad: dict[int, str]
    """Row → why nothing can be asked of it."""


class UnencodableError(DataError):
    """A row that the model's tokeniser or template refuses: `row` is its number among those to encode."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(why)
        self.row = row


class Task(Protocol):
    """What a module of `lib.tasks` offers."""

    Request: type[BaseModel]
    """What a client sends: the HTTP schema and the batch-scoring schema are the same."""
    Response: type[BaseModel]

    ROUTE: str
    """Under which its application answers; `/v1/TASK` where a module does not say."""
    PACKS: bool
    """Whether rows can be packed into sequences of the model's length: `collate` then reads a column `pack`."""
    METRIC: str
    """The validation metric that decides where `training.metric` names none."""
    LISTS: frozenset[str]
    """Columns of the source, by their names here, that hold lists or objects; they arrive as JSON."""
    TEXTS: frozenset[str]
    """Columns of the source, by their names here, that hold what people wrote: personal data is taken out of them, and
    `data.clean` mends and judges them."""
    AUGMENTED: frozenset[str]
    """Methods of `data.augment` that leave a row's labels right; a task without it takes none."""
    BASELINE: Literal["tfidf", "lookup"]
    """What the task is compared with beside the most frequent class (`lib.evaluation.baselines`)."""

    def columns(self, data: DataSettings, present: Collection[str] = ()) -> dict[str, str]:
        """Name here → column of the source. Raises ConfigError when `data` does not suit the task.

        `present` are the columns that the source has, once they are known.
        """

    def classes(self, data: DataSettings) -> list[str]:
        """What the model's outputs stand for, in their order."""

    def prepare(self, source: dict[str, pa.Array], data: DataSettings) -> Prepared:
        """Columns of a source, by their names here and all as strings → normalised rows with class indices."""

    def counts(self, rows: pa.Table, classes: list[str]) -> dict[str, int]:
        """Class → how often the rows of a dataset hold it."""

    def encode(self, rows: pa.Table, model: ModelSettings) -> pa.Table:
        """Prepared rows → the same rows with the feature columns that training reads.

        Runs inside Ray Data's map_batches. Always adds `length` int32, the tokens of each row. Raises UnencodableError.
        """

    def build(self, base: Path, settings: Settings, dataset: DatasetRef | None = None) -> nn.Module:
        """A module ready to train, from a checked base directory. Of the dataset that it will learn, only a
        recommender is built: it is one of these items."""

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

    def items(self, rows: pa.Table) -> pa.Table:
        """What is judged right or wrong in rows of a dataset, with the rows' slices: `id` (sorting by it keeps
        the order inside a row), `text`, `label` int32, `length`, and, where a row holds several, `row`, its id."""

    def predict_rows(self, predictor: Any, rows: pa.Table) -> Outputs:
        """`logits` [M, C] for the M items of rows of a dataset, in their order and tokenised as the model
        itself does; used by evaluation."""

    def row_metrics(self, items: pa.Table, predicted: np.ndarray, classes: list[str]) -> dict[str, float]:
        """Metrics that only whole rows show, from the predicted class of each item, sorted by id."""

    def request(self, row: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
        """A row of a dataset as an HTTP request to the application: path and JSON body.

        `name` is the served model's, for an API whose requests name one.
        """

    def feedback(self, row: dict[str, Any], classes: list[str]) -> dict[str, Any]:
        """What POST /v1/feedback would be told of the answer to such a request by somebody who knows the truth, in a
        form that teaches (`from_feedback`). A task without `from_feedback` has none."""

    def from_feedback(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of a source, under default names of columns, that an event and what was said of it teach
        (`lib.events.read`). A task without it learns nothing from feedback."""

    def gathered(self, application: str, begin: float, data: DataSettings) -> Iterator[dict[str, Any]]:
        """Rows of the source that `data` names, of what an application was told since a time; of a task that learns from
        what users do, and not from what they say of answers."""

    def input_columns(self, data: DataSettings, present: Collection[str]) -> dict[str, str]:
        """Name here → column of the source, of those that a request is made of: no label is needed to score.

        A task without it and the next three scores no files.
        """

    def ask(self, source: dict[str, pa.Array], data: DataSettings) -> Asked:
        """Those columns, all as strings, → what is asked of the model."""

    def score(
        self, predictor: Any, inputs: list[Any], settings: ScoreSettings
    ) -> tuple[pa.Table, dict[int, str]]:
        """Answers to inputs, a row of columns for each, by the predictor that serves; and why an input was refused.
        The columns of a refused one are null. The same columns and types whatever the answers are."""

    def tally(self, answers: pa.Table) -> dict[str, dict[str, int]]:
        """What such answers come to: counts by name, which add up over tables."""

    def show(self, row: dict[str, Any], post: Callable[[str, dict[str, Any]], dict[str, Any]]) -> list[str]:
        """Lines of what else the demo shows of the application that `post` asks, with a row of the test split; a task
        without it shows no more."""

    def tell(self, row: dict[str, Any], reply: dict[str, Any], classes: list[str]) -> str:
        """The JSON reply to such a request beside the truth, in a line for people."""


def served_as(settings: Settings) -> str:
    """The task whose application answers: that of the models which the configured task exports."""
    return getattr(load_task(settings.task), "SERVED_AS", settings.task)


def scores_files() -> list[str]:
    """Tasks whose models score files in batch (`jobs.score`)."""
    return [name for name in task_names() if hasattr(load_task(name), "score")]


def judged(name: str) -> Literal["classes", "answers", "rankings"]:
    """What a task's models are judged by: the classes that they choose, the answers that they write, or where they
    rank what comes next (`JUDGED`)."""
    return getattr(load_task(name), "JUDGED", "classes")


def deciding_metric(settings: Settings) -> str:
    """The validation metric that says which checkpoint is best: `training.metric`, else the task's own."""
    return settings.training.metric or load_task(settings.task).METRIC


GOOD = 0.5
"""A rating from here on says that an answer was good."""


def is_good(feedback: dict[str, Any]) -> bool:
    """Whether what was said of an answer (`lib.events`) finds it good."""
    return feedback["rating"] is not None and feedback["rating"] >= GOOD


def learns_from_feedback() -> list[str]:
    """Tasks with a `from_feedback(event)`, which makes rows of a source of an event and what was said of it, or with
    `gathered`, which makes them of what users did."""
    return [
        name
        for name in task_names()
        if any(hasattr(load_task(name), learning) for learning in ("from_feedback", "gathered"))
    ]


def check_behaviours(settings: Settings) -> None:
    """Raises ConfigError where the models are judged by answers: what a behaviour tells of is a chosen class."""
    if settings.evaluation.behaviours and judged(settings.task) != "classes":
        raise ConfigError(
            f"evaluation.behaviours: {settings.task} chooses no label that could change; leave them out"
        )


def packs(settings: Settings) -> bool:
    """Whether examples are packed: `training.packing`, else wherever the task can.

    Raises ConfigError where it cannot.
    """
    wanted, can = settings.training.packing, load_task(settings.task).PACKS
    if wanted and not can:
        raise ConfigError(f"training.packing: the task {settings.task} has nothing to pack; leave it out")
    return can if wanted is None else wanted


def load_task(name: str) -> Task:
    """The task of this name. Raises ConfigError with the nearest known one."""
    known = task_names()
    if name not in known:
        raise ConfigError(f"no task {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return cast(Task, importlib.import_module(f"lib.tasks.{name}"))
