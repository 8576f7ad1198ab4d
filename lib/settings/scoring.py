"""Keys of `score`: files scored in batch (`jobs.score`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from lib.settings.redaction import RedactionSettings, switched
from lib.settings.sections import Format, Positive, Section, Share

# Columns that every shard of scores has.
SCORED_COLUMNS = ("file", "row", "problem")


class ScoreSettings(Section):
    """Which files a registered model scores, and where the scores go (`jobs.score`)."""

    source: str | Annotated[list[str], Field(min_length=1)] | None = None
    """URI, glob or folder as in `data.source`, or several; only the columns that a request is made of are needed."""
    format: Format = "auto"
    """Of all files; auto goes by each file's ending."""
    model: str | None = None
    """`NAME@champion`, `NAME@VERSION`; None takes the champion of this configuration's name."""
    output: str | None = None
    """Folder that is made; None: scores/NAME/FINGERPRINT in storage."""
    keep: dict[str, str] = {}
    """Name → column of the source that is carried into the output, such as `{order: order_id}`."""
    bad_rows: Share = 0.1
    """Share of the rows that may be bad (without a text, of a wrong form, too long); with more, nothing is left."""
    limit: Positive | None = None
    """Take only the first rows of the source."""
    rows_per_shard: Positive = 10_000
    """Rows of one shard, which one worker scores."""
    workers: Positive = 1
    """Actors that score, each with the engine that `serving` chooses."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """chat: auto takes vLLM, which serves it too, where it is installed and the models lie on a disk that all machines
    see; transformers starts sooner."""
    max_tokens: Positive = 256
    """chat: the most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """chat: 0 takes the likeliest token each time."""
    redact: Annotated[RedactionSettings | None, BeforeValidator(switched)] = None
    """The model is asked what has no personal data, and so are the scores (the section is that of `data.redact`); columns of
    `keep` stay. Not by default: then the model is asked what it is asked when it serves."""

    @field_validator("keep")
    @classmethod
    def _keep(cls, value: dict[str, str]) -> dict[str, str]:
        for name in SCORED_COLUMNS:
            if name in value:
                raise ValueError(f"{name!r} is the name of a column of the scores; choose another")
        return value

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source or ())
