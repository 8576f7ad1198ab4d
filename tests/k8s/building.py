"""What `kubectl kustomize` makes of k8s/, and the pods that are in a manifest, whatever its kind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
# All that may be applied: found by looking.
OVERLAYS = sorted(
    str(path.parent.relative_to(FOLDER))
    for path in (*FOLDER.glob("overlays/**/kustomization.yaml"), FOLDER / "queues/kustomization.yaml")
)
KUBECTL = shutil.which("kubectl")


def build(folder: str) -> list[Document]:
    """The manifests of a folder below k8s/. Raises AssertionError with what kustomize says."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(done.stdout, Loader=loader) if document]


def named(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


@dataclass(frozen=True)
class Pods:
    """Pods that a manifest starts."""

    where: str
    template: Document
    """Its `metadata` and `spec`."""
    ray: str = ""
    """head, worker or submitter, where KubeRay starts them."""
    group: Document | None = None
    """The worker group."""

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def spec(self) -> Document:
        spec: Document = self.template["spec"]
        return spec


def clusters(document: Document) -> Iterator[tuple[str, Document]]:
    """Specifications of a Ray cluster in a manifest, and where they stand."""
    name, spec = named(document), document.get("spec", {})
    match document["kind"]:
        case "RayCluster":
            yield name, spec
        case "RayService":
            yield f"{name} rayClusterConfig", spec["rayClusterConfig"]
        case "RayJob":
            yield f"{name} rayClusterSpec", spec["rayClusterSpec"]
        case "RayCronJob":
            yield f"{name} rayClusterSpec", spec["jobTemplate"]["rayClusterSpec"]


def ray_jobs(document: Document) -> Iterator[tuple[str, Document]]:
    """Specifications of a RayJob in a manifest."""
    if document["kind"] == "RayJob":
        yield named(document), document["spec"]
    if document["kind"] == "RayCronJob":
        yield named(document), document["spec"]["jobTemplate"]


def pods(document: Document) -> Iterator[Pods]:
    name, spec = named(document), document.get("spec", {})
    match document["kind"]:
        case "Pod":
            yield Pods(name, document)
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            yield Pods(name, spec["template"])
        case "CronJob":
            yield Pods(name, spec["jobTemplate"]["spec"]["template"])
    for where, cluster in clusters(document):
        yield Pods(f"{where} head", cluster["headGroupSpec"]["template"], "head", cluster["headGroupSpec"])
        for group in cluster.get("workerGroupSpecs", ()):
            yield Pods(f"{where} {group['groupName']}", group["template"], "worker", group)
    for where, job in ray_jobs(document):
        if "submitterPodTemplate" in job:
            yield Pods(f"{where} submitter", job["submitterPodTemplate"], "submitter")


def containers(pod: Pods) -> list[Document]:
    return [*pod.spec.get("initContainers", ()), *pod.spec["containers"]]
