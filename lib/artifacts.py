"""What one stage hands on to the next, and where each lies under the storage root.

    datasets/NAME/FINGERPRINT/   DatasetRef   manifest.json, {train,validation,test}/part-*.parquet
    runs/RUN_ID/model/           RunRef       exported best checkpoint, a model directory
    runs/RUN_ID/adapter/         RunRef       its LoRA or DoRA adapter alone, as PEFT reads it
    runs/RUN_ID/evaluation/      EvalReport   report.json, report.html, *.png
    models/NAME/VERSION/         ModelRef     a registered model version; never changes
    vectors/NAME/FINGERPRINT/                 what an encoder makes of a catalogue's texts (lib.recommender.vectors)
    indexes/NAME/FINGERPRINT/    IndexRef     a knowledge base: manifest.json and a Lance table; never changes
    indexes/NAME/current.json                 which version of it is read
    curated/NAME/                             what users said, as a source; latest.json has how the last one is read
    labelled/NAME/FINGERPRINT/                a source that was labelled: rows/*.parquet, report.json, tasks for Label Studio

A model directory holds config.json, model.safetensors, the tokenizer's files and task.json; a registered one also
adapter/, where the run has left one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib import storage
from lib.errors import DataError, ModelError, RegistryError, StorageError

SPLITS = ("train", "validation", "test")
TASK_FILE = "task.json"
# Of a registered version that was trained with one: its adapter alone, as PEFT reads it.
ADAPTER_FOLDER = "adapter"
# What unpickles on loading. A base model may hold one beside its safetensors, a model version may not.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".msgpack", ".h5")


def curated(name: str, *parts: str) -> str:
    """Where what users said of an application lies, as a source to train on."""
    return storage.join(storage.root(), "curated", name, *parts)


def labelled(name: str, fingerprint: str) -> str:
    """Where a source that jobs.label has labelled lies."""
    return storage.join(storage.root(), "labelled", name, fingerprint)


@dataclass(frozen=True)
class DatasetRef:
    """An immutable, fingerprinted folder of Parquet shards with a manifest."""

    name: str
    fingerprint: str

    @property
    def uri(self) -> str:
        return storage.join(storage.root(), "datasets", self.name, self.fingerprint)

    def exists(self) -> bool:
        return storage.published(self.uri)

    def manifest(self) -> dict[str, Any]:
        """Raises DataError when the dataset was never published."""
        if not self.exists():
            raise DataError(f"no dataset {self.name}/{self.fingerprint}; run python -m jobs.preprocess first")
        manifest: dict[str, Any] = storage.read_json(storage.join(self.uri, "manifest.json"))
        return manifest

    def shards(self, split: str) -> list[str]:
        """URIs of one split's Parquet files, in order; empty when the split has no rows."""
        folder = storage.join(self.uri, split)
        return [storage.join(folder, f) for f in storage.ls(folder) if f.endswith(".parquet")]


@dataclass(frozen=True)
class RunRef:
    """One execution of a job: an MLflow run and its folder in storage."""

    id: str
    name: str

    @property
    def uri(self) -> str:
        return storage.join(storage.root(), "runs", self.id)

    @property
    def model_uri(self) -> str:
        return storage.join(self.uri, "model")

    @property
    def adapter_uri(self) -> str:
        return storage.join(self.uri, "adapter")

    @property
    def evaluation_uri(self) -> str:
        return storage.join(self.uri, "evaluation")

    @property
    def checkpoints_uri(self) -> str:
        return storage.join(self.uri, "checkpoints")

    def evaluation(self) -> EvalReport:
        """Raises RegistryError when the run was never evaluated."""
        if not storage.published(self.evaluation_uri):
            raise RegistryError(
                f"run {self.id} was never evaluated; run python -m jobs.evaluate --evaluation.run {self.id}"
            )
        return EvalReport.read(self.evaluation_uri)


@dataclass(frozen=True)
class ModelRef:
    """A registered model version."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def uri(self) -> str:
        return storage.join(storage.root(), "models", self.name, str(self.version))


@dataclass(frozen=True)
class IndexRef:
    """A version of a knowledge base's index."""

    name: str
    fingerprint: str
    root: str | None = field(default=None, compare=False)
    """Of the storage that it lies in; None: this process's own."""

    def __str__(self) -> str:
        return f"{self.name}/{self.fingerprint}"

    @property
    def uri(self) -> str:
        return storage.join(self.root or storage.root(), "indexes", self.name, self.fingerprint)

    def exists(self) -> bool:
        return storage.published(self.uri)

    def manifest(self) -> dict[str, Any]:
        """Raises RegistryError when this version is not there."""
        if not self.exists():
            raise RegistryError(f"no index {self}; run python -m jobs.index first")
        manifest: dict[str, Any] = storage.read_json(storage.join(self.uri, "manifest.json"))
        return manifest


@dataclass(frozen=True)
class AnswersReport:
    """Generated answers, in an EvalReport. Names of systems: `model`, and those of the baselines."""

    prompts: int
    """Different prompts among the dialogues of the split; intervals draw these."""
    generated: int
    """Test dialogues whose last answer was generated; metrics of answers are over these."""
    tokens: int
    """Answer tokens of the whole split; perplexity is over these."""
    reference: dict[str, float]
    """What the references' own texts measure: distinct_1, distinct_2, repetition, tokens_mean and its quantiles."""
    intervals: dict[str, dict[str, list[float]]]
    """Metric → system → ends of its 95% interval."""
    differences: dict[str, dict[str, list[float]]]
    """Metric → baseline → the model's minus its own, and the ends of that difference's 95% interval."""
    conversations: list[dict[str, Any]]
    """Evenly spaced: id, prompt (messages), reference, and under `answers` what each system says."""
    judge: dict[str, Any]
    """What another model says of model against base (`lib.evaluation.judge`); empty without one."""


