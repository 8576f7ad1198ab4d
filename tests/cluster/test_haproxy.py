"""cluster/haproxy.py: HAProxy as Ray Serve starts it, and again when it dies; with the real binary."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.haproxy import ask
from cluster.ingress import environment, free_port

SCRIPT = Path("cluster/haproxy.py").resolve()
CONFIG = """global
    stats socket {socket} mode 666 level admin expose-fd listeners
    hard-stop-after 10s
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    option redispatch 1
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string {says}
"""
# As Ray Serve writes it for a deployment of one replica, with what cluster/ingress.py tells it.
REPLICA = """    nbthread 4
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option redispatch 1
    retry-on conn-failure empty-response
    retries 3
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend app
backend app
    http-reuse always
    balance leastconn
    server replica 127.0.0.1:{replica} check inter 5s observe layer4 error-limit 1 on-error mark-down
    server fallback 127.0.0.1:{fallback} check backup
"""
SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(60 if self.path == "/slow" and sys.argv[2] == "replica" else 0.1)
        self.send_response(200)
        self.send_header("content-length", str(len(sys.argv[2])))
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())

    def log_message(self, *words):
        pass

ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Ingress:
    """What Ray Serve does with HAProxy: a configuration, an admin socket, processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.socket, self.config = folder / "admin.sock", folder / "haproxy.cfg"
        self.processes: list[psutil.Popen] = []

    def start(self, *more: str, says: str = "one") -> psutil.Popen:
        return self.run(CONFIG.format(socket=self.socket, port=self.port, says=says), *more)

    def run(self, config: str, *more: str) -> psutil.Popen:
        self.config.write_text(config)
        words = [str(SCRIPT), "-db", "-f", str(self.config), "-dR", *more]
        given = {**os.environ, **environment()}
        process = psutil.Popen(words, env=given, stderr=(self.folder / "stderr").open("ab"))
        self.processes.append(process)
        return process

    def reload(self, says: str) -> psutil.Popen:
        return self.start("-sf", str(self.processes[-1].pid), "-x", str(self.socket), says=says)

    def pid(self) -> int:
        """Of whom the admin socket says that it answers; 0: of nobody, as in the moment of a reload."""
        try:
            found = re.search(rb"(?m)^Pid: (\d+)", ask(str(self.socket), b"show info\n"))
        except OSError:
            return 0
        return int(found[1]) if found else 0

    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    def answer(self, path: str = "/") -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=30).text
        except httpx.TransportError:
            return ""


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path may have 107 characters
        one = Ingress(Path(folder))
        yield one
        for process in one.processes:
            if process.is_running():
                process.kill()
            process.wait()


def child(process: psutil.Popen) -> psutil.Process:
    (found,) = process.children()
    return found


def test_one_that_is_killed_is_started_again(ingress: Ingress) -> None:
    process = ingress.start()
    wait(lambda: ingress.pid() == process.pid)
    for _ in range(3):
        before = child(process)
        before.kill()
        wait(lambda: ingress.answer() == "one")
        assert child(process).pid != before.pid
        assert ingress.pid() == process.pid, "whoever asks sees no other"
    assert "HAProxy died of signal 9; started again" in ingress.said()
    assert b"http_frontend,FRONTEND" in ask(str(ingress.socket), b"show stat\n")
    modes = {path.stat().st_mode & 0o777 for path in ingress.folder.iterdir() if path.is_socket()}
    assert modes == {0o600}, "no other user commands it"


def test_a_reload_takes_over_without_a_request_lost(ingress: Ingress) -> None:
    first = ingress.start()
    wait(lambda: ingress.pid() == first.pid)
    answers: list[str] = []
    ends = threading.Event()

    def asks() -> None:
        while not ends.is_set():
            answers.append(ingress.answer())

    asking = threading.Thread(target=asks)
    asking.start()
    second = ingress.reload("two")
    wait(lambda: ingress.pid() == second.pid)
    third = ingress.reload("three")
    wait(lambda: ingress.pid() == third.pid)
    wait(lambda: answers[-1:] == ["three"])
    ends.set()
    asking.join()
    assert set(answers) <= {"one", "two", "three"}
    assert (first.wait(60), second.wait(60)) == (0, 0)
    child(third).kill()
    wait(lambda: ingress.answer() == "three")


def test_a_killed_replicas_idle_connections_take_no_try_of_what_it_had_in_hand(ingress: Ingress) -> None:
    ports = {"replica": free_port(), "fallback": free_port()}
    servers = {
        name: subprocess.Popen([sys.executable, "-c", SERVER, str(port), name])
        for name, port in ports.items()
    }
    try:
        head = CONFIG.partition("defaults")[0].format(socket=ingress.socket)
        ingress.run(head + REPLICA.format(port=ingress.port, **ports))
        wait(lambda: ingress.answer() == "replica")
        with ThreadPoolExecutor(36) as pool:
            in_hand = [pool.submit(ingress.answer, "/slow") for _ in range(12)]
            time.sleep(0.5)
            assert set(pool.map(ingress.answer, ["/"] * 24)) == {"replica"}  # and leave idle connections
            servers["replica"].kill()
            assert [one.result() for one in in_hand] == ["fallback"] * 12
    finally:
        for server in servers.values():
            server.kill()
            server.wait()


def test_it_ends_when_it_is_told_to_and_with_who_started_it(ingress: Ingress) -> None:
    process = ingress.start()
    wait(lambda: ingress.pid() == process.pid)
    real = child(process)
    process.kill()
    process.wait()
    wait(lambda: not real.is_running())
    again = ingress.start()
    wait(lambda: ingress.pid() == again.pid)
    again.send_signal(signal.SIGTERM)
    assert again.wait(15) == 128 + signal.SIGTERM
    assert ingress.answer() == ""


def test_one_that_cannot_live_is_left_to_serve(ingress: Ingress) -> None:
    process = ingress.start()
    wait(lambda: ingress.pid() == process.pid)
    while process.poll() is None:
        for one in process.children():
            one.kill()
        time.sleep(0.01)
    assert process.returncode == 128 + signal.SIGKILL
    assert "HAProxy died 5 times within 10 s" in ingress.said()


def test_a_configuration_that_haproxy_refuses_is_told_as_haproxy_tells_it(ingress: Ingress) -> None:
    ingress.port = 70000
    assert ingress.start().wait(15) == 1
    assert "70000" in ingress.said()


def test_what_is_not_to_be_kept_up_is_haproxy_itself() -> None:
    given = {**os.environ, **environment()}
    shown = subprocess.run([SCRIPT, "-v"], env=given, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("HAProxy version")
    del given["WHORL_HAPROXY"]
    refused = subprocess.run([SCRIPT, "-v"], env=given, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "WHORL_HAPROXY must name HAProxy's binary" in refused.stderr
