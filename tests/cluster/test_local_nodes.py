"""A local cluster of two nodes as a user drives it: jobs from outside, a node that is lost, and who is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster import machines
from cluster.ingress import free_port
from tests.cluster.test_local import SCRIPTS, TREE, Copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ADDRESSES = """
import ray
ray.init("auto")
@ray.remote(num_cpus=5)
def where():
    import os, time
    time.sleep(2)
    return f"{ray.util.get_node_ip_address()} {os.uname().nodename}"
print(sorted(ray.get([where.remote(), where.remote()])))
"""
# What a client without the token tries.
STRANGER = """
import sys, ray
try:
    ray.init(sys.argv[1], logging_level="error")
    print("let in")
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Copy]:
    if not machines.available():
        pytest.skip("this host lets no network namespaces be made (root is needed)")
    folder = tmp_path_factory.mktemp("checkout")
    for name in TREE:
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_base, folder / "base")
    random = np.random.default_rng(0)
    words = [
        f"the dress {'good' if i % 2 else 'awful'} {'abcdefghij'[random.integers(10)]} {i}"
        for i in range(600)
    ]
    (folder / "mine.csv").write_text(
        "\n".join(["review,stars", *(f"{w},{5 if i % 2 else 1}" for i, w in enumerate(words))])
    )
    (folder / "mine.yaml").write_text(
        f"""
name: mine
task: sentiment
data: {{source: {folder}/mine.csv, columns: {{text: review, label: stars}}, labels: {{1: bad, 5: good}}}}
model: {{base: {folder}/base, max_length: 32}}
training: {{epochs: 20, tokens_per_batch: 256, cpus_per_worker: 0.5, checkpoint_every: 5, patience: null}}
promotion: {{min_gain: 0}}
"""
    )
    (folder / "where.py").write_text(ADDRESSES)
    options = ("--port", "--dashboard-port", "--ui-port", "--metrics-port")
    made = Copy(folder, {option: free_port() for option in options})
    done = made.module(*made.up, "--nodes", "2")
    assert done.returncode == 0, done.stderr + (folder / ".whorl" / "cluster.log").read_text()[-3000:]
    yield made
    made.module("cluster.local", "down")


def state(copy: Copy) -> dict[str, object]:
    found: dict[str, object] = json.loads((copy.folder / ".whorl" / "cluster.json").read_text())
    return found


def submit(copy: Copy, *words: str) -> subprocess.CompletedProcess[str]:
    return copy.module("cluster.submit", "--", *words)


def test_each_node_has_an_address_and_work(copy: Copy) -> None:
    nodes = state(copy)["nodes"]
    assert isinstance(nodes, list)
    assert len(set(nodes)) == 2
    done = submit(copy, "python", "where.py")
    assert done.returncode == 0, done.stderr
    here = socket.gethostname()
    assert f"['{nodes[0]} {here}', '{nodes[1]} node-1']" in done.stdout
    assert f"on each of 2 nodes ({', '.join(nodes)})" in copy.module("cluster.local", "status").stdout


def test_a_job_comes_back_with_its_own_exit_code_and_words(copy: Copy) -> None:
    done = submit(copy, "jobs.preprocess", "--config", "mine.yaml", "--data.limt", "3")
    assert done.returncode == 2
    assert "unknown key 'data.limt'; did you mean 'limit'?" in done.stdout
    assert "MB of code sent" in done.stderr
    done = submit(copy, "python", "-c", "for i in range(5000): print('line', i)")
    assert done.returncode == 0
    told = [line for line in done.stdout.splitlines() if line.startswith("line")]
    assert told == [f"line {i}" for i in range(5000)], "each once, in order"
    done = submit(copy, "python", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode not in (0, 1)


@pytest.mark.long
def test_ctrl_c_stops_the_job_and_the_next_goes_on_with_its_run(copy: Copy) -> None:
    assert submit(copy, "jobs.preprocess", "--config", "mine.yaml").returncode == 0
    words = ["jobs.finetune", "--config", "mine.yaml", "--training.resume", "auto"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WHORL_", "RAY_"))}
    command = [sys.executable, "-m", "cluster.submit", "--", *words]
    with subprocess.Popen(command, cwd=copy.folder, env=clean, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "validation after step" in line:
                break
        running.send_signal(signal.SIGINT)
        running.stdout.read()
        assert running.wait(100) == 130
    drivers = [p for p in psutil.process_iter(["cmdline"]) if "jobs.finetune" in (p.info["cmdline"] or [])]
    assert not drivers, "it has stopped"
    again = submit(copy, *words)
    assert again.returncode == 0, again.stdout[-3000:]
    assert re.search(r"goes on from the checkpoint of step \d+", again.stdout), again.stdout[:3000]


def test_who_has_no_token_is_refused_everywhere(copy: Copy) -> None:
    found = state(copy)
    for mode, token in (("token", "0" * 64), ("disabled", "")):
        stranger = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
        joined = copy.run(sys.executable, "-c", STRANGER, str(found["address"]), **stranger)
        assert joined.stdout.startswith("refused"), joined.stdout + joined.stderr
        sent = copy.run(
            str(SCRIPTS / "ray"),
            "job",
            "submit",
            "--address",
            str(found["dashboard"]),
            "--",
            "true",
            **stranger,
        )
        assert sent.returncode
        assert "401" in sent.stderr or "uthenticat" in sent.stderr, sent.stderr
        told = copy.run(sys.executable, "-m", "cluster.submit", "--", "python", "where.py", **stranger)
        assert told.returncode == 2
        assert "the token is missing or wrong: RAY_AUTH_TOKEN" in told.stderr


def test_a_node_that_is_lost_is_told_and_the_rest_works(copy: Copy) -> None:
    (node,) = (
        p
        for p in psutil.process_iter(["cmdline"])
        if f"--node_ip_address={state(copy)['nodes'][1]}" in (p.info["cmdline"] or [])
    )  # type: ignore[index]
    node.kill()
    deadline = time.monotonic() + 60
    count = "import ray; ray.init('auto'); print('alive', sum(n['Alive'] for n in ray.nodes()))"
    while "alive 1" not in submit(copy, "python", "-c", count).stdout:
        assert time.monotonic() < deadline


def test_down_leaves_neither_process_nor_network(copy: Copy) -> None:
    started = copy.processes()
    assert len(started) > 5
    done = copy.module("cluster.local", "down")
    assert done.returncode == 0, done.stderr
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    for what in ("link", "netns"):
        shown = subprocess.run(["ip", what], capture_output=True, text=True, check=True).stdout
        assert "node-1" not in shown
        assert "br-w" not in shown


@pytest.mark.long
def test_without_root_the_nodes_share_an_address(copy: Copy) -> None:
    less = ["setpriv", "--bounding-set=-sys_admin,-net_admin"]
    done = copy.run(*less, sys.executable, "-m", *copy.up, "--nodes", "2")
    assert done.returncode == 0, done.stderr
    counted = submit(
        copy, "python", "-c", "import ray; ray.init('auto'); print(ray.cluster_resources()['CPU'])"
    )
    assert float(counted.stdout.split()[-1]) == 2 * int(str(state(copy)["cpus"]))
    assert copy.module("cluster.local", "down").returncode == 0
