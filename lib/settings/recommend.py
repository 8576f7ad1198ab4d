"""Keys of `data` that only recommendation has: what can be recommended, who asks, and what counts as interest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.settings.sections import Format, Listed, Positive, Section, Share


class TableSettings(Section):
    """Rows that say something of an item or a user."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """As `data.source`."""
    id: str
    """Column that names the item or the user, as `data.columns` has them."""
    format: Format = "auto"
    categories: list[str] = []
    """Columns that hold a category, or several in one value."""
    separator: str = "|"
    """What stands between several categories."""
    numbers: list[str] = []
    """Columns of numbers. An empty one is the mean of the others."""

    @property
    def columns(self) -> dict[str, str]:
        """Name here → column of the source."""
        several = {"text": getattr(self, "text", []), "categories": self.categories, "numbers": self.numbers}
        return {"id": self.id} | {
            f"{name}.{place}": column
            for name, columns in several.items()
            for place, column in enumerate(columns)
        }


class ItemSettings(TableSettings):
    """`data.items`: the catalogue, a row an item."""

    id: str = "item"
    text: Listed[str] = ["title"]
    """Columns that the encoder reads, one after the other; the first is what an item is called."""


class UserSettings(TableSettings):
    """`data.users`: what is known of users besides what they do."""

    id: str = "user"


class InteractionSettings(Section):
    """Which rows of `data.source` count, and which of them are held out."""

    least_value: float | None = None
    """Of `columns.value`, such as a rating: rows below it show no interest and are left out."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Value of `columns.event` → how much such a row counts in training. Rows of other events are left out;
    without any, all count 1."""
    least_per_user: Positive = 1
    """Users and items with fewer interactions are left out, again and again until none is left to leave out (a k-core)."""
    least_per_item: Annotated[int, Field(ge=0)] = 0
    """0 keeps items that nobody has touched: they are recommended by their text."""
    split: Literal["last", "time"] = "last"
    """last: of each user the last interaction for test, the one before it for validation. time: everything after
    one moment for validation and after a later one for test, so that `data.split` has its shares."""
    refit: bool = False
    """Training learns what is to be foreseen in validation too, and only test is held out: for a last run, when the other has
    told the number of steps (`training.max_steps`) and `model.recommender.new_bias`. Validation tells nothing then."""
    new_items: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of items that training never sees, for figures of what is new in the catalogue."""
    new_users: Share = 0.0
    """Share of users of whom training sees nothing."""

    @model_validator(mode="after")
    def _some_users(self) -> InteractionSettings:
        if self.new_users > 0.5:
            raise ValueError("new_users must be at most 0.5: the others are what is learned from")
        return self


class OfferSettings(Section):
    """`serving.recommend`: what may be shown, and how an answer is put together (lib/recommender/shelf.py)."""

    block: list[str] = []
    """Items that are never shown."""
    caps: dict[str, Positive] = {}
    """Column of `data.items.categories` → how many items of one of its values an answer may hold."""
    diversity: Share = 0.0
    """How much being unlike the items before it counts against the score, where a request does not say (maximal marginal
    relevance, Carbonell and Goldstein 1998); 0 goes by the score alone."""
    explore: Share = 0.0
    """Share of places that go to an item drawn evenly from the pool; how likely each item was is told, for estimates of what
    other models would have earned."""
    pool: Annotated[int, Field(ge=10)] = 200
    """The best items, from which diversity, caps and exploration choose."""
    least_recall: Share = 0.95
    """How many of the exact answer's best a model directory's index must have found when it was measured
    (`model.recommender.exact_items`); of one that found fewer no use is made: each request looks at all items."""
