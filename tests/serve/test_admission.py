"""Too much, too long and too late, over real sockets: every refusal in one form, and nothing done for who is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from cluster.ingress import free_port
from lib.settings import ServingSettings

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    """One request at once, one waits; 2.5 s for each."""
    from ray import serve as ray_serve

    from tests.serve.slow import Slow

    serving = ServingSettings(
        max_ongoing_requests=1, max_queued_requests=1, request_timeout_s=2.5, max_body_bytes=10_000
    )
    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(Slow.bind(serving), name="slow", route_prefix="/")
    address = f"http://127.0.0.1:{port}"
    while httpx.get(f"{address}/healthz").status_code != 200:  # the ingress comes a moment after the replica
        time.sleep(0.1)
    yield address
    ray_serve.shutdown()


def ask(url: str, milliseconds: int) -> httpx.Response:
    return httpx.post(f"{url}/v1/slow", json={"milliseconds": [milliseconds]}, timeout=30)


def computed(url: str) -> list[int]:
    found: list[int] = httpx.get(f"{url}/state", timeout=30).json()["computed"]
    return found


def waiting(url: str) -> int:
    found: int = httpx.get(f"{url}/state", timeout=30).json()["waiting"]
    return found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked(url: str, milliseconds: int) -> Future[httpx.Response]:
    """A request under way."""
    return ThreadPoolExecutor(1).submit(ask, url, milliseconds)


def open_request(url: str, body: bytes, length: int, path: str = "/v1/slow") -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=30)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n".encode()
        + body
    )
    return connection


def test_beyond_the_queue_is_503_at_once_and_whoever_waits_is_answered(url: str) -> None:
    first = asked(url, 2000)
    until(lambda: 2000 in computed(url))
    second = asked(url, 10)
    until(lambda: waiting(url) == 1)
    refused = ask(url, 11)
    assert not first.done()
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.json()["error"] == {
        "message": "too many requests are waiting; try again",
        "type": "service_unavailable",
        "param": None,
        "code": "overloaded",
    }
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert [first.result().json(), second.result().json()] == [[2000], [10]]
    assert 11 not in computed(url)


def test_an_answer_that_takes_too_long_is_504_and_gives_its_place_back(url: str) -> None:
    late = ask(url, 3000)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    assert ask(url, 13).json() == [13]


def test_a_client_that_goes_away_leaves_the_queue_and_its_place(url: str) -> None:
    body = b'{"milliseconds": [1500, 21, 22]}'
    with open_request(url, body, len(body)):
        until(lambda: 1500 in computed(url))
    # Its place is free while the engine still computes the first of its rows.
    assert ask(url, 20).json() == [20]
    assert not {21, 22} & set(computed(url))


def test_a_slow_client_takes_nobodys_place_and_is_told_408(url: str) -> None:
    with open_request(url, b'{"milli', 40) as slow:
        assert ask(url, 14).json() == [14]
        answer = b""
        while b"}}" not in answer and (block := slow.recv(65536)):
            answer += block
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_timeout"' in answer


def test_a_stream_may_last_as_long_as_something_comes(url: str) -> None:
    lasting = httpx.post(f"{url}/v1/stream", json={"milliseconds": [1000] * 4}, timeout=30)
    assert lasting.text == "data: 1000\n\n" * 4
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{url}/v1/stream", json={"milliseconds": [10, 4000]}, timeout=30)
    assert ask(url, 15).json() == [15]


def test_many_at_once_get_an_answer_or_a_refusal_and_nobody_is_forgotten(url: str) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(url, 5).status_code), daemon=True) for _ in range(60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 60
    assert 200 in found
    assert set(found) <= {200, 503}
    assert ask(url, 16).json() == [16]


def test_a_killed_haproxy_is_there_again_without_serve(url: str) -> None:
    port = int(url.rpartition(":")[2])
    (haproxy,) = (
        process
        for process in psutil.process_iter()
        if process.name() == "haproxy"
        and port in {one.laddr.port for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
    )
    supervisor = haproxy.parent()
    haproxy.kill()

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return ask(url, 17).json() == [17]
        return False

    until(answers)
    assert [process.name() for process in supervisor.children()] == ["haproxy"]


@pytest.mark.parametrize("count", [2, 1])
@pytest.mark.parametrize("ingress", ["HAProxy", pytest.param("Serve's proxy", marks=pytest.mark.long)])
def test_what_a_killed_replica_had_in_hand_another_one_answers(url: str, ingress: str, count: int) -> None:
    """The one that takes its place, where it was alone."""
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client

    from tests.serve.slow import Slow

    def replicas() -> dict[int, str]:
        found = _get_global_client().get_serve_details()["applications"]["slow"]["deployments"]["Slow"]
        return {replica.get("pid", 0): replica["state"] for replica in found["replicas"]}

    first = set(replicas())
    ray_serve.run(Slow.options(num_replicas=count).bind(ServingSettings()), name="slow", route_prefix="/")
    until(lambda: list(replicas().values()) == ["RUNNING"] * count and not first & set(replicas()))
    if ingress != "HAProxy":  # what HAProxy falls back on
        url = f"http://127.0.0.1:{os.environ['RAY_SERVE_FALLBACK_PROXY_HTTP_PORT']}"
    until(lambda: {httpx.get(f"{url}/state").json()["pid"] for _ in range(8)} == set(replicas()))
    under_way = [asked(url, 1500) for _ in range(6)]
    time.sleep(0.5)
    lost = httpx.get(f"{url}/state", timeout=30).json()["pid"]
    os.kill(lost, signal.SIGKILL)
    assert [(one.result().status_code, one.result().text) for one in under_way] == [(200, "[1500]")] * 6
