"""Which metric decides whether a version is promoted."""

from __future__ import annotations

from collections.abc import Sequence

from lib.errors import ConfigError, nearest
from lib.settings import Settings


def deciding(settings: Settings, default: str, known: Sequence[str]) -> str:
    """`promotion.metric`, else `default`. Raises ConfigError for one that is not among the `known`."""
    metric = settings.promotion.metric or default
    if metric not in known:
        raise ConfigError(
            f"promotion.metric: {metric!r} cannot decide{nearest(metric, known)} (known: {', '.join(known)})"
        )
    return metric
