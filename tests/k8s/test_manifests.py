"""Every manifest of every overlay: against its schema and our own rules, and the one place where each thing is said."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import policies, schemas
from tests.k8s.building import FOLDER, OVERLAYS, ROOT, Document, clusters, containers, named, pods, ray_jobs

kuberay = pytest.mark.skipif(
    schemas.kuberay_crds() is None,
    reason="no CRDs of KubeRay: WHORL_KUBERAY_CRDS names their folder, ray-operator/config/crd/bases of its repository",
)
PRODUCTION = ("overlays/production", "overlays/gpu", "overlays/incremental-upgrade")
WITH_JOBS = ("overlays/kind/jobs", "overlays/production/jobs", "overlays/gpu/jobs")


def kinds(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kinds_of_kubernetes_and_of_other_operators_have_their_schema(
    overlay: str, overlays: dict[str, list[Document]]
) -> None:
    documents = [d for d in overlays[overlay] if not schemas.is_kuberay(d)]
    assert documents or overlay.endswith("/jobs")
    found = {named(d): problems for d in documents if (problems := schemas.problems(d))}
    assert found == {}


@kuberay
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kinds_of_kuberay_have_their_schema(overlay: str, overlays: dict[str, list[Document]]) -> None:
    documents = [d for d in overlays[overlay] if schemas.is_kuberay(d)]
    assert documents or overlay == "queues"
    found = {named(d): problems for d in documents if (problems := schemas.problems(d))}
    assert found == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_that_kuberay_starts_are_pods_of_kubernetes(
    overlay: str, overlays: dict[str, list[Document]]
) -> None:
    """Without KubeRay's CRDs, too, and in the versions of Kubernetes that are meant: the CRDs were made for one."""
    found = []
    for document in overlays[overlay]:
        for pod in pods(document):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod.spec}
            found += [f"{pod.where}: {line}" for line in schemas.problems(whole)]
    assert found == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_own_rules_hold(overlay: str, overlays: dict[str, list[Document]]) -> None:
    assert policies.check_all(overlays[overlay]) == []


def test_what_an_overlay_has(overlays: dict[str, list[Document]]) -> None:
    every = {
        "Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Service", "PodDisruptionBudget", "Deployment",
        "StatefulSet", "NetworkPolicy", "ResourceQuota", "LimitRange", "RayCluster", "RayService", "RayCronJob",
    }  # fmt: skip
    for overlay in ("overlays/kind", *PRODUCTION):
        assert every <= {d["kind"] for d in overlays[overlay]}, overlay
        for document in overlays[overlay]:
            inside = document["metadata"].get("namespace")
            assert (inside is None) == (document["kind"] == "Namespace"), named(document)
            assert inside in (None, "whorl")
    watched = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ExternalSecret", "SecretStore"}
    for overlay in PRODUCTION:
        assert watched <= {d["kind"] for d in overlays[overlay]}
        # What is secret is in no file.
        assert kinds(overlays[overlay], "Secret") == []
    assert {"Gateway", "HTTPRoute"} <= {d["kind"] for d in overlays["overlays/production"]}
    # There KubeRay makes them.
    assert not {"Gateway", "HTTPRoute"} & {d["kind"] for d in overlays["overlays/incremental-upgrade"]}
    assert {d["kind"] for d in overlays["queues"]} == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    for overlay in WITH_JOBS:
        assert {d["kind"] for d in overlays[overlay]} == {"RayJob"}
        stages = {d["metadata"]["labels"]["whorl/stage"]: d for d in overlays[overlay]}
        assert set(stages) == {"preprocess", "finetune", "tune", "evaluate", "promote", "index", "pipeline"}
        for stage, job in stages.items():
            assert f"python -m jobs.{stage} --config " in job["spec"]["entrypoint"]


def test_jobs_and_their_configurations_exist(overlays: dict[str, list[Document]]) -> None:
    """Each entrypoint is a module and a configuration of this project, and its words are keys."""
    from lib.command import split_arguments
    from lib.settings import load_settings

    seen = 0
    for documents in overlays.values():
        for document in documents:
            for where, job in ray_jobs(document):
                python, flag, module, *words = job["entrypoint"].split()
                assert (python, flag) == ("python", "-m"), where
                assert Path(module.replace(".", "/") + ".py").is_file(), where
                path, overrides = split_arguments(words)
                load_settings(path, overrides)
                seen += 1
    assert seen == 3 * 7 + 4


