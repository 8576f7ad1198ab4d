"""How much a caller may ask: rates that refill evenly, by the generic cell rate algorithm.

Of a limit of `per_minute`, each unit takes 60 / per_minute seconds to come back. For every name one time is kept, at
which all of it would have come back (the "theoretical arrival time" of ITU-T I.371, annex A, the virtual scheduling
form); a minute's worth may come at once. What costs more than was known before, such as an answer's tokens, is
charged afterwards and may leave a debt: then the next has to wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WINDOW_S = 60.0
TOLERANCE_S = 1e-6
"""Of times: what a clock since 1970 resolves as a float."""
# Names whose limits are whole again are dropped when there are this many.
SWEEP_AT = 10_000


class Charge(NamedTuple):
    """`cost` units of what `name` may have `per_minute` of."""

    name: str
    cost: float
    per_minute: int


@dataclass(frozen=True)
class Verdict:
    """Whether a request may go on; if not, which charge stops it and for how long."""

    allowed: bool
    wait_s: float = 0.0
    stopped_by: str | None = None
    remaining: tuple[int, ...] = ()
    """Units that are left of each charge's limit."""


class Buckets:
    """The limits of all callers, in one process. Not thread-safe."""

    def __init__(self) -> None:
        self._whole_at: dict[str, float] = {}

    def take(self, charges: Sequence[Charge], now: float) -> Verdict:
        """Take all of the charges, or none. One that costs nothing still waits for a debt to be paid back.

        `now` in seconds of any steady clock.
        """
        for charge in charges:
            # What costs more than a whole minute's worth can only wait until the limit is whole.
            cost = min(charge.cost, charge.per_minute) * WINDOW_S / charge.per_minute
            wait = self._whole(charge.name, now) + cost - (now + WINDOW_S)
            if charge.cost == 0:
                wait += WINDOW_S / charge.per_minute  # a unit must be there
            if wait > TOLERANCE_S:
                return Verdict(False, wait, charge.name, self._remaining(charges, now))
        self.charge(charges, now)
        return Verdict(True, remaining=self._remaining(charges, now))

    def charge(self, charges: Sequence[Charge], now: float) -> None:
        """Take the charges, whatever is left."""
        for charge in charges:
            if charge.cost:
                cost = charge.cost * WINDOW_S / charge.per_minute
                self._whole_at[charge.name] = self._whole(charge.name, now) + cost
        if len(self._whole_at) > SWEEP_AT:
            self._whole_at = {name: at for name, at in self._whole_at.items() if at > now}

    def _whole(self, name: str, now: float) -> float:
        return max(self._whole_at.get(name, now), now)

    def _remaining(self, charges: Sequence[Charge], now: float) -> tuple[int, ...]:
        return tuple(
            max(
                0,
                math.floor(
                    (now + WINDOW_S - self._whole(c.name, now)) * c.per_minute / WINDOW_S + TOLERANCE_S
                ),
            )
            for c in charges
        )
