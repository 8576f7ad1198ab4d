"""The worker groups of the overlays under Ray's own autoscaler: from nothing to what a job asks for, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import machines
from cluster.machines import Network
from lib import storage
from tests.k8s.building import KUBECTL, build
from tests.k8s.policies import quantity
from tests.rehearsal.operator import find

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl to build the manifests"),
    pytest.mark.skipif(
        not machines.available(), reason="this host lets no network namespaces be made (root is needed)"
    ),
]
# The manifest waits minutes before it lets an idle node go.
IDLE_MINUTES = 0.1


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(
        f"a{os.getpid() % 10**6}", tmp_path / "machines", [tmp_path, storage.PROJECT, Path(sys.prefix)]
    )
    yield made
    made.close()


def groups(spec: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(group["rayStartParams"].get("num-cpus", quantity(limits["cpu"])))}
        gpus = sum(int(count) for name, count in limits.items() if name.endswith("gpu"))
        resources |= {"GPU": gpus} if gpus else {}
        found[group["groupName"]] = {
            "resources": resources,
            "min_workers": group["minReplicas"],
            "max_workers": group["maxReplicas"],
        }
    return found


def test_a_job_that_asks_for_a_gpu_gets_a_node_and_gives_it_back(network: Network, tmp_path: Path) -> None:
    spec = find(build("overlays/gpu"), "RayCluster", "whorl")["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    given = groups(spec)
    assert given["gpu"]["min_workers"] == 0
    asked = {
        "groups": given,
        "max_workers": sum(one["max_workers"] for one in given.values()),
        "idle_minutes": IDLE_MINUTES,
        "ask": {"GPU": 1},
    }
    (tmp_path / "groups.json").write_text(json.dumps(asked))
    machine = network.machine("autoscaler")
    program = [
        sys.executable,
        "-m",
        "tests.rehearsal.autoscaling",
        str(tmp_path / "groups.json"),
        str(tmp_path / "found.json"),
    ]
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WHORL_"))}
    with (tmp_path / "log").open("wb") as log:
        machine.start(program, {**clean, "PATH": scripts, "HOME": "/tmp"}, log, storage.PROJECT)
    assert machine.process is not None
    try:
        machine.process.wait(500)
    except subprocess.TimeoutExpired:
        pytest.fail((tmp_path / "log").read_text()[-4000:])
    assert (tmp_path / "found.json").exists(), (tmp_path / "log").read_text()[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    nothing = {name: one["min_workers"] for name, one in given.items()}
    assert found["before"] == nothing
    assert found["while"] == nothing | {"gpu": 1}
    assert found["done"]
    assert found["after"] == nothing
