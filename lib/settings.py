"""Every configuration key of every job and application, in one place.

One YAML describes one use (`jobs/configs/reviews.yaml`); every job and application reads the same file
and takes its own section. The command line overrides single keys: `--training.epochs 2`. Unknown keys,
wrong types and impossible values end in one line that names the key (ConfigError). Imports neither torch
nor ray, so that `--help` and a mistake in a file answer in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from lib.errors import ConfigError, nearest

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]

# Columns of a dataset that the tasks fill; a slice may not take their place.
RESERVED_COLUMNS = {
    "id",
    "text",
    "label",
    "messages",
    "pack",
    "tokens",
    "tags",
    "input_ids",
    "labels",
    "rejected_messages",
    "rejected_input_ids",
    "rejected_labels",
    "reference_chosen",
    "reference_rejected",
    "length",
    "truncated",
    "row",
}


Item = TypeVar("Item")
# One value or a list of them, as a list: `--plan.workers 8` and `--plan.workers "[4, 8]"`.
Listed = Annotated[
    list[Item], Field(min_length=1), BeforeValidator(lambda v: v if isinstance(v, (list, tuple)) else [v])
]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Columns(Section):
    """Names of the columns in the source. A task reads those that its rows have."""

    text: str = "text"
    label: str = "label"
    tokens: str = "tokens"
    """tagging: the words of a sentence, a list."""
    tags: str = "tags"
    """tagging: the tag of each word, a list as long."""
    messages: str = "messages"
    """chat: a list of {role, content}."""
    conversations: str = "conversations"
    """chat, ShareGPT's form: a list of {from, value}."""
    instruction: str = "instruction"
    """chat, Alpaca's form: what is asked; `input` is what it is about, `output` the answer."""
    input: str = "input"
    output: str = "output"
    question: str = "question"
    """chat, in pairs: what the user says, and the `answer`."""
    answer: str = "answer"
    prompt: str = "prompt"
    """preference: what is asked, a text or a list of messages; not needed where the answers are whole dialogues."""
    chosen: str = "chosen"
    """preference: the better answer, a text or a list of messages; `rejected` the other."""
    rejected: str = "rejected"
    system: str = "system"
    """chat, in pairs and Alpaca's form: the system message, where a source has one."""


class Split(Section):
    """Shares of the rows; a row's place depends on its text and the seed alone.

    A split with a source of its own takes no part: the others share the rows in the same proportion.
    """

    train: Share = 0.8
    validation: Share = 0.1
    test: Share = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, not {total:g}")
        if self.train == 0:
            raise ValueError("train must be above 0")
        return self


