"""Several machines on this one, for a Ray cluster of several nodes: each has an address, processes, memory and files of its own.

A machine is a network namespace on a bridge, a PID namespace whose end ends all that ran on it, and a mount namespace
with its own /tmp and /dev/shm; all else it shares with the host, which has the first address of the network. By
iproute2 and util-linux, as root: no container engine is needed. `available` says whether this host lets it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from lib.errors import ResourceError

TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
# Subnets of 10.64.0.0/10, in the order in which they are tried; networks of hosts and clouds seldom lie there.
SUBNETS = tuple(ipaddress.IPv4Network("10.64.0.0/10").subnets(new_prefix=24))
# Names of interfaces have at most 15 characters.
MOST_NAME = 8


def available() -> bool:
    """Whether this user may make machines on this host."""
    if sys.platform != "linux" or os.getuid() or not all(map(shutil.which, TOOLS)):
        return False
    name = f"whorl-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    inside = [
        "ip",
        "netns",
        "exec",
        name,
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "mount",
        "-t",
        "tmpfs",
        "tmpfs",
        "/tmp",
    ]
    allowed = subprocess.run(inside, capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return allowed


class Network:
    """A bridge with machines. `name` (at most 8 characters) is this network's on the host: making one again ends what is
    left of the last.

    `folder` takes the machines' /tmp; `shared` are folders that lie in /tmp and are the same on all. Raises ResourceError
    where the host does not let it.
    """

    def __init__(self, name: str, folder: Path, shared: Sequence[Path] = ()) -> None:
        if len(name) > MOST_NAME:
            raise ValueError(f"{name!r} has more than {MOST_NAME} characters")
        self.name, self.folder = name, folder
        self.shared = [path.resolve() for path in shared if path.resolve().is_relative_to("/tmp")]
        self.machines: dict[str, Machine] = {}
        self._names: dict[str, str] = {}
        remove(name)
        with Path(tempfile.gettempdir(), "whorl-networks.lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            self.subnet = _free_subnet()
            self._addresses = iter(self.subnet.hosts())
            self.address = str(next(self._addresses))
            """Of the host."""
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", f"{self.address}/{self.subnet.prefixlen}", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        self._hosts = Path("/etc/hosts").read_text()
        self.hosts = folder / "hosts"
        """The machines' /etc/hosts."""
        folder.mkdir(parents=True, exist_ok=True)
        self.call({})

    def call(self, names: Mapping[str, str]) -> None:
        """Give addresses names, which all machines know from now on; each name has the last that it was given."""
        self._names = self._names | dict(names)
        lines = [f"{address} {name}" for name, address in self._names.items()]
        # The same file, since it is mounted in machines.
        self.hosts.write_text("\n".join([self._hosts.rstrip(), *lines, ""]))

    @property
    def bridge(self) -> str:
        return f"br-{self.name}"

    def machine(self, name: str, shm_bytes: int | None = None) -> Machine:
        """A new machine, with a /dev/shm of so many bytes. All know it by its name: a process that cannot resolve that of
        its own machine (PyTorch's Gloo) would listen on the loopback address, where no other finds it."""
        made = Machine(self, name, str(next(self._addresses)), shm_bytes)
        self.machines[name] = made
        self.call({name: made.address})
        return made

    def close(self) -> None:
        for machine in list(self.machines.values()):
            machine.remove()
        remove(self.name)


class Machine:
    """Made by `Network.machine`. It is on while what `start` started runs."""

    def __init__(self, network: Network, name: str, address: str, shm_bytes: int | None) -> None:
        self.name, self.address = name, address
        self.folder = network.folder / name
        self._network, self._shm_bytes = network, shm_bytes
        self.namespace = f"{network.name}-{name}"
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        number = address.rpartition(".")[2]
        outside, inside = f"v{network.name}-{number}", f"w{network.name}-{number}"
        _ip("netns", "add", self.namespace)
        _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", self.namespace, "name", "eth0")
        _ip("link", "set", outside, "master", network.bridge)
        _ip("link", "set", outside, "up")
        of = ("-n", self.namespace)
        _ip(*of, "address", "add", f"{address}/{network.subnet.prefixlen}", "dev", "eth0")
        _ip(*of, "link", "set", "lo", "up")
        _ip(*of, "link", "set", "eth0", "up")
        _ip(*of, "route", "add", "default", "via", network.address)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: IO[bytes] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Switch it on with a command, whose end switches it off."""
        if self.is_on:
            raise ValueError(f"{self.name} is on")
        ready, telling = os.pipe()
        # The shell stays: whoever is the first process of a machine must bury the orphans.
        told = f"echo >&{telling}; exec {telling}>&-"
        script = "\n".join([*self._mounts(), told, shlex.join(command), "exit $?"])
        space = ["ip", "netns", "exec", self.namespace]
        own = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        self.process = subprocess.Popen(
            [*space, *own, "bash", "-c", script],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[telling],
        )
        os.close(telling)
        with os.fdopen(ready, "rb") as file:
            if not file.read(1):
                raise ResourceError(f"{self.name} does not start; its mounts failed ({self._mounts()})")
        return self.process

    def _mounts(self) -> list[str]:
        size = f",size={self._shm_bytes}" if self._shm_bytes else ""
        lines = ["set -e", f"hostname {self.name}", f"mount -t tmpfs -o mode=1777{size} tmpfs /dev/shm"]
        for path in self._network.shared:
            place = self.folder / path.relative_to("/tmp")
            lines += [
                f"mkdir -p {shlex.quote(str(place))}",
                shlex.join(["mount", "--bind", str(path), str(place)]),
            ]
        lines.append(shlex.join(["mount", "--bind", str(self._network.hosts), "/etc/hosts"]))
        return [*lines, shlex.join(["mount", "--rbind", str(self.folder), "/tmp"]), "set +e"]

    @property
    def is_on(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """A command on the machine while it is on; `options` as `subprocess.run` has them."""
        return subprocess.run([*self.enter, *command], text=True, **options)

    @property
    def enter(self) -> list[str]:
        """What goes before a command that is to run on the machine."""
        if self.process is None or not self.is_on:
            raise ResourceError(f"{self.name} is off")
        # unshare is the parent of the first process.
        (first,) = psutil.Process(self.process.pid).children()
        return ["nsenter", "--target", str(first.pid), "--mount", "--net", "--pid", "--"]

    def kill(self) -> None:
        """As when the power goes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()

    def remove(self) -> None:
        self.kill()
        self._network.machines.pop(self.name, None)
        with suppress(ResourceError):
            _ip("netns", "delete", self.namespace)


def remove(name: str) -> None:
    """End what is left of a network: its machines with all that runs on them, and its bridge."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        namespace = line.split()[0]
        if not namespace.startswith(f"{name}-"):
            continue
        inside = subprocess.run(
            ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
        )
        for pid in inside.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
    subprocess.run(["ip", "link", "delete", f"br-{name}"], capture_output=True, check=False)


def _free_subnet() -> ipaddress.IPv4Network:
    """One that no interface of this host has an address in."""
    taken = [
        ipaddress.IPv4Address(one.address)
        for addresses in psutil.net_if_addrs().values()
        for one in addresses
        if one.family == socket.AF_INET
    ]
    for subnet in SUBNETS:
        if not any(address in subnet for address in taken):
            return subnet
    raise ResourceError("every subnet of 10.64.0.0/10 has an address of this machine in it")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"ip {' '.join(words)}: {done.stderr.strip()}; making networks needs root")
