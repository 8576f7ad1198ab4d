"""Keys of `label`: from texts without labels to a labelled source (`jobs.label`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.errors import nearest
from lib.settings.embedding import EmbedderSettings
from lib.settings.endpoint import EndpointSettings
from lib.settings.sections import Listed, Positive, Section, Share

# A chat model answers with a letter.
MOST_CHOICES = 26


class RuleSettings(Section):
    """A rule that votes for one label where a text matches, and says nothing of other texts."""

    name: Annotated[str, Field(min_length=1)]
    """As the report calls it."""
    label: str
    """Of `data.labels`; HEAD/LABEL where `data.heads` are several."""
    keywords: list[Annotated[str, Field(min_length=1)]] = []
    """Words or phrases, whole and in any case; in a language without spaces between words, anywhere."""
    pattern: str | None = None
    """A regular expression (RE2) instead; `(?i)` at its beginning ignores case."""
    accuracy: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """How often it is right where it speaks: what its vote weighs, or, where that is estimated, what is thought before."""

    @model_validator(mode="after")
    def _one_of_both(self) -> RuleSettings:
        if bool(self.keywords) == (self.pattern is not None):
            raise ValueError(f"rule {self.name!r} needs keywords or a pattern, one of both")
        return self


class EmbeddingLabels(EmbedderSettings):
    """Labels by how near a text lies to what describes them (`label.descriptions`)."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Cosines are divided by it before the softmax; where there are gold rows, they correct it."""


class ChatLabels(EndpointSettings):
    """Labels that a chat model is asked for, one text at a time."""

    max_tokens: Positive = 16
    """Of an answer: a letter and a number."""
    workers: Positive = 1
    """Actors that ask, each `concurrency` texts at a time."""
    logprobs: bool = True
    """Go by the probabilities of the letters where the endpoint tells them; else by how sure the model says that it is."""
    characters: Positive = 4000
    """Of a longer text only so many are shown."""


class LabelSettings(Section):
    """Who labels, and which rows people are asked about."""

    rules: list[RuleSettings] = []
    """Each row is labelled by those that match; several vote."""
    accuracies: Literal["given", "agreement", "gold"] = "given"
    """What a rule's vote weighs goes by how often it is right: as `rules` say, estimated from how the rules agree with one
    another, or measured on the rows of the source that have a label."""
    descriptions: dict[str, Listed[str]] = {}
    """Label (HEAD/LABEL where there are several heads) → a sentence or several that say what it is about; for
    `embedding` and `chat`. The label's own name where it has none."""
    embedding: EmbeddingLabels | None = None
    chat: ChatLabels | None = None
    threshold: Share = 0.8
    """Least confidence of a label that no person has given."""
    tasks: Annotated[int, Field(ge=0)] = 500
    """Rows that are exported for people at most, the least sure first."""
    annotations: Listed[str] | None = None
    """Exports of Label Studio, JSON or JSON_MIN: URIs, globs or folders. What people say goes before everything else."""
    sample: Positive = 20_000
    """Rows, chosen by their hash, from which accuracies and temperatures are estimated at most."""
    rows_per_shard: Positive = 5_000
    """Rows that one worker labels at a time."""

    @model_validator(mode="after")
    def _names(self) -> LabelSettings:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"rules: {name!r} is there twice")
        return self

    def check_labels(self, known: Sequence[str], most_of_a_head: int) -> None:
        """Raises ValueError for a label that the data has not, `known` as `data.class_names`."""
        for rule in self.rules:
            if rule.label not in known:
                raise ValueError(
                    f"label.rules: {rule.name!r} votes for {rule.label!r}, which is no label{nearest(rule.label, known)} "
                    f"(known: {', '.join(known)})"
                )
        for label in self.descriptions:
            if label not in known:
                raise ValueError(f"label.descriptions: no label {label!r}{nearest(label, known)}")
        if self.chat is not None and most_of_a_head > MOST_CHOICES:
            raise ValueError(
                f"label.chat: {most_of_a_head} labels of a head are more than the {MOST_CHOICES} that it can be asked "
                f"to choose from"
            )


class NoiseSettings(Section):
    """Training rows that are most likely labelled wrongly (`lib.data.noise`), told and left as they are."""

    report: bool = False
    rows: Positive = 50
    """Rows of each head that the manifest lists at most, the likeliest to be wrong first."""
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    """Each is judged by a model of the others."""
    sample: Annotated[int, Field(ge=100)] = 20_000
    """Training rows that are looked at at most, chosen by their hash: memory and time go by it."""
    tasks: bool = False
    """Leave the listed rows as tasks for Label Studio beside the manifest."""
