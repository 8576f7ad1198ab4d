"""What KubeRay would make of a RayCluster's specification: for each pod the command and the environment of its Ray container.

Follows the operator's own rules (ray-operator/controllers/ray/common/pod.go, version 1.6): options of `ray start` that it
adds, variables that it sets, what fault tolerance and token authentication add. Pods' other containers, probes and
volumes are the rehearsal's to play; `/dev/shm` has the size that its volume says.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.k8s.policies import quantity

Manifest = dict[str, Any]
GCS_PORT, METRICS_PORT, AGENT_PORT = 6379, 8080, 52365
# Seconds that a worker waits for a head that is away before it gives up, with fault tolerance.
RECONNECT_S = "600"
# Options whose value is said even when it is true or false.
SAID = ("include-dashboard", "log-color")


@dataclass(frozen=True)
class Pod:
    group: str
    """`headgroup`, or the name of the group of workers."""
    command: str
    """For bash."""
    environment: dict[str, str]
    memory_bytes: int
    shm_bytes: int | None
    readiness: Manifest
    """The probe."""

    @property
    def is_head(self) -> bool:
        return self.group == "headgroup"


def find(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


class Operator:
    """Makes the pods of clusters out of built manifests."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests

    def pods(self, name: str, spec: Manifest, creator: str) -> Iterator[Pod]:
        """The head first, then the workers, as many as `replicas` says. `creator`: RayCluster, RayService or RayJob."""
        head = spec["headGroupSpec"]
        yield self._pod(name, spec, creator, "headgroup", head["template"], head.get("rayStartParams", {}))
        for group in spec.get("workerGroupSpecs", []):
            for _ in range(group.get("replicas", 0)):
                options = group.get("rayStartParams", {})
                yield self._pod(name, spec, creator, group["groupName"], group["template"], options)

    def _pod(
        self,
        name: str,
        spec: Manifest,
        creator: str,
        group: str,
        template: Manifest,
        given: Mapping[str, str],
    ) -> Pod:
        container = template["spec"]["containers"][0]
        assert "command" not in container, "KubeRay would put it before ray start"
        is_head, options = group == "headgroup", dict(given)
        service = head_service(name)
        if is_head:
            options.setdefault("dashboard-host", "0.0.0.0")
            if spec.get("enableInTreeAutoscaling"):
                options["no-monitor"] = "true"
        else:
            options.setdefault("address", f"{service}:{GCS_PORT}")
        options.setdefault("metrics-export-port", str(METRICS_PORT))
        options.setdefault("dashboard-agent-listen-port", str(AGENT_PORT))
        options["block"] = "true"
        resources = container.get("resources", {})
        limits = resources.get("limits", {})
        cpus = limits.get("cpu") or resources.get("requests", {}).get("cpu")
        if cpus:
            options.setdefault("num-cpus", str(math.ceil(quantity(cpus))))
        if "memory" in limits:
            options.setdefault("memory", str(int(quantity(limits["memory"]))))
        for resource, count in limits.items():
            if resource.endswith("gpu"):
                options.setdefault("num-gpus", str(int(quantity(count))))
        environment = self.environment(container) | _own(name, creator, group, service)
        environment |= self._fault_tolerance(spec, is_head, options, environment)
        if (login := spec.get("authOptions", {})).get("mode") == "token":
            secret = find(self._manifests, "Secret", login.get("secretName", name))
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _decoded(secret, "auth_token")}
        start = f"ray start {'--head ' if is_head else ''}{_words(options)}"
        environment["KUBERAY_GEN_RAY_START_CMD"] = start
        memory = int(quantity(limits["memory"]))
        shm, ready = _shm(template["spec"], container), container["readinessProbe"]
        return Pod(group, f"ulimit -n 65536; {start}", environment, memory, shm, ready)

    def environment(self, container: Manifest) -> dict[str, str]:
        """`envFrom` and `env` of a container, from the manifests' ConfigMaps and Secrets."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            (kind, ref), *_ = ((k, v) for k, v in source.items() if k.endswith("Ref"))
            found |= self._values("ConfigMap" if kind == "configMapRef" else "Secret", ref)
        for one in container.get("env", []):
            found[one["name"]] = one["value"] if "value" in one else self.value(one["valueFrom"])
        return found

    def _values(self, kind: str, ref: Manifest) -> dict[str, str]:
        named = [m for m in self._manifests if (m["kind"], m["metadata"]["name"]) == (kind, ref["name"])]
        if not named and ref.get("optional"):
            return {}
        (one,) = named
        if kind == "ConfigMap":
            return dict(one["data"])
        return {key: _decoded(one, key) for key in one.get("data", {})}

    def value(self, source: Manifest) -> str:
        """Of a `valueFrom`."""
        if "secretKeyRef" in source:
            ref = source["secretKeyRef"]
            return _decoded(find(self._manifests, "Secret", ref["name"]), ref["key"])
        ref = source["configMapKeyRef"]
        return str(find(self._manifests, "ConfigMap", ref["name"])["data"][ref["key"]])

    def _fault_tolerance(
        self, spec: Manifest, is_head: bool, options: dict[str, str], environment: Mapping[str, str]
    ) -> dict[str, str]:
        given = spec.get("gcsFaultToleranceOptions")
        if given is None:
            return {}
        if not is_head:
            name = "RAY_gcs_rpc_server_reconnect_timeout_s"
            return {name: environment.get(name, RECONNECT_S)}
        found = {
            "RAY_external_storage_namespace": given.get("externalStorageNamespace", "rehearsal"),
            "RAY_REDIS_ADDRESS": given["redisAddress"],
        }
        if password := given.get("redisPassword"):
            options["redis-password"] = "$REDIS_PASSWORD"
            found["REDIS_PASSWORD"] = password.get("value") or self.value(password["valueFrom"])
        return found


def head_service(name: str) -> str:
    """Of a cluster: the name that leads to its head."""
    return f"{name}-head-svc.whorl.svc.cluster.local"


def _own(name: str, creator: str, group: str, service: str) -> dict[str, str]:
    found = {
        "RAY_CLUSTER_NAME": name,
        "RAY_CLOUD_INSTANCE_ID": f"{name}-{group}",
        "RAY_NODE_TYPE_NAME": group,
        "RAY_PORT": str(GCS_PORT),
        "RAY_ADDRESS": f"{'127.0.0.1' if group == 'headgroup' else service}:{GCS_PORT}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
    }
    if group != "headgroup":
        found |= {"FQ_RAY_IP": service, "RAY_IP": service.partition(".")[0]}
    if creator == "RayService":
        found |= {
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }
    return found


def _words(options: Mapping[str, str]) -> str:
    words = []
    for name, value in sorted(options.items()):
        if value.lower() in ("true", "false") and name not in SAID:
            words += [f"--{name}"] if value.lower() == "true" else []
        else:
            words.append(f"--{name}={value}")
    return " ".join(words)


def _shm(pod: Manifest, container: Manifest) -> int | None:
    mounted = [m["name"] for m in container.get("volumeMounts", []) if m["mountPath"] == "/dev/shm"]
    for volume in pod.get("volumes", []):
        if volume["name"] in mounted and volume.get("emptyDir", {}).get("medium") == "Memory":
            return int(quantity(volume["emptyDir"]["sizeLimit"]))
    return None


def _decoded(secret: Manifest, key: str) -> str:
    if key in secret.get("stringData", {}):
        return str(secret["stringData"][key])
    return base64.b64decode(secret["data"][key]).decode()
