#!/usr/bin/env python3
"""HAProxy as Ray Serve starts it, and again at once when it dies.

Ray Serve looks at its HAProxy every 10 s, believes the third failure, and then starts an actor that starts another: a
node whose HAProxy was killed answers nobody for over half a minute. Serve calls this file in its place
(`RAY_SERVE_HAPROXY_BINARY_PATH`; the binary itself is named by `WHORL_HAPROXY`), with the same arguments. The binary is
a child of this process: it gets its signals, dies with it, and is started anew, with the configuration that is on disk,
when something else kills it.

Serve takes HAProxy for up when the `Pid` that its admin socket tells (`show info`) is the pid that it started. So this
process listens at the socket's path, hands each command on to HAProxy's own (the path with `.own` after it) and says
its own pid. Reloads work as without it: the next one takes the listening sockets over (`-x`) and ends this one's child by
its signal (`-sf`). Of Python's own library alone, since it runs before anything else of Whorl does.

Serve lets requests share idle connections to a replica. One that is killed leaves many of them, all dead: a request that
it had in hand would spend its tries on those and fail, before HAProxy finds that nobody listens there. So no request gets
a connection that was another client's (`http-reuse never`).

HAProxy tries a request again (`retry-on`) only if all of it had come when its first part was sent on, and many clients
send the body apart: so it waits for a body that its buffer holds. Whoever lets it wait for long gets the error that
Whorl's applications have for it. It does not wait for a body that declares to be longer, which it could not send twice:
whether that is too long is the application's to say, and by its head alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTTOU, signal.SIGTTIN)
ENDING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Blocked in all threads and taken one by one. A handler of Python's runs in the main thread alone, and a signal that the
# kernel gives to another one leaves it asleep: that HAProxy, told to end, would go on with an old configuration.
TAKEN = (*FORWARDED, signal.SIGCHLD)
ADMIN = re.compile(r"^(\s*stats socket )(\S+)( mode 666)?", re.MULTILINE)
SHARING = re.compile(r"^(\s*)http-reuse always$", re.MULTILINE)
RETRYING = re.compile(r"^(\s*)option redispatch .*$", re.MULTILINE)
ENTRY = re.compile(r"^frontend http_frontend\n(\s*)bind .*$", re.MULTILINE)
BUFFER = re.compile(r"^\s*tune\.bufsize (\d+)$", re.MULTILINE)
BODY_TIMEOUT_S = 20
TOO_LATE = {
    "message": f"the request did not come whole within {BODY_TIMEOUT_S} s",
    "type": "invalid_request_error",
    "param": None,
    "code": "body_timeout",
}
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # before there are threads, whose locks a fork would keep
# One that dies as often as that is left to Serve, which says so in its log.
DEATHS, WITHIN_S = 5, 10.0


def ask(path: str, command: bytes) -> bytes:
    """What HAProxy answers at its admin socket. Raises OSError where nobody listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(path)
        connection.sendall(command)
        return b"".join(iter(lambda: connection.recv(65536), b""))


class Admin(socketserver.ThreadingUnixStreamServer):
    """The admin socket at `path`, put there in place of an earlier one's in one step."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.path, mine = path, f"{path}.{os.getpid()}"
        before = os.umask(0o177)
        try:
            super().__init__(mine, Handler)
        finally:
            os.umask(before)
        self._inode = Path(mine).stat().st_ino
        Path(mine).rename(path)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def is_replaced(self) -> bool:
        """Whether a later one listens there."""
        try:
            return Path(self.path).stat().st_ino != self._inode
        except FileNotFoundError:
            return True


class Handler(socketserver.StreamRequestHandler):
    server: Admin
    timeout = 5

    def handle(self) -> None:
        with suppress(OSError):
            answer = ask(own_socket(self.server.path), self.rfile.readline(65536))
            self.wfile.write(re.sub(rb"(?m)^Pid: \d+", b"Pid: %d" % os.getpid(), answer))


def own_socket(path: str) -> str:
    return f"{path}.own"  # short: a socket's path may have 107 characters


def prepare_child() -> None:
    """It dies with its parent, and takes its own signals."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN)