class DataSettings(Section):
    """From raw rows to a dataset (`jobs.preprocess`)."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """URI, glob or folder of CSV, JSON Lines, Parquet or CoNLL columns, or `sample://NAME`; several are read in order."""
    validation_source: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Where the validation split is given; None takes a share of `source`."""
    test_source: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Where the test split is given; None takes a share of `source`."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "conll", "chatterbot"] = "auto"
    """Of all files; auto goes by each file's ending."""
    columns: Columns = Columns()
    labels: dict[str, str] | list[str] | None = None
    """Value in the source → label, or the list of labels when the source already holds them.

    tagging: the kinds of entity, without B- and I-. chat has none.
    """
    dialogue: Literal["auto", "messages", "sharegpt", "alpaca", "pair"] = "auto"
    """chat: the form of the source's dialogues (`lib.dialogues`); auto goes by its columns."""
    duplicates: Literal["drop", "keep"] = "drop"
    """keep: as they are, where the splits of a published data set are given and its figures are compared."""
    slices: dict[str, str] = {}
    """Name → source column: carried along so that evaluation reports each value on its own."""
    limit: Positive | None = None
    """Take only the first rows of the source, and of the source of each split that has its own."""
    split: Split = Split()
    undersample: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Label → share of its training rows that is kept, where one class outnumbers the others; validation and
    test stay as they are."""
    rows_per_shard: Positive = 20_000

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        # YAML reads `1: negative` with an integer key; sources hold 1, 1.0 or "1". All compare as text.
        if isinstance(value, dict):
            value = {_label_key(k): v for k, v in value.items()}
        elif isinstance(value, list):
            value = [_label_key(v) for v in value]
        if isinstance(value, (dict, list)) and not value:
            raise ValueError("at least one label is needed")
        return value

    @field_validator("slices")
    @classmethod
    def _slices(cls, value: dict[str, str]) -> dict[str, str]:
        taken = RESERVED_COLUMNS & set(value)
        if taken:
            raise ValueError(
                f"slice name {sorted(taken)[0]!r} is the name of a dataset column; choose another"
            )
        return value

    @model_validator(mode="after")
    def _undersample(self) -> DataSettings:
        for label in self.undersample:
            if label not in self.label_names:
                raise ValueError(f"undersample: no label {label!r}{nearest(label, self.label_names)}")
        return self

    @property
    def sources(self) -> dict[str | None, list[str]]:
        """Split that is given → its sources; under None, the source that is divided among the other splits."""
        given = {None: self.source, "validation": self.validation_source, "test": self.test_source}
        return {
            split: [source] if isinstance(source, str) else list(source)
            for split, source in given.items()
            if source is not None
        }

    @property
    def shares(self) -> dict[str, float]:
        """Split → its share of `source`; 0 for a split with a source of its own. They sum to 1."""
        shares = {
            name: 0.0 if name in self.sources else getattr(self.split, name)
            for name in ("train", "validation", "test")
        }
        return {name: share / sum(shares.values()) for name, share in shares.items()}

    @property
    def label_map(self) -> dict[str, str]:
        """Value in the source (as text) → label."""
        return self.labels if isinstance(self.labels, dict) else {name: name for name in self.labels or ()}

    @property
    def label_names(self) -> list[str]:
        """The classes, in the order in which the configuration first names them: class i is the i-th."""
        return list(dict.fromkeys(self.label_map.values()))


def _label_key(value: Any) -> str:
    """A label value as the text it is compared by: 3, 3.0 and "3" are one, True is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


class ModelSettings(Section):
    """What is fine-tuned."""

    base: str
    """`sample://NAME`, a local directory, any storage URI, or a hub id."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence in tokens, special tokens included; longer texts are cut."""
    dropout: Share | None = None
    """Dropout of the encoder; None keeps what the base model's config says."""
    chat_template: str | None = None
    """chat: `chatml` or the file of a Jinja template; None takes the base model's own."""
    case_markers: bool = False
    """tagging: a token behind each word with capitals, for a base whose tokeniser makes everything small."""
    trust_remote_code: bool = False


class PreferenceSettings(Section):
    """Direct preference optimisation (`lib.tasks.preference`)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to its base: the larger, the closer it stays."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that is taken to be the wrong way round (conservative DPO, Mitchell 2023)."""
    length_normalised: bool = False
    """Compare log-probabilities per token instead of per answer."""
    sft: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's mean negative log-likelihood beside the loss (Pang et al. 2024)."""


