"""One machine's cluster: a Ray head with its dashboard, Serve's ingress and the MLflow page.

    python -m cluster.local up [--cpus 8] [--nodes 1] [--dashboard-port 8265] [--ui-port 5000] [--metrics-port 9464]
    python -m cluster.local status | down | env | ui

`up` starts a supervisor that stays in the background and owns every process of the cluster: it asks the
kernel to be given orphans (a child subreaper), so that whatever Ray, Serve or an engine leaves behind is
still its descendant. `down` ends the supervisor, and that ends them all; where the supervisor itself was
killed, `down` and the next `up` end what is left of its session. Token authentication is on;
everything but Serve's HTTP port and HAProxy's own figures listens on the loopback interface only. Both
commands are idempotent.

`--nodes N` starts N - 1 more Ray nodes: as root each on a machine of its own inside this one (cluster/machines.py), with
its own address, so that several nodes and what goes wrong between them can be tried; otherwise as further nodes of one
address.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster import ingress, machines, node, nodes
from lib import storage, tracking
from lib.command import ALONE, MIN_LOGICAL_CPUS, STATE, running_cluster
from lib.errors import ResourceError, WhorlError

HOST = nodes.HOST
LOG = STATE.with_name("cluster.log")
START_SECONDS = 120
STOP_SECONDS = 5
PR_SET_CHILD_SUBREAPER = 36


def environment() -> dict[str, str]:
    """What every process of the cluster, and every client of it, must have in its environment."""
    return {**tracking.places(), **node.environment(), **ALONE}


def up(arguments: argparse.Namespace) -> None:
    if found := running_cluster():
        print(f"the cluster is up already (supervisor {found['pid']})")
        show(found)
        return
    end_leftovers()
    ports = {
        "--port": arguments.port,
        "--dashboard-port": arguments.dashboard_port,
        "--ui-port": arguments.ui_port,
        "--metrics-port": arguments.metrics_port,
    }
    for option, port in ports.items():
        require_free(port, option)
    STATE.parent.mkdir(parents=True, exist_ok=True)
    STATE.unlink(missing_ok=True)
    subprocess.run(
        [nodes.script("ray"), "get-auth-token", "--generate"],
        env={**os.environ, **environment()},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    numbers = {"--cpus": arguments.cpus, "--nodes": arguments.nodes, **ports}
    words = [word for option, number in numbers.items() for word in (option, str(number))]
    with LOG.open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "cluster.local", "supervise", *words],
            cwd=storage.PROJECT,
            env={**os.environ, **environment()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _wait_until_up(supervisor)
    show(running_cluster())


def _wait_until_up(supervisor: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not running_cluster():
        if supervisor.poll() is not None or time.monotonic() > deadline:
            supervisor.terminate()
            raise ResourceError(
                f"the cluster did not start within {START_SECONDS} s; its last words are in {LOG}"
            )
        time.sleep(0.3)


def supervise(arguments: argparse.Namespace) -> None:
    """Run the head and the MLflow page until a signal arrives or the head dies; then end every descendant."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: stop.append(received))
    folder = nodes.temporary_folder()
    network = nodes.network_of(folder) if arguments.nodes > 1 and machines.available() else None
    try:
        _run(arguments, folder, network, stop)
    finally:
        end_descendants()
        if network:
            network.close()
        STATE.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    arguments: argparse.Namespace, folder: Path, network: machines.Network | None, stop: list[int]
) -> None:
    """Until there is something in `stop`, or the head dies."""
    agent, host = ingress.free_port(), network.address if network else HOST
    head = subprocess.Popen(
        nodes.head_command(arguments, folder, agent, host), env={**os.environ, **ingress.ports()}
    )
    subprocess.Popen(page_command(arguments.ui_port))
    awaited = {(host, arguments.port), (HOST, arguments.dashboard_port), (HOST, agent)}
    # The agent is the last to come, and jobs are refused until it is there.
    while not stop and head.poll() is None and not all(_answers(port, at) for at, port in awaited):
        time.sleep(0.3)
    if not stop and head.poll() is None:
        others = [nodes.start(arguments, folder, network, number) for number in range(1, arguments.nodes)]
        while not stop and head.poll() is None and nodes.alive(arguments.dashboard_port) < arguments.nodes:
            if any(not machine.is_on for machine in network.machines.values()) if network else False:
                raise ResourceError(f"a node did not start; {folder}/machines/*/ray.log says why")
            time.sleep(0.3)
        _write_state(arguments, host, [host, *others])
    own = {child.pid for child in psutil.Process().children()}
    while not stop and head.poll() is None:
        time.sleep(0.3)
        # Orphans that were given to us would stay zombies; those that we started are polled by who did.
        for child in psutil.Process().children():
            if child.pid not in own and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def page_command(port: int) -> list[str]:
    """The MLflow page over the runs' database and files."""
    return [
        nodes.script("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", tracking.database_url(),
        "--default-artifact-root", storage.join(storage.root(), "mlflow"),
    ]  # fmt: skip


def _write_state(arguments: argparse.Namespace, host: str, nodes: list[str]) -> None:
    keys = ("WHORL_STORAGE", "WHORL_DATABASE", "RAY_AUTH_MODE", "RAY_SERVE_ENABLE_HA_PROXY")
    state = {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "address": f"{host}:{arguments.port}",
        "nodes": nodes,
        "cpus": arguments.cpus,
        "dashboard": f"http://{HOST}:{arguments.dashboard_port}",
        "ui": f"http://{HOST}:{arguments.ui_port}",
        "metrics": f"http://{HOST}:{arguments.metrics_port}/metrics",
        "environment": {key: environment()[key] for key in keys},
    }
    storage.write_json(str(STATE), state)


def end_descendants() -> None:
    """Ask every descendant to end, then make them; again until none is left, since they may fork meanwhile."""
    deadline = time.monotonic() + STOP_SECONDS
    while children := psutil.Process().children(recursive=True):
        hard = time.monotonic() > deadline
        for child in children:
            try:
                child.kill() if hard else child.terminate()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=1 if hard else 3)
        if time.monotonic() > deadline + STOP_SECONDS:
            print(f"could not end {[c.pid for c in children]}", file=sys.stderr)
            return


