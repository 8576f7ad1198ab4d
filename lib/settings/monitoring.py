"""Keys of `monitoring`: opinions over time, surges of negative ones, and who is told of them."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from lib.errors import nearest
from lib.settings.sections import Positive, Section, Share

Hours = Annotated[float, Field(gt=0)]


class WebhookSettings(Section):
    """Where alerts are sent to (lib/opinions/webhooks.py)."""

    url: str
    secret_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """The environment variable, where the replicas run, that holds the secret of the signature."""
    attempts: Positive = 14
    """An alert that was refused so often is given up; with the waiting times between, half a day."""
    timeout_s: Annotated[float, Field(gt=0)] = 10

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port  # raises for one that is none
        except ValueError as error:
            raise ValueError(f"{value!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"{value!r} must be an http or https URL with a host")
        if parts.username is not None or parts.fragment or any(c.isspace() for c in value):
            raise ValueError("a URL holds neither user name and password nor a fragment nor blanks")
        return value


class OpinionColumns(Section):
    """Names of the columns in a replayed history. `time`, `source` and `entity` must be there, and `text` or `label`."""

    time: str = "time"
    """ISO 8601 with an offset from UTC (2026-03-01T09:00:00Z), or seconds since 1970."""
    source: str = "source"
    entity: str = "entity"
    id: str = "id"
    topic: str = "topic"
    text: str = "text"
    label: str = "label"
    """What a model said already; without it the model is asked."""
    score: str = "score"
    """Probability of the negative label; without it 1 or 0, by the label."""


class PlantSettings(Section):
    """Surges that are put into a replayed history, to see whether they are found."""

    surges: Annotated[int, Field(ge=0)] = 0
    """How many, spread over all topics and entities; 0 replays the history as it is."""
    size: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """By how much the share of negative documents rises, such as 0.2 from 15% to 35%."""
    hours: Hours = 12
    seed: int = 0


class ReplaySettings(Section):
    """What `jobs.monitor` replays."""

    source: str | Annotated[list[str], Field(min_length=1)] | None = None
    """URI, glob or folder of CSV, JSON Lines or Parquet; None takes the opinions in the database."""
    columns: OpinionColumns = OpinionColumns()
    plant: PlantSettings = PlantSettings()


class MonitoringSettings(Section):
    """Opinions by topic and entity over time, and alerts on surges of negative ones (lib/opinions/).

    Given, even as `{}`, it makes a sentiment application take opinions; left out, it does not.
    """

    negative: str = "negative"
    """Label of the (first) head that is a negative opinion."""
    topic_head: str = "topic"
    """The head whose label is the topic of documents that come without one; where a model has no such head there is
    none."""
    bucket_minutes: Positive = 60
    """Opinions are counted in steps of so long."""
    window_hours: Hours = 6
    """The share of negative ones is that of a window of so long, which slides by one bucket."""
    season_hours: Hours = 168
    """What is usual is looked up at the same time of earlier seasons: 168 the same hour of the week, 24 of the day."""
    seasons: Positive = 8
    """So many seasons back."""
    shrinkage: Annotated[float, Field(ge=0)] = 4
    """How many seasons what was usual at any time is worth beside what was usual at the same time."""
    min_history_hours: Hours = 48
    """Nothing is a surge before so long after a series' first document."""
    min_documents: Positive = 20
    """Nothing is a surge in a window of fewer; copies of one story count once."""
    z: Annotated[float, Field(gt=0)] = 3.5
    """Threshold of the robust z-score of a window's share."""
    cusum_slack: Annotated[float, Field(ge=0)] = 0.5
    cusum_limit: Annotated[float, Field(gt=0)] = 8
    """k and h of the one-sided CUSUM, in standard errors: a rise by 2k is what it finds soonest."""
    cooldown_hours: Hours = 24
    """After an alert the same topic and entity raise none for so long."""
    lateness_minutes: Annotated[float, Field(ge=0)] = 10
    """A bucket is looked at so long after its end. What comes later still counts, and is looked at again."""
    every_s: Annotated[float, Field(gt=0)] = 15
    """How often serving looks for surges and for alerts to send."""
    min_rise: Share = 0.05
    """A share that is above the usual by less is no surge, however sure it is."""
    webhooks: list[WebhookSettings] = []
    replay: ReplaySettings = ReplaySettings()

    @model_validator(mode="after")
    def _whole_buckets(self) -> MonitoringSettings:
        for name in ("window_hours", "season_hours"):
            minutes = getattr(self, name) * 60
            if minutes < self.bucket_minutes or abs(minutes / self.bucket_minutes % 1) > 1e-9:
                raise ValueError(
                    f"{name} {getattr(self, name):g} must be a multiple of bucket_minutes {self.bucket_minutes}"
                )
        if self.window_hours >= self.season_hours:
            raise ValueError(
                f"window_hours {self.window_hours:g} must be below season_hours {self.season_hours:g}"
            )
        return self

    @property
    def bucket_s(self) -> int:
        return self.bucket_minutes * 60

    def buckets(self, hours: float) -> int:
        """Hours as whole buckets, at least one."""
        return max(1, round(hours * 60 / self.bucket_minutes))

    def check_labels(self, labels: list[str]) -> None:
        """Raises ValueError when none of a model's labels is the negative one."""
        if self.negative not in labels:
            raise ValueError(
                f"monitoring.negative: no label {self.negative!r}{nearest(self.negative, labels)} "
                f"(labels: {', '.join(labels)})"
            )
