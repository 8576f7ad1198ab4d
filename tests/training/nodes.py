"""ZeRO-3 runs over two Ray nodes on this machine, one of which is killed: what test_nodes.py starts.

    python -m tests.training.nodes CASES.json RESULTS.json

CASES: for each run its settings, its dataset's fingerprint and what happens to it: "nothing"; "replace": a node is killed and another
joins in its place; "shrink": a node is killed and none joins. A program of its own, since the tests' process
has a Ray of its own already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from lib import tracking
from lib.artifacts import DatasetRef
from lib.errors import StorageError
from lib.settings import Settings
from lib.training import checkpoints
from lib.training.fit import fit

# A worker takes more than half of a node and more than the head has: each is on a node of its own.
HEAD_CPUS, NODE_CPUS, WORKER_CPUS = 1, 2, 1.4


class Nodes:
    """A head and two nodes, which lie in one folder but share nothing else."""

    def __init__(self) -> None:
        head = {"num_cpus": HEAD_CPUS, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(2)]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=NODE_CPUS)

    def kill(self) -> None:
        """SIGKILL the second node's raylet and all that ran on it, as when the machine is gone."""
        processes = descendants(self.nodes[1])
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def workers(self) -> list[int]:
        """Train workers on each node, by Ray's own account: processes of an earlier run may take a while to end."""
        names = {node["NodeID"]: node["RayletSocketName"] for node in ray.nodes()}
        alive = actors(actor_state_name="ALIVE").values()
        places = [names.get(a["Address"]["NodeID"]) for a in alive if "RayTrainWorker" in a["ActorClassName"]]
        return [places.count(node.raylet_socket_name) for node in self.nodes]


def descendants(node: Any) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(raylet.process.pid).children(recursive=True)
    return []


def is_committed(folder: str) -> bool:
    with suppress(StorageError):  # Ray is writing its record
        return bool(checkpoints.committed(folder))
    return False


def disturb(nodes: Nodes, happens: str, folder: str, fitting: Future[Any]) -> dict[str, Any]:
    """Do what happens to the run; the workers on each node before, and the most there were after it."""
    while not is_committed(folder) and not fitting.done():
        time.sleep(0.05)
    before, after = nodes.workers(), [0, 0]
    if happens != "nothing":
        nodes.kill()
    if happens == "replace":
        nodes.nodes.append(nodes.add())
    while not fitting.done():
        # Without a second node its place in the list stays at 0.
        after = [max(pair) for pair in zip(after, [*nodes.workers(), 0][:2], strict=True)]
        time.sleep(0.2)
    return {"before": before, "after": after}


def main(cases_file: str, results_file: str) -> None:
    nodes, results = Nodes(), {}
    names = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    ray.init(
        address=nodes.cluster.address,
        logging_level="warning",
        runtime_env={"env_vars": {name: os.environ[name] for name in names}},
    )
    for name, case in json.loads(Path(cases_file).read_text()).items():
        settings = Settings.model_validate(case["settings"])
        dataset = DatasetRef(settings.name, case["dataset"])
        with tracking.start_run("finetune", settings) as run, ThreadPoolExecutor(1) as pool:
            # Ray starts nodes, and sets signal handlers for them, in the main thread only.
            fitting = pool.submit(fit, settings, dataset, run)
            seen = disturb(nodes, case["happens"], checkpoints.run_folder(run.ref), fitting)
            result = fitting.result()
        results[name] = {**seen, "model": result.model_uri, "run": run.ref.id, "summary": result.summary}
    Path(results_file).write_text(json.dumps(results))
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
