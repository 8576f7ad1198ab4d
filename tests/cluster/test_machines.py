"""cluster/machines.py: machines on this one have their own address, processes and files, and end as machines do."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import machines
from cluster.machines import Machine, Network
from lib.errors import ResourceError

pytestmark = pytest.mark.skipif(
    not machines.available(), reason="this host lets no network namespaces be made (root is needed)"
)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(f"t{os.getpid() % 10**6}", tmp_path / "machines", [tmp_path])
    yield made
    made.close()


def started(machine: Machine, *command: str) -> Machine:
    machine.start(command or ("sleep", "600"), os.environ)
    return machine


def said(machine: Machine, *command: str) -> str:
    return machine.run(command, capture_output=True, check=True).stdout.strip()


def test_each_has_an_address_and_reaches_the_others(network: Network) -> None:
    one, other = (started(network.machine(name)) for name in ("one", "other"))
    for machine in (one, other):
        assert f"{machine.address}/24" in said(machine, "ip", "-4", "-o", "address", "show", "eth0")
    assert len({network.address, one.address, other.address}) == 3
    serve = f"import socket as s; s.create_server(('{other.address}', 8000)).accept()[0].send(b'hello')"
    ask = f"import socket as s; print(s.create_connection(('{other.address}', 8000), 5).recv(9).decode())"
    # A port of one machine is none of another's.
    refused = one.run(["python3", "-c", ask.replace(other.address, one.address)], capture_output=True)
    assert "refused" in refused.stderr
    with subprocess.Popen([*other.enter, "python3", "-c", serve]) as serving:
        deadline = time.monotonic() + 20
        while (found := one.run(["python3", "-c", ask], capture_output=True)).returncode:
            assert time.monotonic() < deadline, found.stderr
            time.sleep(0.1)
        assert found.stdout == "hello\n"
        assert serving.wait(10) == 0


def test_files_are_its_own_but_for_those_that_are_shared(network: Network, tmp_path: Path) -> None:
    one, other = started(network.machine("one", 2**20)), started(network.machine("other"))
    (tmp_path / "shared").write_text("all")
    said(one, "sh", "-c", "echo mine > /tmp/own; echo mine > /dev/shm/own")
    assert said(one, "cat", "/tmp/own", "/dev/shm/own", str(tmp_path / "shared")) == "mine\nmine\nall"
    assert other.run(["cat", "/tmp/own"], capture_output=True).returncode
    assert not Path("/tmp/own").exists()
    assert not Path("/dev/shm/own").exists()
    assert (one.folder / "own").read_text() == "mine\n"
    assert "1024" in said(one, "df", "-k", "--output=size", "/dev/shm")


def test_names_are_known_to_all_and_may_move(network: Network) -> None:
    one, other = started(network.machine("one")), started(network.machine("other"))
    assert [said(m, "getent", "ahostsv4", "one").split()[0] for m in (one, other)] == [one.address] * 2
    for machine in (one, other):
        network.call({"head.svc": machine.address})
        assert said(one, "getent", "ahostsv4", "head.svc").split()[0] == machine.address
    assert said(other, "getent", "ahostsv4", "localhost")
    assert "head.svc" not in Path("/etc/hosts").read_text()


def test_with_a_machine_all_of_it_ends(network: Network) -> None:
    machine = started(network.machine("one"), "sh", "-c", "setsid sleep 601 & setsid sleep 602 & sleep 600")
    deadline = time.monotonic() + 20
    while not all(
        f"sleep {n}" in (inside := said(machine, "ps", "-e", "-o", "args=")) for n in (600, 601, 602)
    ):
        assert time.monotonic() < deadline, inside
        time.sleep(0.05)
    assert len(inside.splitlines()) == 6, "it sees none of the host's"
    assert machine.process is not None
    left = psutil.Process(machine.process.pid).children(recursive=True)
    machine.kill()
    psutil.wait_procs(left, timeout=10)
    assert not any(process.is_running() for process in left)
    with pytest.raises(ResourceError, match="one is off"):
        machine.run(["true"])
    assert said(started(machine), "pgrep", "-c", "sleep") == "1", "it can be switched on again"


def test_nothing_is_left_of_a_network(network: Network) -> None:
    machine = started(network.machine("one"))
    again = Network(network.name, network.folder)  # as after a crash
    assert machine.process is not None
    assert machine.process.wait(10) != 0
    again.close()
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert network.name not in links + spaces


def test_a_name_that_no_interface_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 characters"):
        Network("much-too-long", tmp_path)