class TrainingSettings(Section):
    """From a dataset to a model (`jobs.finetune`): Ray Train workers, each with a DeepSpeed engine."""

    workers: Positive | tuple[Positive, Positive] = 2
    """A number, or `[least, most]`: as many as the cluster has room for, changing with it."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage (Rajbhandari et al. 2020): 0 replicates, 1 shards optimiser state, 2 gradients too, 3 parameters too."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor or GPU has it, else fp32."""
    epochs: Positive = 3
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    tokens_per_batch: Positive = 2048
    """Padded tokens in one micro-batch of one worker."""
    accumulation: Positive = 1
    """Micro-batches between two optimiser steps."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of the gradient; 0 switches clipping off."""
    packing: bool | None = None
    """Several examples in one sequence of `model.max_length`, none of which sees another; None: where the task
    can (chat)."""
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = "none"
    """balanced: rows / (classes · rows of the class), or a weight for each label."""
    label_smoothing: Share = 0.0
    preference: PreferenceSettings = PreferenceSettings()
    validate_every: Literal["epoch"] | Positive = "epoch"
    """Validate after each epoch, or every N optimiser steps."""
    metric: str | None = None
    """The validation metric that decides which checkpoint is best and when to stop (`loss` and `perplexity` count
    down); None takes the task's own: macro_f1, or loss for chat."""
    patience: Positive | None = 2
    """Stop after this many validations without a better metric; None trains to the end."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as better."""
    shuffle_rows: Positive = 4096
    """Rows one worker holds while it shuffles and forms batches of like lengths."""
    log_every: Positive = 10
    checkpoint_every: Literal["validation"] | Positive = "validation"
    """Save what training can go on from at each validation, or every N optimiser steps. The best so far
    and the end are always saved."""
    keep_checkpoints: Positive = 1
    """How many of the best checkpoints are kept; the latest is kept besides."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a run goes on by itself, from its latest checkpoint, after a worker or a node failed; -1 is no limit."""
    resume: str | None = None
    """Id of a run to go on with, or `auto`: the latest unfinished run of this configuration, else a new one."""
    seed: int = 0
    ignore_plan: bool = False
    """Train even where the planner says that this machine's memory cannot hold it."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[least, most] must rise, not fall from {value[0]} to {value[1]}")
        return value

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Dimension(Section):
    """Values that one key may take in a search: exactly one of these."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    """Even over the exponents: for values such as a learning rate."""
    integer: tuple[int, int] | None = None
    """Both ends included."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = {name: value for name, value in self.__dict__.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {len(given)}")
        kind, value = self.chosen
        if kind != "choice" and value[0] >= value[1]:
            raise ValueError(f"{kind} must rise, not go from {value[0]:g} to {value[1]:g}")
        if kind == "log_uniform" and value[0] <= 0:
            raise ValueError(f"log_uniform must begin above 0, not at {value[0]:g}")
        return self

    @property
    def chosen(self) -> tuple[str, Any]:
        """Which kind it is, and its value."""
        return next((name, value) for name, value in self.__dict__.items() if value is not None)

    @property
    def ends(self) -> list[Any]:
        """Values that stand for all: both ends, or every choice."""
        return list(self.chosen[1])


