"""Keys of `data`: from raw rows to a dataset (`jobs.preprocess`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from lib.errors import nearest
from lib.settings.augmentation import AugmentSettings
from lib.settings.cleaning import CleanSettings, NearSettings, QuarantineSettings
from lib.settings.labelling import NoiseSettings
from lib.settings.recommend import InteractionSettings, ItemSettings, UserSettings
from lib.settings.redaction import RedactionSettings, switched
from lib.settings.sections import Format, Name, Positive, Section
from lib.settings.splitting import Split

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
    "asked",
    "passages",
    "rejected_messages",
    "rejected_input_ids",
    "rejected_labels",
    "reference_chosen",
    "reference_rejected",
    "length",
    "truncated",
    "row",
    # Of the blocks in which rows travel (lib/data/blocks.py).
    "fragment",
    "number",
    "position",
    "problem",
    "bad",
    "worth",
    # Of rows that were made of others (lib/data/augment).
    "augmented_from",
    "augmented_by",
    "split.group",
    "split.time",
}


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
    user: str = "user"
    """recommend: who did something."""
    item: str = "item"
    """recommend: with what."""
    time: str = "time"
    """recommend: when; seconds or milliseconds since 1970, or ISO 8601."""
    value: str | None = None
    """recommend: how it was rated, if it was."""
    event: str | None = None
    """recommend: what was done, such as view or buy, if that differs."""


def _label_values(value: Any) -> Any:
    # YAML reads `1: negative` with an integer key; sources hold 1, 1.0 or "1". All compare as text.
    if isinstance(value, dict):
        value = {_label_key(k): v for k, v in value.items()}
    elif isinstance(value, list):
        value = [_label_key(v) for v in value]
    if isinstance(value, (dict, list)) and not value:
        raise ValueError("at least one label is needed")
    return value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


# A password as it is in the URL of a database, and not by the name of an environment variable.
_PASSWORD = re.compile(
    r"(?:sqlite|postgresql)[^:/]*://[^/?#]*:(?!\$\{\w+\}@)[^/?#]*@|postgresql[^?]*\?.*password="
)

Labels = Annotated[dict[str, str] | list[str], BeforeValidator(_label_values)]
ClassWeights = Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]]


class Labelled(Section):
    """What has labels: the data, or one head."""

    labels: Labels | None = None
    """Value in the source → label, or the list of labels when the source already holds them.

    tagging: the kinds of entity, without B- and I-. chat has none.
    """

    @property
    def label_map(self) -> dict[str, str]:
        """Value in the source (as text) → label."""
        return self.labels if isinstance(self.labels, dict) else {name: name for name in self.labels or ()}

    @property
    def label_names(self) -> list[str]:
        """The classes, in the order in which the configuration first names them: class i is the i-th."""
        return list(dict.fromkeys(self.label_map.values()))


class HeadSettings(Labelled):
    """One of several answers that a model gives about a text, such as its topic beside its sentiment."""

    column: str
    """Of the source. A row without a value is not learned from by this head."""
    labels: Labels
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How much an answer of this head counts in the loss."""
    class_weights: ClassWeights | None = None
    """None: `training.class_weights`."""


