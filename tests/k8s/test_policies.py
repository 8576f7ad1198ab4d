"""The rules find what they are there for: each is broken, and is the one that says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from lib.manifests import patch
from tests.k8s import policies
from tests.k8s.building import Document

HEAD = "/spec/rayClusterSpec/headGroupSpec"
WORKER = "/spec/rayClusterSpec/workerGroupSpecs/0"
SPEC = f"{WORKER}/template/spec"
CONTAINER = f"{SPEC}/containers/0"
LABELS = dict.fromkeys(policies.LABELS, "whorl")
SAFE = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
SIZES = {"cpu": "1", "memory": "4Gi", "ephemeral-storage": "1Gi"}
PROBE = {"httpGet": {"path": "/-/healthz", "port": 8000}}


def template(**more: Any) -> Document:
    container = {
        "name": "ray",
        "image": "ghcr.io/whorl/whorl:1",
        "securityContext": SAFE,
        "resources": {"requests": dict(SIZES), "limits": dict(SIZES)},
        "ports": [{"name": "serve", "containerPort": 8000}],
        "readinessProbe": PROBE,
        "livenessProbe": PROBE,
        "volumeMounts": [{"name": "shared", "mountPath": "/dev/shm"}],
    }
    volumes = [{"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]
    spec = {"automountServiceAccountToken": False, "containers": [container], "volumes": volumes, **more}
    return copy.deepcopy({"metadata": {"labels": LABELS}, "spec": spec})


def cluster() -> Document:
    return {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token", "secretName": "a"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "securityContext": copy.deepcopy(SAFE),
            "resources": {"requests": dict(SIZES), "limits": dict(SIZES)},
        },
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": template()},
        "workerGroupSpecs": [
            {"groupName": "cpu", "replicas": 0, "minReplicas": 0, "maxReplicas": 1, "template": template()}
        ],
    }


def metadata(name: str = "one") -> Document:
    return {"name": name, "labels": dict(LABELS)}


def job() -> Document:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(),
        "spec": {
            "entrypoint": "python -m jobs.finetune",
            "rayClusterSpec": cluster(),
            "deletionStrategy": {
                "deletionRules": [
                    {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}},
                    {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 600}},
                ]
            },
        },
    }


def service() -> Document:
    config = "http_options: {host: 0.0.0.0}\napplications: [{name: a}]\n"
    spec = {"serveConfigV2": config, "rayClusterConfig": cluster()}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata(), "spec": spec}


def other(kind: str, **spec: Any) -> Document:
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata(), "spec": spec}


def test_what_is_right_is_found_so() -> None:
    for made in (
        job(), service(), other("CronJob", schedule="0 2 * * *", jobTemplate={"spec": {"template": template()}}),
        other("PodDisruptionBudget", minAvailable=1), other("Service"), other("Pod", **template()["spec"]),
    ):  # fmt: skip
        assert policies.check(made) == []


Step = dict[str, Any]


def put(path: str, value: Any) -> Step:
    return {"op": "add", "path": path, "value": value}


def without(path: str) -> Step:
    return {"op": "remove", "path": path}


RULE = f"{'/spec/deletionStrategy/deletionRules'}/0"
QUEUED = "/metadata/labels/kueue.x-k8s.io~1queue-name"
TOKEN = {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}

BROKEN: list[tuple[Callable[..., Any], Callable[[], Document], list[Step]]] = [
    (policies.images_have_a_tag, job, [put(f"{CONTAINER}/image", "ghcr.io/whorl/whorl")]),
    (policies.images_have_a_tag, job, [put(f"{CONTAINER}/image", "whorl:latest")]),
    (policies.images_have_a_tag, job, [put(f"{CONTAINER}/image", "host:5000/whorl")]),
    (policies.resources_are_set, job, [without(f"{CONTAINER}/resources/limits/memory")]),
    (policies.resources_are_set, job, [without(f"{CONTAINER}/resources/requests/ephemeral-storage")]),
    (policies.resources_are_set, job, [without("/spec/rayClusterSpec/autoscalerOptions/resources")]),
    (policies.resources_are_set, job, [put(f"{CONTAINER}/resources/requests/cpu", "1500m")]),
    (policies.resources_are_set, job, [put(f"{CONTAINER}/resources/requests/nvidia.com~1gpu", "1")]),
    (policies.nothing_is_privileged, job, [put(f"{CONTAINER}/securityContext/privileged", True)]),
    (policies.nothing_is_privileged, job, [put(f"{CONTAINER}/ports/0/hostPort", 8000)]),
    (policies.nothing_is_privileged, job, [put(f"{SPEC}/hostNetwork", True)]),
    (policies.nothing_is_privileged, job, [
        put(f"{SPEC}/volumes", [{"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}, {"name": "host", "hostPath": {"path": "/"}}]),
        put(f"{CONTAINER}/volumeMounts", [{"name": "host", "mountPath": "/host"}, {"name": "shared", "mountPath": "/dev/shm"}]),
    ]),
    (policies.nobody_is_root, job, [without(f"{CONTAINER}/securityContext/runAsNonRoot")]),
    (policies.nobody_is_root, job, [put(f"{CONTAINER}/securityContext/runAsUser", 0)]),
    (policies.nobody_is_root, job, [put(f"{HEAD}/template/spec/securityContext", {"runAsUser": 0})]),
    (policies.privileges_do_not_grow, job, [without(f"{CONTAINER}/securityContext/allowPrivilegeEscalation")]),
    (policies.privileges_do_not_grow, job, [without("/spec/rayClusterSpec/autoscalerOptions/securityContext/allowPrivilegeEscalation")]),
    (policies.capabilities_are_dropped, job, [put(f"{CONTAINER}/securityContext/capabilities/drop", ["NET_RAW"])]),
    (policies.capabilities_are_dropped, job, [put(f"{CONTAINER}/securityContext/capabilities/add", ["SYS_PTRACE"])]),
    (policies.seccomp_is_on, job, [put(f"{CONTAINER}/securityContext/seccompProfile/type", "Unconfined")]),
    (policies.seccomp_is_on, job, [without(f"{CONTAINER}/securityContext/seccompProfile")]),
    (policies.root_is_read_only, job, [put(f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False)]),
    (policies.no_token_of_the_api, job, [without(f"{SPEC}/automountServiceAccountToken")]),
    (policies.no_token_of_the_api, job, [
        put(f"{SPEC}/volumes", [TOKEN, {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]),
        put(f"{CONTAINER}/volumeMounts", [{"name": "token", "mountPath": "/t"}, {"name": "shared", "mountPath": "/dev/shm"}]),
    ]),
    (policies.what_serves_is_probed, job, [without(f"{CONTAINER}/livenessProbe")]),
    (policies.what_serves_is_probed, job, [without(f"{HEAD}/template/spec/containers/0/readinessProbe")]),
    (policies.serving_workers_answer_for_serve, service, [
        put("/spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/readinessProbe/httpGet/path", "/healthz")
    ]),
    (policies.all_is_labelled, job, [without("/metadata/labels/app.kubernetes.io~1part-of")]),
    (policies.all_is_labelled, job, [without(f"{WORKER}/template/metadata/labels/app.kubernetes.io~1component")]),
    (policies.scratch_has_bounds, job, [without(f"{SPEC}/volumes/0/emptyDir/sizeLimit")]),
    (policies.scratch_has_bounds, job, [put(f"{SPEC}/volumes/0/emptyDir/sizeLimit", "4Gi")]),
    (policies.volumes_are_there, job, [put(f"{CONTAINER}/volumeMounts", [{"name": "shared", "mountPath": "/dev/shm"}, {"name": "x", "mountPath": "/x"}])]),
    (policies.volumes_are_there, job, [put("/spec/rayClusterSpec/autoscalerOptions/volumeMounts", [{"name": "x", "mountPath": "/x"}])]),
    (policies.volumes_are_there, job, [put(f"{SPEC}/volumes", [
        {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}, {"name": "idle", "emptyDir": {"sizeLimit": "1Gi"}}
    ])]),
    (policies.workers_have_shared_memory, job, [without(f"{SPEC}/volumes/0/emptyDir/medium")]),
    (policies.workers_have_shared_memory, job, [put(f"{SPEC}/volumes/0/emptyDir/sizeLimit", "100Mi")]),
    (policies.ray_asks_for_a_token, job, [without("/spec/rayClusterSpec/authOptions")]),
    (policies.ray_asks_for_a_token, job, [put("/spec/rayClusterSpec/authOptions/mode", "disabled")]),
    (policies.ray_asks_for_a_token, job, [without("/spec/rayClusterSpec/rayVersion")]),
    (policies.heads_do_no_work, job, [put(f"{HEAD}/rayStartParams/num-cpus", "2")]),
    (policies.kuberay_takes_the_cluster, job, [put("/metadata/name", "a" * 48)]),
    (policies.kuberay_takes_the_cluster, job, [put("/metadata/name", "1a")]),
    (policies.kuberay_takes_the_cluster, job, [put(f"{HEAD}/resources", {"CPU": "1"})]),
    (policies.kuberay_takes_the_cluster, job, [put(f"{HEAD}/rayStartParams/labels", "a=b")]),
    (policies.kuberay_takes_the_cluster, job, [put(f"{SPEC}/restartPolicy", "Always")]),
    (policies.kuberay_takes_the_cluster, job, [put(f"{WORKER}/minReplicas", 2)]),
    (policies.kuberay_takes_the_cluster, job, [
        put("/spec/rayClusterSpec/gcsFaultToleranceOptions", {}),
        put(f"{HEAD}/template/spec/containers/0/env", [{"name": "REDIS_PASSWORD"}]),
    ]),
    (policies.kuberay_takes_the_job, job, [put("/spec/deletionStrategy", {})]),
    (policies.kuberay_takes_the_job, job, [put("/spec/shutdownAfterJobFinishes", True)]),
    (policies.kuberay_takes_the_job, job, [put("/spec/ttlSecondsAfterFinished", 60)]),
    (policies.kuberay_takes_the_job, job, [put(f"{RULE}/condition", {"ttlSeconds": 1})]),
    (policies.kuberay_takes_the_job, job, [put(f"{RULE}/condition/jobDeploymentStatus", "Failed")]),
    (policies.kuberay_takes_the_job, job, [put(f"{RULE}/condition/ttlSeconds", 6000)]),
    (policies.kuberay_takes_the_job, job, [put(f"{RULE}/policy", "DeleteWorkers")]),
    (policies.kuberay_takes_the_job, job, [put(f"{RULE}/policy", "DeleteSelf")]),
    (policies.kuberay_takes_the_job, job, [put("/spec/submissionMode", "SshMode")]),
    (policies.kuberay_takes_the_job, job, [put("/spec/entrypoint", "python -m a && python -m b")]),
    (policies.kuberay_takes_the_job, job, [put("/spec/backoffLimit", -1)]),
    (policies.kuberay_takes_the_job, job, [put("/spec/suspend", True)]),
    (policies.kuberay_takes_the_job, job, [put(QUEUED, "a")]),
    (policies.kuberay_takes_the_job, job, [
        put(QUEUED, "a"), put("/spec/shutdownAfterJobFinishes", True), without("/spec/deletionStrategy")
    ]),
    (policies.kuberay_takes_the_service, service, [put("/spec/upgradeStrategy", {"type": "InPlace"})]),
    (policies.kuberay_takes_the_service, service, [put("/spec/upgradeStrategy", {"type": "NewClusterWithIncrementalUpgrade"})]),
    (policies.kuberay_takes_the_service, service, [put("/spec/upgradeStrategy", {
        "type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": {"gatewayClassName": "eg", "stepSizePercent": 0},
    })]),
    (policies.kuberay_takes_the_service, service, [put("/spec/serveConfigV2", "http_options: {host: 0.0.0.0}")]),
    (policies.kuberay_takes_the_service, service, [put("/spec/serveConfigV2", "http_options: {host: 127.0.0.1}\napplications: [{}]")]),
    (policies.cron_schedules_are_five_fields, lambda: other("CronJob", schedule="@daily", jobTemplate={"spec": {"template": template()}}), []),
    (policies.budgets_count_pods, lambda: other("PodDisruptionBudget", maxUnavailable=1), []),
    (policies.budgets_count_pods, lambda: other("PodDisruptionBudget", minAvailable="50%"), []),
    (policies.services_stay_inside, lambda: other("Service", type="NodePort"), []),
    (policies.services_stay_inside, job, [put(f"{HEAD}/serviceType", "LoadBalancer")]),
    (policies.services_stay_inside, job, [put(f"{HEAD}/enableIngress", True)]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "made", "steps"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_found(
    rule: Callable[..., Any], made: Callable[[], Document], steps: list[Step]
) -> None:
    document = made()
    patch(document, steps)
    found = policies.check(document)
    assert found
    assert {name for name, _ in found} == {rule.__name__}


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(policies.RULES)
    assert len(policies.OF_ALL) == 4, "each of them has a test below"


def whole(*documents: Document) -> list[tuple[str, str]]:
    return policies.check_all([{"kind": "Namespace", "metadata": metadata()}, *documents])


def test_what_is_referred_to_must_be_there() -> None:
    container = template()["spec"]["containers"][0]
    container["envFrom"] = [{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "b", "optional": True}}]
    pod = other("Pod", **template()["spec"] | {"containers": [container]})
    assert whole(pod) == [("references_exist", "Pod/one: no ConfigMap a")]
    given = {"kind": "ConfigMap", "metadata": metadata("a")}
    assert whole(pod, given) == []
    container["envFrom"][1]["secretRef"].pop("optional")
    assert whole(pod, given) == [("references_exist", "Pod/one: no Secret b")]
    assert whole(pod, given, other("ExternalSecret", target={"name": "b"})) == []
    assert policies.check_all([pod]) == [], "jobs alone: their overlay has the rest"
    claimed = template()["spec"]
    claimed["volumes"].append({"name": "data", "persistentVolumeClaim": {"claimName": "c"}})
    claimed["containers"][0]["volumeMounts"].append({"name": "data", "mountPath": "/data"})
    claimed["serviceAccountName"] = "d"
    lines = {line for _, line in whole(other("Pod", **claimed))}
    assert lines == {"Pod/one: no PersistentVolumeClaim c", "Pod/one: no ServiceAccount d"}
    assert ("references_exist", "RayJob/one: no Secret a") in whole(job())


def test_a_selector_must_select() -> None:
    deployed = {"kind": "Deployment", "metadata": metadata(), "spec": {"template": template()}}
    serves = other("Service", selector=LABELS, ports=[{"targetPort": "serve"}])
    assert whole(deployed, serves) == []
    assert whole(serves) == [
        ("selectors_select", "Service/one: selects no pod"),
        ("selectors_select", "Service/one: no port serve in what it selects"),
    ]
    serves["spec"]["ports"][0]["targetPort"] = "http"
    assert whole(deployed, serves) == [("selectors_select", "Service/one: no port http in what it selects")]
    budget = other("PodDisruptionBudget", minAvailable=1, selector={"matchLabels": {"app": "x"}})
    assert whole(deployed, budget) == [("selectors_select", "PodDisruptionBudget/one: selects no pod")]


def test_a_name_is_given_once() -> None:
    one = {"kind": "ConfigMap", "metadata": metadata()}
    assert whole(one, one) == [("names_are_single", "ConfigMap/one is there twice")]


def test_a_claim_is_within_the_limits() -> None:
    limits = other("LimitRange", limits=[{"type": "PersistentVolumeClaim", "max": {"storage": "10Gi"}}])
    claim = other("PersistentVolumeClaim", resources={"requests": {"storage": "11Gi"}})
    assert whole(limits, claim) == [
        ("pods_fit_the_limits", "PersistentVolumeClaim/one: a claim of 11Gi, and the most is 10Gi")
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("250m", 0.25), ("2Gi", 2**31), ("1.5k", 1500), (2, 2)]
)
def test_quantities(text: Any, value: float) -> None:
    assert float(policies.quantity(text)) == value
    with pytest.raises(ValueError, match="no quantity"):
        policies.quantity("much")