@pytest.mark.parametrize("overlay", ["overlays/kind", *PRODUCTION])
def test_one_cluster_for_all(overlay: str, overlays: dict[str, list[Document]]) -> None:
    """The RayCronJob's and the service's cluster are the RayCluster, but for what components/differ says."""
    documents = overlays[overlay]
    (cluster,) = kinds(documents, "RayCluster")
    (cron,) = kinds(documents, "RayCronJob")
    (service,) = kinds(documents, "RayService")
    ours = copy.deepcopy(cluster["spec"])
    redis = ours.pop("gcsFaultToleranceOptions")
    assert redis["redisAddress"] == "whorl-redis:6379"
    assert cron["spec"]["jobTemplate"]["rayClusterSpec"] == ours
    theirs = copy.deepcopy(service["spec"]["rayClusterConfig"])
    assert theirs.pop("gcsFaultToleranceOptions") == redis
    assert theirs["headGroupSpec"]["template"]["metadata"].pop("annotations").keys() == {"whorl/environment"}
    ours["headGroupSpec"]["template"]["metadata"].pop("annotations")
    for one in (ours, theirs):
        for part in (one["headGroupSpec"], *one["workerGroupSpecs"]):
            part["template"]["metadata"].pop("annotations", None)
            part["template"]["metadata"]["labels"].pop("whorl/role")
        for group in one["workerGroupSpecs"]:
            for key in ("replicas", "minReplicas"):
                group.pop(key)
            group["template"]["spec"]["containers"][0].pop("readinessProbe")
    assert theirs == ours


@pytest.mark.parametrize("overlay", WITH_JOBS[:2])
def test_jobs_have_the_same_cluster(overlay: str, overlays: dict[str, list[Document]]) -> None:
    (cron,) = kinds(overlays[overlay.removesuffix("/jobs")], "RayCronJob")
    for job in overlays[overlay]:
        assert job["spec"] | {"entrypoint": ""} == cron["spec"]["jobTemplate"] | {"entrypoint": ""}


def test_jobs_and_the_service_start_with_what_a_job_needs(overlays: dict[str, list[Document]]) -> None:
    for overlay in ("overlays/kind", *PRODUCTION, *WITH_JOBS):
        for document in overlays[overlay]:
            for where, job in ray_jobs(document):
                assert job["backoffLimit"] == 2, where
                assert job["submissionMode"] == "K8sJobMode", where
                assert job["entrypointNumCpus"] == 1, where
                assert ("deletionStrategy" in job) != ("shutdownAfterJobFinishes" in job), where
            for where, cluster in clusters(document):
                assert cluster["rayVersion"] == version("ray"), where
                groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
                assert set(groups) == {"cpu", "gpu"}, where
                gpu = groups["gpu"]["template"]["spec"]
                assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
                assert gpu["tolerations"] == [
                    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
                ]
                assert {c["topologyKey"] for c in gpu["topologySpreadConstraints"]} == {
                    "kubernetes.io/hostname", "topology.kubernetes.io/zone",
                }  # fmt: skip
    for job in overlays["overlays/gpu/jobs"]:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "whorl"
    (queue,) = kinds(overlays["queues"], "LocalQueue")
    assert queue["metadata"]["name"] == "whorl"


def test_a_queue_covers_all_that_its_jobs_ask_for(overlays: dict[str, list[Document]]) -> None:
    (queue,) = kinds(overlays["queues"], "ClusterQueue")
    covered = {name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
    for group in queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert [one["name"] for one in flavor["resources"]] == group["coveredResources"]
    asked = {
        name
        for job in overlays["overlays/gpu/jobs"]
        for pod in pods(job)
        for container in containers(pod)
        for name in container["resources"]["requests"]
    }
    assert asked <= covered


def test_the_service_of_ray_serve_is_the_one_behind_the_gateway(overlays: dict[str, list[Document]]) -> None:
    """KubeRay calls it NAME-serve-svc, and the service's jobs API NAME-head-svc."""
    documents = overlays["overlays/production"]
    (service,) = kinds(documents, "RayService")
    name = service["metadata"]["name"]
    behind = {
        (ref["name"], ref["port"])
        for route in kinds(documents, "HTTPRoute")
        for rule in route["spec"]["rules"]
        for ref in rule.get("backendRefs", ())
    }
    assert behind == {(f"{name}-serve-svc", 8000)}
    ingress = yaml.safe_load((FOLDER / "components/ingress/ingress.yaml").read_text())
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["number"]) == (f"{name}-serve-svc", 8000)
    assert schemas.problems(ingress) == []
    for overlay in ("overlays/kind", *PRODUCTION):
        (places,) = (
            d for d in kinds(overlays[overlay], "ConfigMap") if d["metadata"]["name"] == "whorl-places"
        )
        assert places["data"]["WHORL_SERVICE"] == f"http://{name}-head-svc:8265"
        assert places["data"]["WHORL_STORAGE"].startswith("s3://")