class SourceSettings(Section):
    """One of several sources, with what is its own."""

    uri: str
    """As `data.source`."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often a pass over the training split has each of its rows: 0.3 takes 30% of them, 2 each twice, 1.5 half of
    them twice. The other splits have each once."""
    columns: dict[str, str] = {}
    """Those of `data.columns`, heads and slices that are called otherwise here."""
    labels: dict[str, str] | None = None
    """Value in this source → one of the labels of all; None: as `data.labels` has it."""
    format: Format | None = None
    """None: `data.format`."""
    query: str | None = None
    """Where it is a database; None: `data.query`."""

    @field_validator("labels", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        return _label_values(value) if isinstance(value, dict) else value


def _kind_of_source(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "list[source]"
    return "dict[source]" if isinstance(value, (dict, SourceSettings)) else "str"


# The member that is meant is told by its kind, so that a mistake in it is told alone.
_OneSource = Annotated[
    Annotated[str, Tag("str")] | Annotated[SourceSettings, Tag("dict[source]")],
    Discriminator(_kind_of_source),
]
Sources = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[SourceSettings, Tag("dict[source]")]
    | Annotated[list[_OneSource], Field(min_length=1), Tag("list[source]")],
    Discriminator(_kind_of_source),
]


class DataSettings(Labelled):
    """From raw rows to a dataset (`jobs.preprocess`)."""

    source: Sources | None = None
    """URI, glob, folder or zip archive of CSV, JSON, Parquet, Arrow, CoNLL columns or plain text, or `sample://NAME`; several
    are read in order, each a URI or a mapping of `uri`, `weight`, `columns`, `labels`, `format` and `query`."""
    query: str | None = None
    """Where `source` is a database, `sqlite:///shop.db` or `postgresql://user@host/name`: the SELECT whose rows are read."""
    validation_source: Sources | None = None
    """Where the validation split is given; None takes a share of `source`."""
    test_source: Sources | None = None
    """Where the test split is given; None takes a share of `source`."""
    format: Format = "auto"
    """Of all files; auto goes by each file's ending. Plain text has a row a line (`text`), a paragraph (`paragraphs`) or a
    file (`documents`)."""
    columns: Columns = Columns()
    templates: dict[str, str] = {}
    """Column → what it is made of, before a task sees it: `{text: "{title}\\n{body}"}`. `{{` is a brace."""
    dialogue: Literal["auto", "messages", "sharegpt", "alpaca", "pair"] = "auto"
    """chat: the form of the source's dialogues (`lib.dialogues`); auto goes by its columns."""
    heads: dict[Name, HeadSettings] = {}
    """sentiment: several heads on one encoder, instead of `labels` and `columns.label`. The first is the main one."""
    grounded: bool = False
    """chat: give each dialogue the passages that `serving.knowledge` finds for its last question, so that the model is
    trained on what it will see."""
    quarantine: QuarantineSettings = QuarantineSettings()
    """How many rows may be left out since they cannot be read, labelled or encoded."""
    redact: Annotated[RedactionSettings | None, BeforeValidator(switched)] = RedactionSettings()
    """Personal data is replaced before anything is hashed, split or written; false keeps it."""
    duplicates: Literal["drop", "keep"] = "drop"
    """keep: as they are, where the splits of a published data set are given and its figures are compared."""
    near: NearSettings = NearSettings()
    leakage: Annotated[Literal["check", "report", "off"], BeforeValidator(_off)] = "check"
    """check: near duplicates fall into one split, and a row that resembles one of a given split behind its own (train,
    validation, test) is left out. report: such rows are counted, and stay where they are."""
    clean: CleanSettings = CleanSettings()
    label_noise: NoiseSettings = NoiseSettings()
    """sentiment: which training rows are most likely labelled wrongly."""
    slices: dict[str, str] = {}
    """Name → source column: carried along so that evaluation reports each value on its own."""
    limit: Positive | None = None
    """Take only the first rows of the source, and of the source of each split that has its own."""
    split: Split = Split()
    undersample: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Label → share of its training rows that is kept, where one class outnumbers the others; validation and
    test stay as they are."""
    augment: AugmentSettings | None = None
    """New training rows, made of those that there are."""
    rows_per_shard: Positive = 20_000
    items: ItemSettings | None = None
    """recommend: the catalogue."""
    users: UserSettings | None = None
    """recommend: what is known of users."""
    interactions: InteractionSettings = InteractionSettings()
    """recommend: which rows of the source count, and which are held out."""
    parts: dict[Name, Part] = {}
    """multitask: the data sets that one encoder is trained on, each with a source, columns and labels of its own."""
    temperature: Annotated[float, Field(ge=1)] = 1.0
    """multitask: T; a part of n training rows is drawn with a probability that goes by n^(1/T). 1 is its share,
    and the larger T, the more even."""

    @field_validator("source", "validation_source", "test_source")
    @classmethod
    def _no_password(cls, value: Any) -> Any:
        for source in value if isinstance(value, list) else [value]:
            uri = source.uri if isinstance(source, SourceSettings) else source or ""
            if _PASSWORD.match(uri):
                raise ValueError(
                    "a database's password does not belong into a configuration, which every run keeps; put it into the "
                    "environment and write ${NAME} in its place"
                )
        return value

    @field_validator("slices")
    @classmethod
    def _slices(cls, value: dict[str, str]) -> dict[str, str]:
        taken = {name for name in value if name in RESERVED_COLUMNS or name.startswith("label:")}
        if taken:
            raise ValueError(
                f"slice name {sorted(taken)[0]!r} is the name of a dataset column; choose another"
            )
        return value

    @model_validator(mode="after")
    def _source_or_parts(self) -> DataSettings:
        if self.source is None and not self.parts:
            raise ValueError("source is missing; add it")
        if self.parts and (self.source is not None or self.labels or self.heads):
            raise ValueError("each of the parts has a source and labels of its own; leave them out here")
        return self

    @model_validator(mode="after")
    def _split(self) -> DataSettings:
        if self.parts and self.split.by != "random":
            raise ValueError("split: each of the parts is split by itself; say there how")
        if self.parts and self.augment:
            raise ValueError("augment: each of the parts is augmented by itself; say there how")
        for name in self.split.dates:
            if name in self.sources:
                raise ValueError(
                    f"split.{name}_from would leave nothing to {name}_source, which gives the {name} split; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _labels_or_heads(self) -> DataSettings:
        if self.heads and self.labels:
            raise ValueError("give labels or heads, not both")
        return self

    @model_validator(mode="after")
    def _near(self) -> DataSettings:
        if self.near.duplicates == "drop" and self.duplicates == "keep":
            raise ValueError("near.duplicates: drop would leave the exact ones; set duplicates: drop too")
        if self.near.semantic is not None and self.near.duplicates == "keep" and not self.checks_leakage:
            raise ValueError(
                "near.semantic: nothing is compared; set near.duplicates: drop, or leakage: check with several splits"
            )
        return self

    @model_validator(mode="after")
    def _balance(self) -> DataSettings:
        if self.augment and self.augment.balance and self.heads:
            raise ValueError("augment.balance: a row of several heads has no single label; leave it out")
        return self

    @model_validator(mode="after")
    def _undersample(self) -> DataSettings:
        if self.undersample and self.heads:
            raise ValueError("undersample: a row of several heads has no single label; leave it out")
        for label in self.undersample:
            if label not in self.label_names:
                raise ValueError(f"undersample: no label {label!r}{nearest(label, self.label_names)}")
        return self

    @model_validator(mode="after")
    def _own(self) -> DataSettings:
        known = [*Columns.model_fields, *self.heads, *self.slices]
        for split, entries in self.sources.items():
            for place, entry in enumerate(entries):
                where = f"{split}_source.{place}" if split else f"source.{place}"
                for name in entry.columns:
                    if name not in known:
                        raise ValueError(f"{where}.columns: no column {name!r}{nearest(name, known)}")
                for label in (entry.labels or {}).values():
                    if label not in self.label_names:
                        raise ValueError(
                            f"{where}.labels: no label {label!r}{nearest(label, self.label_names)}"
                        )
                if split and entry.weight != 1:
                    raise ValueError(f"{where}.weight: it counts in training alone; leave it out")
        return self

    @property
    def sources(self) -> dict[str | None, list[SourceSettings]]:
        """Split that is given → its sources; under None, the source that is divided among the other splits."""
        given = {None: self.source, "validation": self.validation_source, "test": self.test_source}
        return {
            split: [self._entry(one, split) for one in (source if isinstance(source, list) else [source])]
            for split, source in given.items()
            if source is not None
        }

    def _entry(self, source: str | SourceSettings, split: str | None) -> SourceSettings:
        """With what holds for all where it says nothing."""
        entry = SourceSettings(uri=source) if isinstance(source, str) else source
        query = entry.query if split else entry.query or self.query
        return entry.model_copy(update={"format": entry.format or self.format, "query": query})

    @property
    def shares(self) -> dict[str, float]:
        """Split → its share of `source`; 0 for a split with a source of its own. They sum to 1. Where splits begin at dates,
        nobody knows their shares: those that have rows at all have the same."""
        given = {name: getattr(self.split, name) for name in ("train", "validation", "test")}
        if self.split.dates:
            given = {name: float(name == "train" or name in self.split.dates) for name in given}
        shares = {name: 0.0 if name in self.sources else share for name, share in given.items()}
        return {name: share / sum(shares.values()) for name, share in shares.items()}

    @property
    def checks_leakage(self) -> bool:
        """Whether near duplicates are looked for that lie in several splits."""
        return self.leakage != "off" and (len(self.sources) > 1 or max(self.shares.values()) < 1)

    @property
    def class_names(self) -> list[str]:
        """`label_names`; `HEAD/LABEL` of all heads where there are several."""
        if not self.heads:
            return self.label_names
        return [f"{name}/{label}" for name, head in self.heads.items() for label in head.label_names]


class Part(DataSettings):
    """One of the data sets of a multitask run."""

    task: Literal["sentiment", "tagging"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How much a row of it counts in the loss."""
    metric: str = "macro_f1"
    """What decides when its model is promoted."""

    @model_validator(mode="after")
    def _flat(self) -> Part:
        if self.parts:
            raise ValueError("a part has no parts of its own")
        return self


DataSettings.model_rebuild()


def _label_key(value: Any) -> str:
    """A label value as the text it is compared by: 3, 3.0 and "3" are one, True is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