class Supervisor:
    """Of one HAProxy, called with `words`, whose configuration is `config`."""

    def __init__(self, binary: str, words: list[str], config: Path, admin: str) -> None:
        self._binary, self._config, self._path = binary, config, admin
        self._ending = False
        # What a reload says of its forerunner: not said when HAProxy is started again.
        first = min((words.index(word) for word in ("-sf", "-st", "-x") if word in words), default=len(words))
        self._words, self._reload = words[:first], words[first:]

    def run(self) -> int:
        """Until it was told to end, or another took its place; the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN)
        taken_over = [own_socket(word) if word == self._path else word for word in self._reload]
        child = self._start(taken_over)
        deaths: list[float] = []
        if not self._wait_until_up(child):
            return child.wait()
        admin = Admin(self._path)
        while True:
            while (status := child.poll()) is None:
                self._take(child, 60)
            if status >= 0 or self._ending or admin.is_replaced():
                return status if status >= 0 else 128 - status
            deaths = [at for at in deaths if at > time.monotonic() - WITHIN_S] + [time.monotonic()]
            if len(deaths) >= DEATHS:
                print(f"HAProxy died {DEATHS} times within {WITHIN_S:.0f} s", file=sys.stderr, flush=True)
                return 128 - status
            print(f"HAProxy died of signal {-status}; started again", file=sys.stderr, flush=True)
            child = self._start([])

    def _start(self, more: list[str]) -> subprocess.Popen[bytes]:
        mine = self._config.with_name(f"{self._config.name}.supervised")
        # Serve lets every user of the machine command its HAProxy: not here.
        text = ADMIN.sub(lambda at: f"{at[1]}{own_socket(at[2])} mode 600", self._config.read_text())
        text = SHARING.sub(r"\1http-reuse never", text)
        buffer = BUFFER.search(text)
        wait = f"http-request wait-for-body time {BODY_TIMEOUT_S}s"
        fits = f"unless {{ req.hdr_val(content-length) gt {buffer[1] if buffer else 16384} }}"
        text = ENTRY.sub(lambda at: f"{at[0]}\n{at[1]}{wait} {fits}", text)
        text = RETRYING.sub(lambda at: "\n".join([at[0], *(at[1] + line for line in self._defaults())]), text)
        with open(f"{mine}.{os.getpid()}", "w") as file:
            file.write(text)
        os.replace(file.name, mine)
        words = [str(mine) if word == str(self._config) else word for word in self._words]
        return subprocess.Popen([self._binary, *words, *more], preexec_fn=prepare_child)

    def _defaults(self) -> list[str]:
        """Lines for the configuration's `defaults`; writes the file that they name."""
        body = json.dumps({"error": TOO_LATE}, separators=(",", ":"))
        head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
        file = self._config.with_name(f"{self._config.name}.408.http")
        file.write_text(f"{head}content-length: {len(body)}\r\n\r\n{body}", newline="")
        return [
            f"timeout http-request {BODY_TIMEOUT_S}s",
            f"errorfile 408 {file}",
        ]

    def _wait_until_up(self, child: subprocess.Popen[bytes]) -> bool:
        """False when it ended before."""
        while child.poll() is None:
            with suppress(OSError):
                if b"\nPid: %d\n" % child.pid in ask(own_socket(self._path), b"show info\n"):
                    return True
            self._take(child, 0.02)
        return False

    def _take(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        """Waits for a signal, which HAProxy gets unless it tells of its own end."""
        taken = signal.sigtimedwait(TAKEN, seconds)
        if taken is not None and taken.si_signo != signal.SIGCHLD:
            self._ending |= taken.si_signo in ENDING
            child.send_signal(taken.si_signo)


def main(words: list[str]) -> int:
    """The exit status; what needs no keeping up (`-v`, a configuration without an admin socket) becomes HAProxy."""
    binary = os.environ.get("WHORL_HAPROXY")
    if not binary:
        print("error: WHORL_HAPROXY must name HAProxy's binary", file=sys.stderr)
        return 2
    config = Path(words[words.index("-f") + 1]) if "-f" in words[:-1] else None
    admin = config and ADMIN.search(config.read_text())
    if not config or not admin:
        os.execv(binary, [binary, *words])
    return Supervisor(binary, words, config, admin[2]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