class TuningSettings(Section):
    """How better settings are searched (`jobs.tune`), judged by `training.metric` on the validation split."""

    space: dict[str, Dimension] = {}
    """Key of `training` or `model` → what it may be, such as `training.learning_rate: {log_uniform: [1e-5, 1e-3]}`."""
    trials: Positive = 8
    algorithm: Literal["random", "tpe"] = "tpe"
    """tpe: values near those that were good, by Optuna; random: drawn independently."""
    scheduler: Literal["none", "asha"] = "asha"
    """asha: of the trials with as many validations, only the best 1 / `reduction` go on; none: all to their end."""
    grace: Positive = 1
    """Validations before a trial may be ended."""
    reduction: Annotated[int, Field(ge=2)] = 3
    concurrency: Positive | None = None
    """Trials at a time; None: as many as the cluster has room for."""
    resume: str | None = None
    """Id of an interrupted search to go on with."""
    seed: int = 0

    @field_validator("space")
    @classmethod
    def _space(cls, value: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in value:
            if key.partition(".")[0] not in ("training", "model"):
                raise ValueError(
                    f"{key!r} cannot be searched; keys of training and model can, such as training.learning_rate"
                )
        return value


REFUSALS = [
    r"^\W*(i'?m|i am|we'?re|we are) (very |so |really )?(sorry|afraid)\b",
    r"\b(i|we) (can'?t|cannot|can not|won'?t|will not|am unable to|'?m unable to|are unable to|'?m not able to|"
    r"am not able to) (help|assist|provide|answer|do|discuss|comply|fulfil|respond|offer|give|share|engage)\b",
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b",
    r"\bi (do not|don'?t) have (access|the ability|enough information|personal|information)\b",
]
"""Openings and phrases by which English models decline; apostrophes may be missing."""


class JudgeSettings(Section):
    """A model behind an OpenAI-compatible endpoint that compares answers, each pair in both orders."""

    url: str
    """Up to and with the version, such as http://127.0.0.1:8000/v1."""
    model: str
    key_variable: str = "WHORL_JUDGE_KEY"
    """Environment variable that holds the key; empty for an endpoint that wants none."""
    pairs: Positive = 100
    """Generated answers that are judged at most."""
    concurrency: Positive = 4
    max_tokens: Positive = 512
    timeout_s: Annotated[float, Field(gt=0)] = 120


class AnswerSettings(Section):
    """How generated answers are measured: chat alone reads it."""

    dialogues: Positive = 200
    """Test dialogues, evenly spaced, whose last answer is generated. Perplexity is over all of the split."""
    max_new_tokens: Positive = 128
    batch: Positive = 16
    """Dialogues that are generated at a time, their prompts padded on the left."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: probabilities in fp32, answers in bf16 where the processor or GPU has it."""
    refusals: list[str] = REFUSALS
    """Regular expressions, matched without regard to case: an answer that has one counts as a refusal."""
    shown: Positive = 20
    """Conversations on the report's page."""
    judge: JudgeSettings | None = None

    @field_validator("refusals")
    @classmethod
    def _refusals(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return value


class EvaluationSettings(Section):
    """How a run's model is measured on the test split (`jobs.evaluate`)."""

    run: str | None = None
    """Run id; None takes the latest finished fine-tuning run of this name."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Resamples behind the confidence interval."""
    calibration_bins: Positive = 15
    tokens_per_batch: Positive = 8192
    workers: Positive = 1
    """Actors that score the test split, each with the engine that `serving` chooses."""
    baseline_rows: Positive = 200_000
    """Training rows, evenly spaced, that the TF-IDF baseline is fitted on at most."""
    answers: AnswerSettings = AnswerSettings()


class PromotionSettings(Section):
    """When a candidate becomes champion (`jobs.promote`)."""

    run: str | None = None
    """Run id; None takes the latest evaluated run of this name."""
    metric: str | None = None
    """None: the one that decided the evaluation: `macro_f1`, for chat `perplexity`."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """How much better than each baseline and the present champion the metric must be."""
    require: bool = False
    """Fail (exit code 3) when the gate does not hold, instead of keeping the champion."""


class PlanSettings(Section):
    """What `jobs.plan` weighs up, and what it assumes. One value may stand where a list is asked for."""

    architecture: str | None = None
    """A model by name, such as `llama-7b`; None takes the shape of `model.base`."""
    head: Literal["auto", "vocabulary", "classes"] = "auto"
    """What the model ends in; auto: the vocabulary for the task `chat` and for a named decoder, else classes."""
    accelerator: Listed[str] = ["this", "t4", "l4", "a10g", "a100-40", "a100-80", "h100", "h200"]
    """Names of accelerators; `this` is the present machine."""
    workers: Listed[Positive] = [1, 2, 4, 8]
    zero_stage: Listed[Literal[0, 1, 2, 3]] = [0, 1, 2, 3]
    offload: Listed[Literal["none", "optimizer", "all"]] = ["none", "optimizer", "all"]
    """What lies in the host's memory: nothing, optimiser states, or in ZeRO-3 parameters too."""
    workers_per_host: Positive = 8
    host_memory_gib: Annotated[float, Field(gt=0)] = 1024
    """Memory of a host that has accelerators."""
    zero_init: bool = False
    """In ZeRO-3 each rank reads its own part of the model instead of building all of it."""
    sequence: Positive | None = None
    """Tokens in a sequence; None takes `model.max_length`."""
    tokens: Positive | None = None
    """Training tokens in one epoch; None takes those of the dataset."""
    trainable: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the parameters that is trained."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Model FLOPs utilisation: the share of the peak that training reaches."""
    network_gb_s: Annotated[float, Field(gt=0)] = 50
    """Gigabytes a second between two hosts."""
    storage_gb_s: Annotated[float, Field(gt=0)] = 1
    """Gigabytes a second that all workers together write to storage."""
    price: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Accelerator → price of one for an hour."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Recommend only what ends by then."""
    measure: bool = False
    """Measure this machine's matrix products and memory for some seconds, so that its times can be told."""


class ServingSettings(Section):
    """How the champion answers (`serve.deploy`)."""

    model: str | None = None
    """`NAME@champion`, `NAME@VERSION`; None follows the champion of this configuration's name."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    route_prefix: Annotated[str, Field(pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")] = "/"
    """Path under which the application answers; several applications share one port by it."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Positive | None = None
    """Threads of one replica's engine; None takes the machine's cores."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Positive = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    max_ongoing_requests: Positive = 64
    max_queued_requests: Annotated[int, Field(ge=-1)] = 256
    """Requests waiting beyond this are answered 503 at once; -1 is no bound."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    tokens_per_batch: Positive = 2048
    """Padded tokens that the engine computes at once."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    max_inputs: Positive = 256
    max_chars: Positive = 20_000
    max_body_bytes: Positive = 4_000_000

    @model_validator(mode="after")
    def _replicas(self) -> ServingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class Settings(Section):
    """One use, whole: what `jobs/configs/*.yaml` holds."""

    name: Name
    """Names the dataset, the runs and the registered model."""
    task: str
    """A module of `lib.tasks`."""
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings = TrainingSettings()
    tuning: TuningSettings = TuningSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    promotion: PromotionSettings = PromotionSettings()
    plan: PlanSettings = PlanSettings()
    serving: ServingSettings = ServingSettings()

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        known = task_names()
        if value not in known:
            raise ValueError(f"no task {value!r}{nearest(value, known)} (known: {', '.join(known)})")
        return value

    @model_validator(mode="after")
    def _markers(self) -> Settings:
        if self.model.case_markers and self.task != "tagging":
            raise ValueError(
                f"model.case_markers: {self.task} does not take them, only tagging does; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _weights(self) -> Settings:
        weights = self.training.class_weights
        if isinstance(weights, dict):
            for label in weights:
                if label not in self.data.label_names:
                    raise ValueError(
                        f"training.class_weights: no label {label!r}{nearest(label, self.data.label_names)}"
                    )
        return self


def task_names() -> list[str]:
    """The tasks there are: the modules of `lib/tasks`, found by looking, not by a list."""
    folder = Path(__file__).parent / "tasks"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file and apply overrides such as `["--training.epochs", "2"]`.

    Raises ConfigError, in one line, for a file that cannot be read, an unknown key (with the nearest
    known one), a wrong type or an impossible value.
    """
    values = _read_yaml(Path(path))
    for key, text in parse_overrides(overrides).items():
        _set(values, key, text)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--a.b value` and `--a.b=value` as {"a.b": "value"}."""
    parsed: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides look like --training.epochs 2")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        parsed[key.replace("-", "_")] = value
    return parsed


def override(settings: Settings, values: dict[str, Any], where: str) -> Settings:
    """The settings with dotted keys set to other values.

    Raises ConfigError, beginning with `where`, for an unknown key or a value that it cannot have.
    """
    changed = settings.model_dump(mode="json")
    for key, value in values.items():
        *parents, last = key.split(".")
        section = changed
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    try:
        return Settings.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one line: key, what is wrong, the mend."""
    lines: list[str] = []
    for finding in error.errors():
        line = _describe_one(finding)
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


def _describe_one(finding: Any) -> str:
    # Members of a union appear in the path (`labels.list[str].0`); a user knows only keys.
    path = [
        str(p)
        for p in finding["loc"]
        if not str(p).startswith(("dict[", "list[", "tuple[", "literal[", "constrained"))
    ]
    path = [p for p in path if p not in ("str", "int", "float")]
    key = ".".join(path)
    match finding["type"]:
        case "extra_forbidden":
            known = _known_keys(path[:-1])
            near = nearest(path[-1], known)
            return f"unknown key {key!r}{near or ' (known here: ' + ', '.join(known) + ')'}"
        case "missing":
            return f"{key} is missing; add it"
        case "value_error":
            message = str(finding["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case _:
            return f"{key}: {finding['msg'][0].lower()}{finding['msg'][1:]}, got {finding['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = Settings
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return []
        section = field.annotation
    return list(section.model_fields)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        raise ConfigError(f"no configuration file {path}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `task: sentiment`")
    return values


def _set(values: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for part in parents:
        child = values.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {part!r} is a value, not a section")
        values = child
    values[last] = value
