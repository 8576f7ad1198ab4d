"""How far a long step is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.data import DataContext

SAY_SECONDS = 15


def data_context() -> DataContext:
    """Ray Data's settings as they are now, but bars on a terminal alone, and silence elsewhere."""
    from ray.data import DataContext

    # The log tells of plans, and tells every exception twice before it is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = sys.stdout.isatty()
    context.enable_rich_progress_bars = True
    context.use_ray_tqdm = False
    return context


class Progress:
    """Counts up to `total`. In a Ray task or actor as in the driver: Ray brings bars and lines to its terminal.

    `terminal` says whether the driver's output is one; a bar's many redrawings would fill a log.
    """

    def __init__(self, total: int, what: str, unit: str, terminal: bool, done: int = 0) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, done
        self._began, self._said, self._first = time.monotonic(), time.monotonic(), done
        self._bar: Any = None
        if terminal:
            from ray.experimental import tqdm_ray

            self._bar = tqdm_ray.tqdm(total=total, desc=what, unit=unit)
            self._bar.update(done)

    def to(self, done: int, note: str = "") -> None:
        """So many are done by now; `note` is shown beside the count."""
        grown, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.set_description(f"{self.what}{', ' if note else ''}{note}")
            self._bar.update(grown)
        elif (now := time.monotonic()) - self._said > SAY_SECONDS:
            self._said = now
            speed = (done - self._first) / (now - self._began)
            print(
                f"{self.what}: {done:,} of {self.total:,} {self.unit}, {speed:,.0f} {self.unit}/s"
                f"{', ' if note else ''}{note}",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
