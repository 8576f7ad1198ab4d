"""What is asked of a recommender and what it answers, over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lib.times import Moment

Id = Annotated[str, Field(min_length=1, max_length=200)]
# Strict: by itself pydantic takes "0.5", true and "yes" for numbers and switches, which the description does not say.
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
MOST_HISTORY = 10_000
MOST_ITEMS = 1_000


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Did(Form):
    """Something that was done with an item."""

    item: Id
    event: Annotated[str, Field(max_length=200)] | None = None
    """What was done, such as view or buy; not needed where the model knows one only."""
    time: Moment | None = None
    """When; an interaction without follows the one before it at once."""


class FilterForm(Form):
    """What may be shown: items of one of the values of each column, with numbers inside the ranges."""

    categories: dict[str, Annotated[list[str], Field(min_length=1, max_length=100)]] = {}
    """Column → values."""
    numbers: dict[str, tuple[Number | None, Number | None]] = {}
    """Column → least and most; null is no end."""


class Who(Form):
    """For whom: a user whose interactions were sent here, or a history."""

    user_id: Id | None = None
    history: Annotated[list[Id | Did], Field(max_length=MOST_HISTORY)] | None = None
    """The earliest first; ids of items, or what was done with them when."""
    context: dict[str, str | Number] = {}
    """What is known of the user, by the columns of the table of users that the model learned from."""
    k: Annotated[int, Field(ge=1, le=MOST_ITEMS, strict=True)] = 10
    filters: FilterForm = FilterForm()
    exclude_seen: Switch = True
    """Leave out what the history has."""


class Request(Who):
    """What to show next."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"history": ["50", "181"], "k": 5, "diversity": 0.2}]}
    )
    diversity: Share | None = None
    """How much being unlike what is shown before it counts against an item's score; null: as the application is set."""

    @model_validator(mode="after")
    def _somebody(self) -> Request:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give user_id or history, one of them; of somebody unknown history is []")
        return self


class SearchRequest(Who):
    """Items by words, those before others that suit the user."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"query": "space adventure", "history": ["50"]}]}
    )
    query: Annotated[str, Field(min_length=1, max_length=1_000)]
    taste: Share = 0.3
    """How much the user's taste counts beside the words."""

    @model_validator(mode="after")
    def _not_both(self) -> SearchRequest:
        if self.user_id is not None and self.history is not None:
            raise ValueError("give user_id or history, not both")
        return self


class Named(BaseModel):
    item: str
    title: str


class Reason(BaseModel):
    """Why: what of the history is most like it, and words and categories that they have in common."""

    because: list[Named]
    words: list[str]


class Recommended(Named):
    score: float
    """A logit: higher is better."""
    probability: float
    """Of being what the user turns to next, among all items that may be shown; where an index is asked, what the items that it
    did not read have of it is estimated."""
    propensity: float
    """How likely it was to be shown at this place; below 1 where the application explores."""
    reason: Reason


class Response(BaseModel):
    """Best first."""

    results: list[Recommended]
    unknown: list[str]
    """Items of the history that are not in the catalogue, and were left out."""
    model: str
    version: int
    request_id: str


class Similar(Named):
    similarity: float
    """Cosine of the two items' vectors."""


class SimilarResponse(BaseModel):
    results: list[Similar]
    model: str
    version: int
    request_id: str


class Found(Named):
    score: float
    similarity: float
    """Cosine of what the words and the item mean."""


class SearchResponse(BaseModel):
    results: list[Found]
    unknown: list[str]
    model: str
    version: int
    request_id: str


class InteractionForm(Form):
    user_id: Id
    item: Id
    event: Annotated[str, Field(max_length=200)] | None = None
    time: Moment | None = None
    """When; now, where it is not said."""
    id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Of the event: sent again, it counts once. One without has that of what it says."""


class ItemForm(Form):
    item: Id
    title: Annotated[str, Field(min_length=1, max_length=2_000)]
    text: Annotated[str, Field(max_length=20_000)] = ""
    categories: dict[str, Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)]] = {}
    """Column → values."""
    numbers: dict[str, Number] = {}
    available: Switch = True
    """false takes it off the shelf."""


class InteractionsRequest(Form):
    """Each is looked at by itself: the good ones are taken, the bad ones told."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"interactions": [{"user_id": "u1", "item": "50", "id": "e1"}]}]},
    )
    interactions: Annotated[list[Any], Field(min_length=1, max_length=MOST_ITEMS)]
    """Of the form {user_id, item, event, time, id}."""


class ItemsRequest(Form):
    """As InteractionsRequest."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"items": [{"item": "new-1", "title": "Space Kittens"}]}]},
    )
    items: Annotated[list[Any], Field(min_length=1, max_length=MOST_ITEMS)]
    """Of the form {item, title, text, categories, numbers, available}."""


class Refused(BaseModel):
    index: int
    """Place in the batch, from 0."""
    message: str


class InteractionsResponse(BaseModel):
    taken: int
    new: int
    """Of those taken, how many were not there yet."""
    unknown: list[str]
    """Items that are not in the catalogue; they count when they come."""
    refused: list[Refused]
    request_id: str


class ItemsResponse(BaseModel):
    taken: int
    refused: list[Refused]
    request_id: str
