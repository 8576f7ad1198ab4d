"""Keys of `data.split`: which rows train, which validate and which test."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from lib import times
from lib.settings.sections import Section, Share


def _instant(value: Any) -> Any:
    """YAML reads `2024-03-01` as a date and `2024` as a number."""
    if isinstance(value, date | datetime):
        value = value.isoformat()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        times.seconds(value, assume_utc=True)
    return value


# Of train, validation and test, where nothing is said.
SHARES = (0.8, 0.1, 0.1)
Instant = Annotated[str, BeforeValidator(_instant)]


class Split(Section):
    """Shares of the rows; a row's place depends on its text and the seed alone, where nothing else is said.

    A split with a source of its own takes no part: the others share the rows in the same proportion.
    """

    train: Share = SHARES[0]
    validation: Share = SHARES[1]
    test: Share = SHARES[2]
    seed: int = 0
    group: str | None = None
    """Column of the source, such as a user, a document or a dialogue: rows of one value fall into one split. A row without
    a value goes by its text."""
    time: str | None = None
    """Column of the source, of times: the latest rows test, those before them validate. Rows of one second stay together."""
    validation_from: Instant | None = None
    """With `time`, instead of shares: when the validation split begins; without it there is none."""
    test_from: Instant | None = None
    """With `time`, instead of shares: when the test split begins; without it there is none."""
    stratified: bool = False
    """Every label has the same share in each split, to a row."""

    @property
    def by(self) -> Literal["random", "group", "time", "stratified"]:
        if self.group is not None:
            return "group"
        if self.time is not None:
            return "time"
        return "stratified" if self.stratified else "random"

    @property
    def dates(self) -> dict[str, str]:
        """Split → when it begins, where that is said."""
        said = {"validation": self.validation_from, "test": self.test_from}
        return {name: begins for name, begins in said.items() if begins is not None}

    @model_validator(mode="after")
    def _whole(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, not {total:g}")
        if self.train == 0:
            raise ValueError("train must be above 0")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        said = [
            name
            for name, given in (
                ("group", self.group is not None),
                ("time", self.time is not None),
                ("stratified", self.stratified),
            )
            if given
        ]
        if len(said) > 1:
            raise ValueError(f"rows are split by {said[0]} or by {said[1]}, not by both; leave one out")
        return self

    @model_validator(mode="after")
    def _dates(self) -> Split:
        if not self.dates:
            return self
        first = f"{next(iter(self.dates))}_from"
        if self.time is None:
            raise ValueError(f"{first} needs time, the column of times that it is compared with; add it")
        if (self.train, self.validation, self.test) != SHARES:
            raise ValueError(
                f"{first} says where a split begins, so that there are no shares; leave train, validation and test out"
            )
        if len(self.dates) == 2:
            validation, test = (times.seconds(begins, assume_utc=True) for begins in self.dates.values())
            if validation >= test:
                raise ValueError(
                    f"validation_from must be before test_from, and {self.validation_from} is not before {self.test_from}"
                )
        return self