@dataclass(frozen=True)
class EvalReport:
    """What was measured on the test split. Every figure in it was computed by the run that wrote it.

    Names of classifiers: `model`, and those of the baselines.
    """

    name: str
    run: str
    task: str
    dataset: str
    """Fingerprint of the dataset whose test split was measured."""
    labels: list[str]
    rows: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    """Label → rows, precision, recall, f1."""
    confusion: list[list[int]]
    """Row counts: true class down, predicted class across."""
    calibration: list[dict[str, float]]
    """Bins of confidence, low to high: lower, upper, rows, confidence, accuracy."""
    slices: dict[str, dict[str, dict[str, float]]]
    """Slice → value → rows, accuracy, macro_f1."""
    baselines: dict[str, dict[str, float]]
    """Baseline → the same metrics as `metrics`."""
    intervals: dict[str, list[float]]
    """Classifier → lower and upper end of the 95% interval of `deciding`; empty without a bootstrap."""
    differences: dict[str, list[float]]
    """Baseline → the model's `deciding` minus its own, and the ends of that difference's 95% interval."""
    methods: dict[str, str]
    """Classifier → how it came to its answers, in words."""
    mistakes: list[dict[str, Any]]
    """The surest wrong answers, surest first: id, text, label, predicted, confidence."""
    temperature: float = 1.0
    """What the model divides its logits by; all figures are of the answers after that."""
    uncalibrated: dict[str, float] = field(default_factory=dict)
    """calibration_error, log_loss and brier of the model's answers before it."""
    behaviours: list[dict[str, Any]] = field(default_factory=list)
    """What `lib.evaluation.behaviours` measured: name, kind, what, cases, failures, failure_rate, examples."""
    head: str = ""
    """The head that this is about; empty for a model of one head."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the other heads: head → its report. `metrics` and `baselines` here hold `HEAD/METRIC` of all heads."""
    deciding: str = "macro_f1"
    """The metric of `intervals` and `differences`, and by which a version is promoted."""
    answers: AnswersReport | None = None
    """What a task that generates has besides."""
    rankings: list[dict[str, Any]] = field(default_factory=list)
    """Of a recommender: evenly spaced, the titles of `history`, what is `recommended`, what `came` and its `rank`."""
    logged: dict[str, float] = field(default_factory=dict)
    """Of a recommender: what it would have earned, as `lib.evaluation.logged.estimate` has it."""
    format: int = 1

    def write(self, folder: Path) -> None:
        storage.write_json(str(folder / "report.json"), asdict(self))

    @classmethod
    def read(cls, uri: str) -> EvalReport:
        """Raises StorageError when the file is absent or of a format that this code does not know."""
        path = storage.join(uri, "report.json")
        values = storage.read_json(path)
        if not isinstance(values, dict) or values.get("format") != 1:
            raise StorageError(f"{path} is not a report of format 1; run python -m jobs.evaluate again")
        answers = values.pop("answers", None)
        return cls(**values, answers=AnswersReport(**answers) if answers else None)


@dataclass(frozen=True)
class TaskFile:
    """task.json: what a model directory is for, so that it can be served from its files alone."""

    task: str
    labels: list[str]
    """What the model's outputs stand for, in their order."""
    max_length: int
    base: str
    dataset: str
    case_markers: bool = False
    """Whether a token follows each word with capitals (lib.words.pieces)."""
    temperature: float = 1.0
    """What logits are divided by before the softmax, fitted on the validation split (Guo et al. 2017)."""
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Head → its `labels` and `temperature`, in the order of the outputs; empty for a model of one head."""
    format: int = 1
    new_bias: float = 0.0
    """recommend: what is added to the scores of items that training has not seen, fitted on the validation split."""
    chat_template: str | None = None
    """chat: what `model.chat_template` named; the template itself lies with the tokenizer."""

    def write(self, folder: Path) -> None:
        storage.write_json(str(folder / TASK_FILE), asdict(self))

    @classmethod
    def read(cls, folder: Path, task: str | None = None) -> TaskFile:
        """Raises ModelError when the directory holds no task.json of a format that this code knows, or one of
        another task than `task`."""
        path = folder / TASK_FILE
        if not path.is_file():
            raise ModelError(f"{folder} holds no {TASK_FILE}; it was not exported by python -m jobs.finetune")
        values = storage.read_json(str(path))
        if values.get("format") != 1:
            raise ModelError(
                f"{path} has format {values.get('format')!r}; this version of Whorl reads format 1"
            )
        if task is not None and values["task"] != task:
            raise ModelError(f"{folder} is a {values['task']} model, not {task}")
        return cls(**values)


def check_model_directory(folder: Path) -> None:
    """Refuse a directory that is absent, lacks safetensors weights, or holds pickled ones.

    Raises ModelError with one line.
    """
    if not folder.is_dir():
        raise ModelError(f"no model directory {folder}; give sample://NAME, a directory or a hub id")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is not a model directory")
    files = [p for p in folder.iterdir() if p.is_file()]
    if not any(p.suffix == ".safetensors" for p in files):
        pickled = sorted(p.name for p in files if p.suffix in PICKLES)
        holds = f"holds {pickled[0]}, which unpickles on loading" if pickled else "holds no weights"
        raise ModelError(f"{folder} {holds}; convert the weights to model.safetensors (save_pretrained does)")