def end_leftovers() -> int:
    """End what is left of a cluster whose supervisor was killed before it could; how many processes that were.

    They are found by the supervisor's session. A session's number is given to no other process while one of its
    members lives, and what changes its title (Ray's workers, vLLM's) has an empty environment to look at.
    """
    with suppress(OSError, ValueError, KeyError):
        state = json.loads(STATE.read_text())
        session, started = int(state["pid"]), float(state["started"])
        if started < psutil.boot_time() or _leads_another(session, started):
            return 0
        found = [p for p in psutil.process_iter() if _session(p.pid) == session and _runs(p)]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(found, timeout=STOP_SECONDS)
        if alive:
            raise ResourceError(f"processes {[p.pid for p in alive]} of the last cluster do not end")
        if len(state.get("nodes", ())) > 1 and machines.available():
            machines.remove(nodes.network_name())
        STATE.unlink(missing_ok=True)
        shutil.rmtree(nodes.temporary_folder(), ignore_errors=True)
        return len(found)
    return 0


def _leads_another(session: int, started: float) -> bool:
    """Whether the number is another process's by now."""
    try:
        return psutil.Process(session).create_time() != started
    except psutil.NoSuchProcess:
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def down() -> None:
    found = running_cluster()
    if not found:
        ended = end_leftovers()
        print(
            f"no cluster is up; ended {ended} processes that the last one left"
            if ended
            else "no cluster is up"
        )
        return
    supervisor = psutil.Process(found["pid"])
    supervisor.terminate()
    try:
        supervisor.wait(timeout=3 * STOP_SECONDS)
    except psutil.TimeoutExpired:
        raise ResourceError(f"supervisor {found['pid']} does not end; see {LOG}") from None
    end_leftovers()  # where it was killed meanwhile
    print("the cluster is down; no process of it is left")


def show(found: dict[str, Any]) -> None:
    nodes = found["nodes"]
    several = f" on each of {len(nodes)} nodes ({', '.join(nodes)})" if len(nodes) > 1 else ""
    print(f"  Ray          {found['address']}, {found['cpus']} logical CPUs{several}")
    print(f"  dashboard    {found['dashboard']}   (its token: ray get-auth-token)")
    print(f"  MLflow page  {found['ui']}")
    print(f"  metrics      {found['metrics']}   (for Prometheus: cluster/observability)")
    print('  for `ray job submit` and `serve deploy`: eval "$(python -m cluster.local env)"')


def status() -> None:
    found = running_cluster()
    if not found:
        print("no cluster is up; python -m cluster.local up starts one")
        return
    show(found)
    children = psutil.Process(found["pid"]).children(recursive=True)
    memory = sum(c.memory_info().rss for c in children if c.is_running()) / 2**30
    print(f"  processes    {len(children)}, {memory:.1f} GiB resident")


def env() -> None:
    """Lines for a shell's eval: what `ray job submit` and `serve` need to find this cluster."""
    found = running_cluster()
    if not found:
        raise ResourceError("no cluster is up; python -m cluster.local up starts one")
    # `ray job` reads the one, `serve` the other.
    addresses = dict.fromkeys(("RAY_ADDRESS", "RAY_DASHBOARD_ADDRESS"), found["dashboard"])
    for key, value in {**found["environment"], **addresses}.items():
        print(f"export {key}='{value}'")


def ui(port: int) -> None:
    """Show the MLflow page: the running cluster's, or one in the foreground."""
    if found := running_cluster():
        print(f"MLflow page: {found['ui']}")
        return
    require_free(port, "--ui-port")
    print(f"MLflow page: http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    command = page_command(port)
    os.execve(command[0], command, {**os.environ, **environment()})


def require_free(port: int, option: str) -> None:
    """Raises ResourceError when something listens on `port` already."""
    if _answers(port):
        raise ResourceError(f"port {port} is in use; end what uses it or choose another: {option} N")


def _answers(port: int, host: str = HOST) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["up", "down", "status", "env", "ui", "supervise", "join"])
    parser.add_argument(
        "--cpus", type=int, default=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1), help="logical CPUs"
    )
    parser.add_argument("--nodes", type=int, default=1, help="Ray nodes on this machine")
    parser.add_argument("--port", type=int, default=6379, help="of Ray's control store")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of the dashboard and the jobs API")
    parser.add_argument("--ui-port", type=int, default=5000, help="of the MLflow page")
    parser.add_argument("--metrics-port", type=int, default=9464, help="of what Prometheus reads")
    arguments = parser.parse_args()
    commands = {
        "up": lambda: up(arguments),
        "supervise": lambda: supervise(arguments),
        "join": lambda: nodes.join(arguments),
        "ui": lambda: ui(arguments.ui_port),
        "down": down,
        "status": status,
        "env": env,
    }
    try:
        commands[arguments.command]()
    except WhorlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
