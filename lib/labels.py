"""Label values of a source → class indices, and what the mapping does not know: for tasks and for `lib.data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa

from lib.settings import Labelled

MISSING = -1
"""No label: null or blank."""
UNKNOWN = -2
"""A label that the mapping does not hold."""


@dataclass(frozen=True)
class Mapping:
    """Value in the source → class index, as plain data that a task can be sent."""

    classes: dict[str, int]

    @classmethod
    def of(cls, labelled: Labelled) -> Mapping:
        names = labelled.label_names
        return cls({value: names.index(label) for value, label in labelled.label_map.items()})

    def index(self, value: str | None) -> int:
        """Class of one value: `3`, `3.0` and ` 3 ` are one; exact matches go first."""
        text = (value or "").strip()
        if not text:
            return MISSING
        for candidate in (
            text,
            _whole_number(text),
            text.lower() if text.lower() in ("true", "false") else None,
        ):
            if candidate in self.classes:
                return self.classes[candidate]
        return UNKNOWN

    def apply(self, values: pa.Array) -> np.ndarray:
        """Class indices int32 [rows]; MISSING and UNKNOWN below 0."""
        encoded = values.dictionary_encode()
        table = np.array([self.index(v) for v in encoded.dictionary.to_pylist()] + [MISSING], np.int32)
        classes: np.ndarray = table[np.asarray(encoded.indices.fill_null(len(table) - 1))]
        return classes


def _whole_number(text: str) -> str | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return str(int(number)) if number.is_integer() else None


@dataclass
class Unknown:
    """Rows whose label the mapping does not hold."""

    rows: int = 0
    first: int | None = None
    """Position of the first of them in the source."""
    values: list[str] = field(default_factory=list)
    """The first few different values."""

    SHOWN: ClassVar[int] = 5

    @classmethod
    def among(cls, values: pa.Array, classes: np.ndarray, positions: np.ndarray) -> Unknown:
        which = np.flatnonzero(classes == UNKNOWN)
        if not len(which):
            return cls()
        seen = values.take(pa.array(which)).unique().slice(0, cls.SHOWN).to_pylist()
        return cls(len(which), int(positions[which[0]]), seen)

    def merge(self, later: Unknown) -> Unknown:
        """Both together; `self` lies before `later` in the source."""
        values = list(dict.fromkeys(self.values + later.values))[: self.SHOWN]
        return Unknown(self.rows + later.rows, self.first if self.rows else later.first, values)
