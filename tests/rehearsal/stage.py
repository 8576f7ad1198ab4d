"""A namespace of Kubernetes on this machine: built manifests become Ray nodes, each on a machine of its own.

Played are the operator, which makes pods and puts others in the place of lost ones; the services' names; readiness
probes, by which a service leaves out who is not ready; the stores (PostgreSQL and Redis of this machine). Not played: the
autoscaler beside the head, limits of CPU and memory, users, network policies. What the manifests say of folders in the
image is this checkout's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.machines import Machine, Network
from lib import storage
from tests.rehearsal.operator import Manifest, Operator, Pod, find, head_service
from tests.servers import Postgres, RedisServer

IMAGE = "/opt/whorl"
CLUSTER = "whorl-service"
STARTS_S = 240.0
OBJECT_STORE = 0.3
# How often the operator and the kubelet look.
NOTICED_S = 1.0


@dataclass
class Running:
    """A pod on its machine."""

    pod: Pod
    machine: Machine
    failures: int = 0
    """Of its readiness probe, one after the other."""
    is_ready: bool = False


@dataclass
class Service:
    """What leads to the pods that are ready, one after the other."""

    stage: Stage
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def address(self) -> str | None:
        ready = [r.machine.address for r in list(self.stage.workers) if r.is_ready]
        with self._lock:
            self._next += 1
            return f"http://{ready[self._next % len(ready)]}:8000" if ready else None


class Stage:
    """The RayService's cluster of an overlay, with `workers` workers of its first group."""

    def __init__(self, manifests: Iterable[Manifest], folder: Path, workers: int) -> None:
        self.manifests = list(manifests)
        self.operator = Operator(self.manifests)
        self.service_spec = find(self.manifests, "RayService", CLUSTER)["spec"]
        self.spec: Manifest = self.service_spec["rayClusterConfig"]
        self.spec["workerGroupSpecs"] = [{**self.spec["workerGroupSpecs"][0], "replicas": workers}]
        self.folder = folder
        self.network = Network(
            f"r{os.getpid() % 10**6}", folder / "machines", [storage.PROJECT, folder, Path(sys.prefix)]
        )
        self._closing = threading.Event()
        self.postgres, self.redis = Postgres(self.network.address), RedisServer(self.network.address)
        self.database = self.postgres.fresh()
        self.workers: list[Running] = []
        self.head: Running | None = None
        self._made = 0
        self.network.call({"whorl-redis": self.network.address, "whorl-database": self.network.address})
        self._probing = threading.Thread(target=self._probe, daemon=True)
        self._reconciling = threading.Thread(target=self._reconcile, daemon=True)
        self.is_held = threading.Event()
        """While it is set, nobody puts a pod in the place of a lost one."""

    def start(self) -> None:
        """Raises TimeoutError when it does not come up."""
        head, *workers = self.operator.pods(CLUSTER, self.spec, "RayService")
        self.head = self.run(head)
        for thread in (self._reconciling, self._probing):
            thread.start()
        # The operator's init container has workers wait for it.
        self.wait(self.head_answers, "the head")
        self.workers = [self.run(pod) for pod in workers]
        self.wait(lambda: self.alive() == 1 + len(workers), "the workers")

    def close(self) -> None:
        self._closing.set()
        if self._reconciling.is_alive():  # it may be making a pod
            self._reconciling.join()
        self.network.close()
        self.redis.stop()
        self.postgres.remove()

    def run(self, pod: Pod) -> Running:
        """A new pod, on a new machine with a new address."""
        self._made += 1
        machine = self.network.machine(f"{pod.group}-{self._made}", pod.shm_bytes)
        if pod.is_head:
            self.network.call(dict.fromkeys((head_service(CLUSTER), f"{CLUSTER}-head-svc"), machine.address))
        # In a pod Ray sees the pod's memory, of which it takes so much for its object store.
        store = f" --object-store-memory={int(OBJECT_STORE * pod.memory_bytes)}"
        with (machine.folder / "ray.log").open("wb") as log:
            # The driver of a job that is handed in runs where the image's working folder is.
            machine.start(["bash", "-c", pod.command + store], self.environment(pod), log, storage.PROJECT)
        return Running(pod, machine)

    def environment(self, pod: Pod) -> dict[str, str]:
        """The pod's, with this machine's places for the image's and the stores'."""
        scripts = str(Path(sys.executable).parent)
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        found = {
            name: value.replace(f"{IMAGE}/.venv/lib/python3.11/site-packages", packages).replace(
                IMAGE, str(storage.PROJECT)
            )
            for name, value in pod.environment.items()
        }
        redis = {"RAY_REDIS_ADDRESS": f"whorl-redis:{self.redis.port}", "REDIS_PASSWORD": self.redis.password}
        return {
            **found,
            **{name: value for name, value in redis.items() if name in found},
            **self.places,
            "PATH": f"{scripts}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            # Names are in /etc/hosts here, and gRPC's own resolver would ask a server for them.
            "GRPC_DNS_RESOLVER": "native",
        }

    @property
    def places(self) -> dict[str, str]:
        return {"WHORL_DATABASE": self.database, "WHORL_STORAGE": f"file://{self.folder}/storage"}

    @property
    def token(self) -> str:
        assert self.head is not None
        return self.head.pod.environment["RAY_AUTH_TOKEN"]

    @property
    def dashboard(self) -> str:
        assert self.head is not None
        return f"http://{self.head.machine.address}:8265"

    def ask(self, path: str, data: bytes | None = None, method: str = "GET") -> bytes:
        """Of the head's dashboard, with the token. Raises OSError."""
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        request = urllib.request.Request(f"{self.dashboard}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: bytes = answer.read()
            return found

    def head_answers(self) -> bool:
        with suppress(OSError):
            return b"success" in self.ask("/api/gcs_healthz")
        return False

    def alive(self) -> int:
        """Nodes of the cluster; 0 when the head does not say so now."""
        with suppress(OSError, ValueError):
            nodes = json.loads(self.ask("/nodes?view=summary"))["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        return 0

    def deploy(self) -> None:
        """As the operator does, with a replica for each worker: one without is not ready, and gets no requests."""
        config = yaml.safe_load(self.service_spec["serveConfigV2"])
        for application in config["applications"]:
            replicas = {"min_replicas": len(self.workers), "max_replicas": len(self.workers)}
            application["args"] = {**application.get("args", {}), **replicas}
        self.ask("/api/serve/applications/", json.dumps(config).encode(), "PUT")

    def is_serving(self) -> bool:
        """Whether all applications run, each with a replica for each worker, wherever these are: Serve starts a lost one
        where there is room, and moves none to a worker that comes."""
        with suppress(OSError, ValueError):
            found = json.loads(self.ask("/api/serve/applications/"))["applications"].values()
            replicas = [d["replicas"] for one in found for d in one["deployments"].values()]
            return (
                bool(replicas)
                and all(one["status"] == "RUNNING" for one in found)
                and all([r["state"] for r in some] == ["RUNNING"] * len(self.workers) for some in replicas)
                and any(worker.is_ready for worker in self.workers)
            )
        return False

    def wait(self, condition: Any, what: str, seconds: float = STARTS_S) -> float:
        """Seconds that it took. Raises TimeoutError."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"{what} did not come up within {seconds:.0f} s; see {self.folder}")
            time.sleep(0.2)
        return time.monotonic() - began

    def _probe(self) -> None:
        """The workers' readiness, by the probe of their manifest."""
        while not self._closing.is_set():
            for worker in list(self.workers):
                probe = worker.pod.readiness
                url = f"http://{worker.machine.address}:{probe['httpGet']['port']}{probe['httpGet']['path']}"
                try:
                    urllib.request.urlopen(url, timeout=probe.get("timeoutSeconds", 1)).close()
                except OSError:
                    worker.failures += 1
                    worker.is_ready &= worker.failures < probe.get("failureThreshold", 3)
                else:
                    worker.failures, worker.is_ready = 0, True
            self._closing.wait(self.workers[0].pod.readiness.get("periodSeconds", 10) if self.workers else 1)

    def _reconcile(self) -> None:
        """What kubelet and operator do: a pod whose process has ended is not ready, and another takes its place."""
        while not self._closing.wait(NOTICED_S):
            for running in [self.head, *self.workers]:
                if running is None or running.machine.is_on or self.is_held.is_set():
                    continue
                running.machine.remove()
                other = self.run(running.pod)
                if running is self.head:
                    self.head = other
                else:
                    self.workers[self.workers.index(running)] = other

    def kill(self, running: Running) -> None:
        """All of its processes at once."""
        running.machine.kill()
        running.is_ready = False
