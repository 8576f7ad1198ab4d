"""The pods that the rehearsal makes of a specification are those that KubeRay would make."""

from __future__ import annotations

import base64
import shlex
from typing import Any

import pytest
from ray.scripts.scripts import start

from tests.k8s.building import KUBECTL, build
from tests.rehearsal.operator import Operator, Pod, find


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def template(**resources: str) -> dict[str, Any]:
    container = {
        "name": "ray",
        "envFrom": [
            {"configMapRef": {"name": "places"}},
            {"secretRef": {"name": "missing", "optional": True}},
        ],
        "env": [{"name": "HOME", "value": "/home/whorl"}],
        "resources": {"limits": {"cpu": "1500m", "memory": "4Gi", **resources}},
        "volumeMounts": [{"name": "shared", "mountPath": "/dev/shm"}],
        "readinessProbe": {"httpGet": {"path": "/-/healthz", "port": 8000}},
    }
    volumes = [{"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]
    return {"spec": {"containers": [container], "volumes": volumes}}


MANIFESTS: list[dict[str, Any]] = [
    {"kind": "ConfigMap", "metadata": {"name": "places"}, "data": {"WHORL_STORAGE": "s3://here"}},
    {"kind": "Secret", "metadata": {"name": "token"}, "data": {"auth_token": encoded("t" * 64)}},
    {"kind": "Secret", "metadata": {"name": "redis"}, "data": {"password": encoded("secret")}},
]
SPEC: dict[str, Any] = {
    "authOptions": {"mode": "token", "secretName": "token"},
    "enableInTreeAutoscaling": True,
    "gcsFaultToleranceOptions": {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    },
    "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": template()},
    "workerGroupSpecs": [
        {"groupName": "cpu", "replicas": 2, "template": template()},
        {"groupName": "gpu", "replicas": 1, "template": template(**{"nvidia.com/gpu": "2"})},
        {"groupName": "none", "replicas": 0, "template": template()},
    ],
}


def words(pod: Pod) -> dict[str, str]:
    """Options of its `ray start`."""
    _, _, command = pod.command.partition("; ")
    options = [word.removeprefix("--") for word in shlex.split(command)[2:]]
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def test_head_and_workers_are_started_as_the_operator_does() -> None:
    head, *workers = Operator(MANIFESTS).pods("mine", SPEC, "RayService")
    assert [pod.group for pod in workers] == ["cpu", "cpu", "gpu"]
    common = {
        "block": "",
        "dashboard-agent-listen-port": "52365",
        "metrics-export-port": "8080",
        "memory": str(4 * 2**30),
    }
    assert words(head) == common | {
        "head": "", "num-cpus": "0", "dashboard-host": "0.0.0.0", "no-monitor": "", "redis-password": "$REDIS_PASSWORD",
    }  # fmt: skip
    address = "mine-head-svc.whorl.svc.cluster.local:6379"
    assert words(workers[0]) == common | {"num-cpus": "2", "address": address}
    assert words(workers[2]) == words(workers[0]) | {"num-gpus": "2"}
    assert (head.shm_bytes, head.memory_bytes) == (2 * 2**30, 4 * 2**30)


def test_the_environment_has_the_manifests_values_and_the_operators() -> None:
    head, worker, *_ = Operator(MANIFESTS).pods("mine", SPEC, "RayService")
    both = {
        "WHORL_STORAGE": "s3://here",
        "HOME": "/home/whorl",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 64,
    }
    for pod in (head, worker):
        assert both.items() <= pod.environment.items()
    redis = {"RAY_REDIS_ADDRESS": "redis:6379", "REDIS_PASSWORD": "secret"}
    assert redis.items() <= head.environment.items()
    assert not redis.keys() & worker.environment.keys(), "only the head speaks to Redis"
    assert worker.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
    assert head.environment["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert worker.environment["RAY_ADDRESS"] == "mine-head-svc.whorl.svc.cluster.local:6379"
    assert head.environment["RAY_SERVE_KV_TIMEOUT_S"] == "5"
    (plain, *_) = Operator(MANIFESTS).pods("mine", SPEC, "RayCluster")
    assert "RAY_SERVE_KV_TIMEOUT_S" not in plain.environment


def made_of(external: dict[str, Any]) -> dict[str, Any]:
    """The Secret that another operator makes."""
    spec = external["spec"]
    values = {one["secretKey"]: encoded("x" * 64) for one in spec["data"]}
    return {"kind": "Secret", "metadata": {"name": spec["target"]["name"]}, "data": values}


def test_a_value_that_is_missing_is_no_empty_one() -> None:
    without = [m for m in MANIFESTS if m["metadata"]["name"] != "places"]
    with pytest.raises(ValueError, match="not enough values"):
        list(Operator(without).pods("mine", SPEC, "RayService"))


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl to build the manifests")
@pytest.mark.parametrize("overlay", ["kind", "production", "gpu"])
def test_ray_takes_the_options_of_every_overlay(overlay: str) -> None:
    manifests = build(f"overlays/{overlay}")
    manifests += [made_of(one) for one in manifests if one["kind"] == "ExternalSecret"]
    for kind, name in (("RayCluster", "whorl"), ("RayService", "whorl-service")):
        spec = find(manifests, kind, name)["spec"]
        for group in (own := spec.get("rayClusterConfig", spec))["workerGroupSpecs"]:
            group["replicas"] = 1
        pods = list(Operator(manifests).pods(name, own, kind))
        assert len(pods) == 1 + len(own["workerGroupSpecs"])
        for pod in pods:
            _, _, command = pod.command.partition("; ")
            # As Ray's own command reads it; unknown options are errors.
            start.make_context("start", shlex.split(command)[2:])
            assert pod.environment["WHORL_STORAGE"]
            assert len(pod.environment["RAY_AUTH_TOKEN"]) >= 32
            assert pod.shm_bytes
            assert pod.shm_bytes >= 0.3 * pod.memory_bytes
