"""Points in time as sources write them → whole seconds since 1970."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AwareDatetime, BeforeValidator, WithJsonSchema

if TYPE_CHECKING:  # the configuration imports this module, and loads in milliseconds
    import numpy as np
    import pyarrow as pa

# From here on a number is one of milliseconds: as seconds it would be in the year 5138.
MILLISECONDS = 10**11
MOST = MILLISECONDS * 1000
WRITTEN = "2026-03-01T09:00:00Z"


def _moment(value: Any) -> Any:
    """A number as a point in time; a text as it is, for pydantic, which would take its number for one, too."""
    if isinstance(value, bool) or (isinstance(value, str) and re.fullmatch(r"\s*[-+\d.eE]+\s*", value)):
        raise ValueError(f"{value!r} is no time; write it as {WRITTEN}, or as a number of seconds since 1970")
    if not isinstance(value, int | float):
        return value
    if not 0 <= value < MOST:
        raise ValueError(f"{value!r} is no number of seconds or milliseconds since 1970")
    return datetime.fromtimestamp(value / 1000 if value >= MILLISECONDS else value, UTC)


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_moment),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "format": "date-time"},
                {"type": "number", "minimum": 0, "exclusiveMaximum": MOST},
            ]
        },
        mode="validation",
    ),
]
"""Of a request: ISO 8601 with an offset from UTC, or a number of seconds or milliseconds since 1970."""


def seconds(value: str | None, assume_utc: bool = False) -> int:
    """ISO 8601 with an offset from UTC, or seconds or milliseconds since 1970.

    With `assume_utc` dates and times without an offset are UTC's, and may be before 1970: where only their order counts.

    Raises ValueError, saying what is wrong with the value and how it is written.
    """
    try:
        number = float(value or "")
    except ValueError:
        return _of_text(value, assume_utc)
    if not 0 <= number < MOST:
        raise ValueError(f"{value!r} is no number of seconds or milliseconds since 1970")
    return int(number // 1000) if number >= MILLISECONDS else int(number)


def _of_text(value: str | None, assume_utc: bool) -> int:
    try:
        found = datetime.fromisoformat((value or "").strip())
    except ValueError:
        raise ValueError(f"{value!r} is no time; write it as {WRITTEN}") from None
    if found.tzinfo is None and assume_utc:
        found = found.replace(tzinfo=UTC)
    if found.tzinfo is None:
        raise ValueError(f"{value!r} has no offset from UTC; write it as {WRITTEN}")
    if found.timestamp() < 0 and not assume_utc:
        raise ValueError(f"{value!r} is before 1970")
    return int(found.timestamp() // 1)


def column(values: pa.Array, assume_utc: bool = False) -> tuple[np.ndarray, dict[int, str]]:
    """int64 [rows] of a string array, and row → what is wrong with it. Numbers take a microsecond a row, texts ten."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    found, wrong = np.zeros(len(values), np.int64), {}
    try:
        numbers = np.asarray(pc.fill_null(values.cast(pa.float64()), -1))
        ok = (numbers >= 0) & (numbers < MOST)
    except pa.ArrowInvalid:
        numbers, ok = np.zeros(len(values)), np.zeros(len(values), bool)
    found[ok] = np.where(numbers[ok] >= MILLISECONDS, numbers[ok] // 1000, numbers[ok]).astype(np.int64)
    for row in np.flatnonzero(~ok).tolist():
        try:
            found[row] = seconds(values[row].as_py(), assume_utc)
        except ValueError as error:
            wrong[row] = str(error)
    return found, wrong