def test_versions_are_said_once(overlays: dict[str, list[Document]]) -> None:
    """The images' tags: of components/release, and of the gpu overlay for the one with CUDA."""
    release = yaml.safe_load((FOLDER / "components/release/kustomization.yaml").read_text())
    tags = {image["name"]: image["newTag"] for image in release["images"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tags["ghcr.io/whorl/whorl"] == project
    assert release["labels"][0]["pairs"]["app.kubernetes.io/version"] == project
    used = set()
    for overlay, documents in overlays.items():
        for document in documents:
            assert document["metadata"]["labels"].get("app.kubernetes.io/version", project) == project
            for pod in pods(document):
                for container in containers(pod):
                    name, _, tag = container["image"].rpartition(":")
                    gpu = "-gpu" if "overlays/gpu" in overlay and name.endswith("/whorl") else ""
                    assert tag == f"{tags[name]}{gpu}", f"{overlay} {pod.where}"
                    used.add(name)
    assert used == set(tags), "an image is named that nobody uses"
    for file in FOLDER.rglob("*.yaml"):
        if file.name != "restore.yaml":  # applied by itself; test_readme.py holds its tag against these
            assert re.findall(r"^[ -]*image: *\S+:\S+", file.read_text(), re.M) == [], file


def test_the_mlflow_page_is_that_of_the_local_cluster(
    overlays: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import local

    monkeypatch.setenv("WHORL_STORAGE", "s3://bucket")
    monkeypatch.setenv("WHORL_DATABASE", "postgresql://here")
    for overlay in ("overlays/kind", "overlays/production"):
        (page,) = kinds(overlays[overlay], "Deployment")
        (container,) = page["spec"]["template"]["spec"]["containers"]
        command = local.page_command(5000)
        at = command.index("--backend-store-uri")
        assert command[at + 1] == "postgresql://here"
        del command[at : at + 2]  # in the environment, where no list of processes shows its password
        command[0], command[command.index("127.0.0.1")] = "mlflow", "0.0.0.0"
        theirs = [word.replace("$(WHORL_STORAGE)", "s3://bucket") for word in container["command"]]
        assert sorted(theirs) == sorted(command)
        variables = {v["name"]: v.get("valueFrom", {}) for v in container["env"]}
        assert variables["MLFLOW_BACKEND_STORE_URI"]["secretKeyRef"]["key"] == "WHORL_DATABASE"


def test_the_bucket_has_a_driver(
    overlays: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place that WHORL_STORAGE names opens with what is installed, and at the address that a trial has."""
    from lib import storage

    (places,) = (
        d for d in kinds(overlays["overlays/kind"], "ConfigMap") if d["metadata"]["name"] == "whorl-places"
    )
    for name, value in places["data"].items():
        monkeypatch.setenv(name, value)
    fs, inside = storage.filesystem(storage.join(storage.root(), "datasets"))
    assert (fs.protocol[0], inside) == ("s3", "whorl/datasets")
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3", aws_access_key_id="a", aws_secret_access_key="b"
    )
    service = next(
        d for d in kinds(overlays["overlays/kind"], "Service") if d["metadata"]["name"] == "whorl-storage"
    )
    assert client.meta.endpoint_url == f"http://whorl-storage:{service['spec']['ports'][0]['port']}"


def test_dashboards_are_those_of_the_folder(overlays: dict[str, list[Document]]) -> None:
    for overlay in PRODUCTION:
        maps = [
            d for d in kinds(overlays[overlay], "ConfigMap") if "grafana_dashboard" in d["metadata"]["labels"]
        ]
        found = {name: json.loads(text) for one in maps for name, text in one["data"].items()}
        files = {
            p.name: json.loads(p.read_text()) for p in (ROOT / "cluster/observability/grafana").glob("*.json")
        }
        assert found == files
        assert all(len(text) < 2**20 for one in maps for text in one["data"].values()), (
            "the most of a ConfigMap"
        )


def test_figures_have_the_job_that_rules_ask_for(overlays: dict[str, list[Document]]) -> None:
    rules = (ROOT / "cluster/observability/rules.yaml").read_text()
    assert 'job="ray"' in rules
    documents = overlays["overlays/production"]
    (heads,) = kinds(documents, "ServiceMonitor")
    (workers,) = kinds(documents, "PodMonitor")
    endpoints: list[dict[str, Any]] = [*heads["spec"]["endpoints"], *workers["spec"]["podMetricsEndpoints"]]
    for endpoint in endpoints:
        (relabelled,) = endpoint["relabelings"]
        assert relabelled["targetLabel"] == "job"
        assert relabelled["replacement"] == ("haproxy" if endpoint["port"] == "haproxy" else "ray")
    # KubeRay's Service of a head has the ports of its container.
    (cluster,) = kinds(documents, "RayCluster")
    ports = {
        p["name"] for p in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert {endpoint["port"] for endpoint in heads["spec"]["endpoints"]} <= ports


def test_one_stage_is_chosen_by_its_label(overlays: dict[str, list[Document]]) -> None:
    """As kubectl does it with -l, which asks a cluster for its kinds first."""
    for overlay in WITH_JOBS:
        chosen = [d for d in overlays[overlay] if d["metadata"]["labels"]["whorl/stage"] == "finetune"]
        assert [named(d) for d in chosen] == ["RayJob/finetune"]


def test_a_folder_that_is_wrong_does_not_build(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nowhere.yaml]\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0


# ------------------------------------------------------------------ the schemas themselves


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("Deployment", {"spec": {"replica": 1}}, "replica"),
        ("Deployment", {"spec": {"replicas": "one"}}, "replicas"),
        ("StatefulSet", {"spec": {"template": {"spec": {"containers": [{"name": "a", "imagePulPolicy": "Always"}]}}}}, "imagePulPolicy"),
        ("Service", {"spec": {"ports": [{"name": "a"}]}}, "port"),
        ("NetworkPolicy", {"spec": {"egress": [{"from": []}]}}, "from"),
        ("PodDisruptionBudget", {"spec": {"minAvailible": 1}}, "minAvailible"),
        ("Gateway", {"spec": {"gatewayClass": "eg"}}, "gatewayClass"),
        ("HTTPRoute", {"spec": {"rules": [{"timeouts": {"request": "soon"}}]}}, "soon"),
        ("PodMonitor", {"spec": {"podMetricsEndpoints": [{"port": 8080}]}}, "8080"),
        ("PrometheusRule", {"spec": {"groups": [{"name": "a", "rules": [{"alert": "b"}]}]}}, "expr"),
        ("ExternalSecret", {"spec": {"refreshInterval": "daily"}}, "daily"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_found(
    kind: str, change: Document, says: str, overlays: dict[str, list[Document]]
) -> None:
    document = copy.deepcopy(kinds(overlays["overlays/production"], kind)[0])
    assert schemas.problems(document) == []
    document["spec"] |= change["spec"]
    assert any(says in line for line in schemas.problems(document))


@kuberay
@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("RayCluster", {"workerGroups": []}, "workerGroups"),
        ("RayCluster", {"authOptions": {"mode": "password"}}, "password"),
        ("RayCluster", {"autoscalerOptions": {"version": 2}}, "2"),
        ("RayService", {"serveConfig": "a"}, "serveConfig"),
        (
            "RayService",
            {"upgradeStrategy": {"clusterUpgradeOptions": {"stepSizePercent": 1}}},
            "gatewayClassName",
        ),
        ("RayCronJob", {"schedules": "* * * * *"}, "schedules"),
        ("RayCronJob", {"jobTemplate": {"deletionStrategy": {"deletionRules": []}}}, "deletionRules"),
    ],
)
def test_a_wrong_field_of_kuberay_is_found(
    kind: str, change: Document, says: str, overlays: dict[str, list[Document]]
) -> None:
    document = copy.deepcopy(kinds(overlays["overlays/kind"], kind)[0])
    assert schemas.problems(document) == []
    document["spec"] |= change
    assert any(says in line for line in schemas.problems(document))


def test_a_kind_without_a_schema_is_an_error() -> None:
    found = schemas.problems({"apiVersion": "v1", "kind": "Podd", "metadata": {"name": "a"}})
    assert found[0].startswith("no schema of v1 Podd")
    assert schemas.problems({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}})
