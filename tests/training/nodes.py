"""A fine-tuning run over two Ray nodes on this machine, one of which is killed: what test_nodes.py starts.

    python -m tests.training.nodes SETTINGS.json FINGERPRINT replace|shrink

`replace` brings up another node in the place of the one that was killed, `shrink` does not. Prints one line
of JSON. A program of its own, since the tests' process has a Ray of its own already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from lib import tracking
from lib.artifacts import DatasetRef
from lib.settings import Settings
from lib.training import checkpoints
from lib.training.fit import fit

# A worker takes more than half of a node and more than the head has: each is on a node of its own.
HEAD_CPUS, NODE_CPUS, WORKER_CPUS = 1, 2, 1.4


def workers_on(node: Any) -> int:
    """Train workers among the processes of a node's raylet."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    return sum("RayTrainWorker" in " ".join(child.cmdline()) for child in children)


def main(settings_file: str, fingerprint: str, kind: str) -> None:
    settings = Settings.model_validate(json.loads(Path(settings_file).read_text()))
    dataset = DatasetRef(settings.name, fingerprint)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
    names = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    ray.init(
        address=cluster.address,
        logging_level="warning",
        runtime_env={"env_vars": {name: os.environ[name] for name in names}},
    )
    seen: dict[str, Any] = {}

    def kill(folder: str, fitting: Future[Any]) -> None:
        while not checkpoints.committed(folder) and not fitting.done():
            time.sleep(0.05)
        seen["before"] = [workers_on(node) for node in nodes]
        cluster.remove_node(nodes[1], allow_graceful=False)
        if kind == "replace":
            nodes[1] = cluster.add_node(num_cpus=NODE_CPUS)
        left = nodes if kind == "replace" else nodes[:1]
        seen["after"] = [0] * len(left)
        while not fitting.done():  # the old workers of the node that is left are ended first
            seen["after"] = [max(n, workers_on(node)) for n, node in zip(seen["after"], left, strict=True)]
            time.sleep(0.2)

    with tracking.start_run("finetune", settings) as run, ThreadPoolExecutor(1) as pool:
        # Ray starts nodes, and sets signal handlers for them, in the main thread only.
        fitting = pool.submit(fit, settings, dataset, run)
        kill(checkpoints.run_folder(run.ref), fitting)
        result = fitting.result()
    print(json.dumps({**seen, "model": result.model_uri, "run": run.ref.id, "summary": result.summary}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
