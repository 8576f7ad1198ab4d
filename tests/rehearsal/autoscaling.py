"""Ray's autoscaler with the worker groups of a manifest, on nodes that its fake provider starts as processes here.

    python -m tests.rehearsal.autoscaling GROUPS.json RESULT.json

GROUPS: {"max_workers": N, "idle_minutes": M, "groups": {name: {resources, min_workers, max_workers}}, "ask": {CPU, GPU}}. A task
that asks for that much is handed in while there is no such node; RESULT has how many nodes of each group there were
before, while it ran and after it was idle. To be run on a machine of its own (cluster/machines.py): Ray's provider ends every
Ray that it sees.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private import fake_multi_node
from ray.cluster_utils import AutoscalingCluster

HEAD = {"CPU": 0, "object_store_memory": 100 * 2**20}
PATIENCE_S = 240.0
# The provider's defaults, in a file that Ray's own package leaves out.
DEFAULTS = {
    "cluster_name": "fake_multinode",
    "max_workers": 8,
    "idle_timeout_minutes": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,  # the nodes share an address
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {"ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0}},
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "file_mounts_sync_continuously": False,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{
        name: []
        for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    },
    **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
}


def put_defaults() -> None:
    """Where the provider looks for them, on this machine alone."""
    folder = Path(fake_multi_node.__file__).parent
    own = Path(shutil.copytree(folder, "/tmp/fake_multi_node"))
    (own / "example.yaml").write_text(json.dumps(DEFAULTS))
    subprocess.run(["mount", "--bind", str(own), str(folder)], check=True)


def nodes(groups: dict[str, Any]) -> dict[str, int]:
    """Living workers of each group; each is told by a resource of its group's name."""
    living = Counter(
        name
        for node in ray.nodes()
        if node["Alive"]
        for name in groups
        if f"group-{name}" in node["Resources"]
    )
    return {name: living[name] for name in groups}


def wait(until: Any) -> float:
    began = time.monotonic()
    while not until():
        if time.monotonic() - began > PATIENCE_S:
            sys.exit(f"nothing happened within {PATIENCE_S:.0f} s")
        time.sleep(0.5)
    return time.monotonic() - began


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    groups = given["groups"]
    types = {
        name: {
            "resources": {**one["resources"], f"group-{name}": 1},
            "node_config": {},
            "min_workers": one["min_workers"],
            "max_workers": one["max_workers"],
        }
        for name, one in groups.items()
    }
    put_defaults()
    cluster = AutoscalingCluster(
        dict(HEAD),
        types,
        autoscaler_v2=True,
        max_workers=given["max_workers"],
        idle_timeout_minutes=given["idle_minutes"],
    )
    cluster.start()
    ray.init("auto", logging_level="warning")
    least = {name: one["min_workers"] for name, one in groups.items()}
    wait(lambda: nodes(groups) == least)
    found: dict[str, Any] = {"before": nodes(groups)}
    asked = dict(given["ask"])

    @ray.remote(num_cpus=asked.pop("CPU", 0), num_gpus=asked.pop("GPU", 0))
    def work() -> str:
        time.sleep(5)
        return ray.get_runtime_context().get_node_id()

    running = work.remote()
    wait(lambda: nodes(groups) != least)
    found["while"] = nodes(groups)
    found["done"] = bool(ray.get(running, timeout=PATIENCE_S))
    found["idle_s"] = wait(lambda: nodes(groups) == least)
    found["after"] = nodes(groups)
    Path(sys.argv[2]).write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
