"""Make the version champion again that was it before the present one.

    python -m jobs.rollback --config jobs/configs/reviews.yaml [--promotion.why "wrong about returns"]

What is served follows when `python -m serve.deploy` is run with the same configuration. Done again, it goes back one
more; the history is in the database (`whorl_champions`).
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime

from lib import champions, registry
from lib.command import main
from lib.settings import Settings


def rollback(settings: Settings) -> None:
    went, came = registry.roll_back(settings.name, settings.promotion.why)
    for change in champions.history(settings.name):
        when = datetime.fromtimestamp(change.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        instead = f" instead of {change.instead_of}" if change.instead_of else ""
        print(f"  {when} UTC  version {change.version}{instead}  ({change.why})")
    print(f"{came} is {registry.CHAMPION} again, instead of {went}")
    print(f"next: python -m serve.deploy {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main(rollback)
