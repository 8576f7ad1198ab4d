"""Ports that are bound only later."""

from __future__ import annotations

import socket

import pytest

from cluster import ingress
from lib.errors import ResourceError


def test_a_free_port_is_none_that_the_system_or_ray_gives_away() -> None:
    for port in {ingress.free_port() for _ in range(50)}:
        assert 20000 <= port < 30000
        with socket.socket() as listening:
            listening.bind(("", port))


def test_a_port_that_is_taken_on_any_address_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(ingress.random.SystemRandom, "sample", lambda *_: [taken.getsockname()[1]])
        with pytest.raises(ResourceError, match="of 100 ports between 20000 and 30000 none is free"):
            ingress.free_port()
