"""A line for each request in the replica's log: JSON by default (`serving.logs`), without a word of what was said.

Ray Serve writes the log of every replica under its session's logs/serve, turns it over by size, and adds to each line
where it comes from (application, deployment, replica).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray.serve.schema import LoggingConfig

from lib.settings import LogSettings

if TYPE_CHECKING:
    from serve.observing import Exchange

logger = logging.getLogger("ray.serve")


def request(exchange: Exchange) -> None:
    """Log a request that is over. The fields of its line have the names that OpenTelemetry gives them, where it does."""
    milliseconds = round(exchange.seconds * 1000, 2)
    first = exchange.first_event_s
    logger.info(
        "%s %s %d in %s ms",
        exchange.method,
        exchange.route,
        exchange.status,
        milliseconds,
        extra={
            "request": exchange.id,
            "status": exchange.status,
            "milliseconds": milliseconds,
            "first_token_ms": None if first is None else round(first * 1000, 2),
            "model": exchange.model or None,
            "tokens": exchange.tokens,
            "key": exchange.key,
        },
    )


def config(settings: LogSettings) -> LoggingConfig:
    """How Ray Serve logs for a deployment: without its own line for each request, which knows less."""
    return LoggingConfig(encoding=settings.format.upper(), enable_access_log=False)
