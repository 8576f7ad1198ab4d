"""What is said and answered on serve/opinions.py's routes."""

# Without `from __future__ import annotations`: FastAPI reads the annotations as types.

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, create_model

from lib.settings import ServingSettings
from lib.tasks import sentiment as task
from lib.times import Moment

# Lines of text without control characters, for which the database has room.
Line = r"^[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$"
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=Line)]
Identity = Annotated[str, Field(min_length=1, max_length=128, pattern=Line)]

EXAMPLE: dict[str, Any] = {
    "documents": [
        {
            "text": "The zip broke on the first day.",
            "time": "2026-03-01T09:00:00Z",
            "source": "reviews",
            "entity": "acme",
            "topic": "jackets",
        }
    ]
}


class Document(BaseModel):
    """Something that was said of somebody."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(min_length=1)]
    time: Moment
    """When it was said."""
    source: Name
    entity: Name
    """Of whom or what it speaks."""
    id: Identity | None = None
    """One that was sent before is not counted again; None makes one of the other values."""
    topic: Name | None = None
    """None: what the model's topic head says, if it has one."""


class Opinions(BaseModel):
    """Documents to score, keep and watch."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})
    documents: Annotated[list[Document], Field(min_length=1)]


class Scored(task.Answer):
    id: str
    topic: str | None


class OpinionsResponse(BaseModel):
    """Answers in the order of the documents."""

    results: list[Scored]
    new: int
    """How many were not there yet."""
    model: str
    version: int
    request_id: str


class Sums(BaseModel):
    documents: int
    """Copies of one story count once."""
    negative: int
    share: float
    """negative / documents."""
    mean_score: float
    """Mean probability of the negative label."""


class Bucket(Sums):
    begins: AwareDatetime
    window: Sums
    """The window of `monitoring.window_hours` that ends with this bucket."""


class Series(BaseModel):
    entity: str
    topic: str | None
    buckets: list[Bucket]
    """Those that hold documents."""


class TrendsResponse(BaseModel):
    since: AwareDatetime
    until: AwareDatetime
    bucket_minutes: int
    window_minutes: int
    series: list[Series]
    """The largest first."""


class Window(BaseModel):
    begins: AwareDatetime
    ends: AwareDatetime


class Delivery(BaseModel):
    id: str
    url: str
    """Without its path."""
    state: str
    """waiting, delivered or given up."""
    attempts: int
    outcome: str | None
    """Of the last attempt."""


class AlertResponse(BaseModel):
    """A surge of negative opinion (lib/opinions/detect.py says what the figures are)."""

    id: str
    application: str
    entity: str
    topic: str | None
    window: Window
    rules: list[str]
    documents: int
    negative: int
    share: float
    usual: float
    z: float
    cusum: float
    samples: list[str]
    """Ids of some of the negative documents."""
    created: AwareDatetime
    deliveries: list[Delivery]


class AlertsResponse(BaseModel):
    alerts: list[AlertResponse]
    """The latest first."""


def limited_opinions(serving: ServingSettings) -> type[Opinions]:
    """The request with the limits of this deployment, so that its documentation shows them."""
    text = Annotated[str, Field(min_length=1, max_length=serving.max_chars)]
    document = create_model("Document", __base__=Document, text=(text, ...))
    documents = Annotated[list[document], Field(min_length=1, max_length=serving.max_inputs)]  # type: ignore[valid-type]
    return create_model("Opinions", __base__=Opinions, documents=(documents, ...))
