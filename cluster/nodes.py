"""The Ray nodes of a local cluster: the head, and further ones on this machine.

As root each further node is on a machine of its own inside this one (cluster/machines.py), with its own address; otherwise it is
one more node of the head's address.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from cluster import ingress, machines
from lib import storage, tracking

HOST = "127.0.0.1"


def temporary_folder() -> Path:
    """Ray's folder of this checkout. Short, since the paths of its sockets must stay under 107 characters."""
    name = hashlib.sha256(str(storage.PROJECT).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"whorl-{os.getuid()}-{name}"


def network_of(folder: Path) -> machines.Network:
    """For this checkout's nodes, on which the code and what it keeps are the same."""
    kept = [Path(sys.prefix), storage.PROJECT]
    fs, inside = storage.filesystem(storage.root())
    if storage.is_local(fs):
        kept.append(Path(inside))
    if tracking.database_url().startswith("sqlite:///"):
        kept.append(Path(tracking.database_url().removeprefix("sqlite:///")).parent)
    for path in kept:
        path.mkdir(parents=True, exist_ok=True)
    return machines.Network(network_name(), folder / "machines", kept)


def network_name() -> str:
    return f"w{temporary_folder().name[-7:]}"


def head_command(arguments: argparse.Namespace, folder: Path, agent: int, host: str) -> list[str]:
    return [
        script("ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--node-ip-address={host}", f"--port={arguments.port}", f"--num-cpus={arguments.cpus}",
        "--include-dashboard=true", f"--dashboard-host={HOST}", f"--dashboard-port={arguments.dashboard_port}",
        # Its default is one fixed port, which a second Ray on this machine would hold.
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
        f"--metrics-export-port={arguments.metrics_port}",
    ]  # fmt: skip


def node_command(head: str, address: str, cpus: int, folder: Path) -> list[str]:
    return [
        script("ray"), "start", "--block", "--disable-usage-stats", f"--address={head}",
        f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={ingress.free_port()}",
    ]  # fmt: skip


def start(arguments: argparse.Namespace, folder: Path, network: machines.Network | None, number: int) -> str:
    """Begin a further node; its address."""
    address = f"{network.address if network else HOST}:{arguments.port}"
    if network is None:
        words = ["--port", str(arguments.port), "--cpus", str(arguments.cpus)]
        subprocess.Popen([sys.executable, "-m", "cluster.local", "join", *words])
        return HOST
    machine = network.machine(f"node-{number}")
    with (machine.folder / "ray.log").open("wb") as log:
        machine.start(node_command(address, machine.address, arguments.cpus, folder), os.environ, log)
    return machine.address


def join(arguments: argparse.Namespace) -> None:
    """One more node of this machine's cluster at the head's own address, until a signal ends it. Not by `ray start`, which
    takes the loopback interface's address for another, but as `ray.cluster_utils` does."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=f"{HOST}:{arguments.port}",
        node_ip_address=HOST,
        num_cpus=arguments.cpus,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,  # the head's reads the logs of this machine
    )
    Node(parameters, head=False, shutdown_at_exit=True)
    signal.pause()


def alive(dashboard_port: int) -> int:
    """How many nodes the cluster has; 0 when it does not say so now."""
    url = f"http://{HOST}:{dashboard_port}/nodes?view=summary"
    headers = {"Authorization": f"Bearer {_token()}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


@functools.cache
def _token() -> str:
    asked = subprocess.run([script("ray"), "get-auth-token"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def script(name: str) -> str:
    return str(Path(sys.executable).parent / name)
