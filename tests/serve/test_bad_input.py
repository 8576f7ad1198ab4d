"""Bad input over raw sockets: a clear 4xx or a closed connection, and the application still answers after it."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from cluster.ingress import free_port
from tests.bench.fuzz import fuzz
from tests.serve.conftest import Endpoint, key, make_settings

pytestmark = pytest.mark.ray

HUGE = 100_000_000
IDLE = 3_000
DEEP = b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.fixture(scope="module")
def endpoint(store: Path, ray_cluster: None) -> Iterator[Endpoint]:
    """reviews@1 with a body limit that deep nesting fits into."""
    from ray import serve as ray_serve

    from serve.deploy import deploy

    settings = make_settings(
        model="reviews@1", port=free_port(), max_inputs=8, max_chars=500, max_body_bytes=1_000_000
    )
    yield Endpoint(deploy(settings), settings, key())
    ray_serve.shutdown()


@pytest.fixture(autouse=True)
def still_answers(endpoint: Endpoint) -> Iterator[None]:
    yield
    assert endpoint.post({"inputs": ["great"]}).status == 200


def connected(endpoint: Endpoint) -> socket.socket:
    parts = urlsplit(endpoint.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def head(endpoint: Endpoint, *lines: str) -> bytes:
    given = ("host: test", f"authorization: Bearer {endpoint.key}", "content-type: application/json", *lines)
    return "\r\n".join(("POST /v1/sentiment HTTP/1.1", *given, "", "")).encode("latin-1")


def answered(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed, or nothing more comes."""
    found = b""
    connection.settimeout(5)
    try:
        while block := connection.recv(65536):
            found += block
    except OSError:
        pass
    return found


def say(connection: socket.socket, data: bytes) -> None:
    """Send it all, and say that this is all."""
    with suppress(OSError):  # closed while we were talking
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def status(answer: bytes) -> int | None:
    """Of the first answer; None for a connection that was closed without one, or spoke of HTTP/2 as it was closed."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else None


def error(answer: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"inputs": [' + b"9" * 100_000 + b"]}",
        b'{"inputs": [1e999999, "a"]}',
        b'{"inputs": ["\\u0000\\ud800"]}',
        b'{"inputs": ["a"], ' + b",".join(b'"k%d": 1' % i for i in range(50_000)) + b"}",
        b'\xef\xbb\xbf{"inputs": ["a"]}',
        b"\x00" * 1000,
        '{"inputs": ["größe"]}'.encode("latin-1"),
        '{"inputs": ["a"]}'.encode("utf-32"),
    ],
    ids=["deep", "digits", "infinite", "surrogate", "keys", "mark", "zeros", "latin-1", "utf-32"],
)
def test_a_body_that_is_no_request_is_a_400(endpoint: Endpoint, body: bytes) -> None:
    answer = endpoint.post(body)
    assert answer.status in (200, 400), answer.body
    if answer.status == 400:
        assert answer.body["error"]["type"] == "invalid_request_error"
        assert len(answer.body["error"]["message"]) < 500


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/xml", "", "\x7f;;"]
)
def test_another_content_type_is_a_400(endpoint: Endpoint, kind: str) -> None:
    assert endpoint.post({"inputs": ["a"]}, content_type=kind).status == 400


def replica_memory() -> int:
    return max(
        process.memory_info().rss
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ServeRepl")
    )


def test_a_declared_length_of_100_mb_is_refused_before_it_comes(endpoint: Endpoint) -> None:
    with connected(endpoint) as connection:
        connection.sendall(head(endpoint, f"content-length: {HUGE}"))
        answer = answered(connection)  # to nothing but the head
    assert status(answer) == 413
    assert error(answer)["code"] == "body_too_large"


def test_100_mb_in_chunks_are_refused_on_the_way_and_not_kept(endpoint: Endpoint) -> None:
    before, block, sent = replica_memory(), b"10000\r\n" + b" " * 65536 + b"\r\n", 0
    with connected(endpoint) as connection:
        connection.sendall(head(endpoint, "transfer-encoding: chunked"))
        try:
            while sent < HUGE:
                connection.sendall(block)
                sent += 65536
            connection.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # closed while we were talking
        answer = answered(connection)
    assert status(answer) in (413, None)
    assert replica_memory() - before < 30_000_000


def test_slow_clients_and_idle_connections_take_nobodys_place(endpoint: Endpoint) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a shell's usual limit is 1,024 files
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(endpoint)) for _ in range(IDLE)]
        whole = head(endpoint, "content-length: 17")
        for i, connection in enumerate(connections):
            # A third says nothing, a third breaks off in its headers, a third in its body.
            connection.sendall((b"", whole[: 20 + i % 50], whole + b'{"inputs"')[i % 3])
        for letter in whole[:40]:
            connections[0].sendall(bytes([letter]))
            assert endpoint.post({"inputs": ["great"]}).status == 200


def test_a_client_that_never_ends_its_headers_is_let_go(endpoint: Endpoint) -> None:
    """HAProxy's `timeout client`, 10 s in tests."""
    with connected(endpoint) as connection:
        connection.sendall(head(endpoint)[:60])
        connection.settimeout(25)
        assert status(connection.recv(65536)) in (408, None)


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    b"\x00" * 4096,
    b"GET\r\n\r\n",
    b"POST /v1/sentiment HTTP/9.9\r\nhost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n",
    b"GET /%zz%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\nabcdef",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_a_4xx_or_a_closed_connection_also_behind_a_request(
    endpoint: Endpoint, garbage: bytes
) -> None:
    with connected(endpoint) as connection:
        say(connection, garbage)
        assert (status(answered(connection)) or 400) // 100 == 4
    good = head(endpoint, "content-length: 17") + b'{"inputs": ["a"]}'
    with connected(endpoint) as connection:
        say(connection, good + garbage)
        answers = answered(connection)
    assert status(answers) in (200, 400, None)  # HAProxy may see the garbage before the answer is there
    later = answers.split(b"HTTP/1.1 ")[2:]
    assert all(answer.startswith(b"4") for answer in later)


@pytest.mark.parametrize("name", ["x-request-id", "x-request-timeout-seconds", "traceparent", "user-agent"])
def test_a_header_that_is_not_utf_8_is_no_500(endpoint: Endpoint, name: str) -> None:
    with connected(endpoint) as connection:
        connection.sendall(
            head(endpoint, f"{name}: \xff\xfe", "content-length: 17", "connection: close")
            + b'{"inputs": ["a"]}'
        )
        assert status(answered(connection)) in (200, 400)


def test_everything_in_the_description_fuzzed(endpoint: Endpoint) -> None:
    """A short run of `make bench-fuzz`; feedback on made-up ids waits for each, and is left to the long one."""
    found = fuzz(endpoint.url, endpoint.key, 120, 0, "--exclude-path", "/v1/feedback")
    assert found.cases > 150
    assert not found.failures
    assert not found.errors
