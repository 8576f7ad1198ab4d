"""What a plan comes to on Kubernetes: a RayJob that trains in its layout, and a RayService for what comes out.

Both begin with k8s/cluster/raycluster.yaml and the patches of k8s/components/differ, as the overlays do, so that there is
one description of a pod. Of the plan are the workers of the job: how many pods, their GPUs, processors and memory.
"""

from __future__ import annotations

import copy
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from lib import storage
from lib.errors import ConfigError, ResourceError
from lib.manifests import containers, dump, patch
from lib.planner.layouts import Estimate, Judged, Report
from lib.planner.memory import GIB
from lib.planner.tables import OFFLOADS, gib
from lib.settings import Settings
from lib.tasks import served_as

IMAGE = "ghcr.io/whorl/whorl"
# Of a pod's memory: Ray's object store, by its default, and what is neither its nor the workers'.
OBJECT_STORE, SYSTEM = 0.3, 0.05
# The job's driver, and what reads the data meanwhile.
BESIDE_WORKERS = 2
LEAST_MEMORY_GIB = 8
# Names of a RayJob and of a RayService: KubeRay makes longer ones of them, of pods and services.
LONGEST_NAME = 41
# Tasks whose version is in an application's arguments (serve/deploy.py).
STARTED_ANEW = ("chat",)
CPU, GPU = 0, 1


def render(report: Report, config: str, overrides: dict[str, str]) -> str:
    """Both manifests as YAML, with a heading that says what they were made of.

    `config` is the configuration's path as the image has it, `overrides` what the command line changed in it. Raises
    ConfigError where the plan is of several accelerators or k8s/ is not here, ResourceError where nothing fits.
    """
    judged = _one(report)
    best = judged.recommended
    if best is None:
        raise ResourceError(f"on {judged.accelerator.name} {judged.reason}")
    job = ray_job(report.settings, best, config, overrides)
    service = ray_service(report.settings)
    return _heading(judged, best) + "---\n".join(map(dump, (job, service)))


def _one(report: Report) -> Judged:
    if len(report.judged) != 1:
        names = ", ".join(judged.accelerator.name for judged in report.judged)
        raise ConfigError(
            f"a job is for one accelerator, and plan.accelerator has {len(report.judged)} ({names}); "
            f"choose one: --plan.accelerator {report.judged[-1].accelerator.name}"
        )
    return report.judged[0]


def _heading(judged: Judged, best: Estimate) -> str:
    layout, accelerator = best.layout, judged.accelerator
    used = best.memory.device if accelerator.gpu else best.memory.host
    offload = f", {OFFLOADS[layout.offload]} offloaded" if layout.offload != "none" else ""
    checkpointing = ", activation checkpointing" if layout.checkpointing else ""
    return (
        f"# Of python -m jobs.plan: {layout.workers} {'workers' if layout.workers > 1 else 'worker'}, ZeRO-{layout.zero_stage}{offload}{checkpointing}, on "
        f"{accelerator.name}: {gib(used)} GiB of {gib(accelerator.usable)} usable; {judged.reason}.\n"
        "# The job: kubectl apply -f FILE -l whorl/stage=finetune; once its model is champion, the service without -l.\n"
    )


def ray_job(settings: Settings, best: Estimate, config: str, overrides: dict[str, str]) -> dict[str, Any]:
    """A RayJob of `jobs.finetune` in the layout of `best`, on as many pods as the layout has hosts."""
    layout = best.layout
    chosen = {
        **overrides,
        "training.workers": str(layout.workers),
        "training.zero_stage": str(layout.zero_stage),
        "training.offload": layout.offload,
        "training.gradient_checkpointing": str(layout.checkpointing).lower(),
        "training.gpus_per_worker": str(int(layout.gpu)),
        "training.resume": "auto",
    }
    words = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    job: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(settings, "finetune", "job"),
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "jobs.finetune", "--config", config, *words]),
            "rayClusterSpec": cluster(),
        },
    }
    job["metadata"]["labels"]["whorl/stage"] = "finetune"
    patch(job, _read("components/differ/job.yaml"))
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    group = groups[GPU if layout.gpu else CPU]
    hosts = math.ceil(layout.workers / layout.on_host)
    # All at once: a run starts when all its workers are there.
    group |= {"replicas": hosts, "minReplicas": hosts, "maxReplicas": hosts}
    processors = math.ceil(layout.on_host * settings.training.cpus_per_worker) + BESIDE_WORKERS
    _size(group, processors, pod_memory(best), layout.on_host if layout.gpu else 0)
    if not layout.gpu:  # a job without GPUs asks for no node that has them
        del groups[GPU]
    _name_images(job, layout.gpu)
    return job


def pod_memory(best: Estimate) -> int:
    """GiB of one pod: what the layout's workers on one host take at their peak, and Ray's object store beside it."""
    return max(math.ceil(best.memory.host / GIB / (1 - OBJECT_STORE - SYSTEM)), LEAST_MEMORY_GIB)


def ray_service(settings: Settings) -> dict[str, Any]:
    """A RayService of this configuration's application alone, which follows its champion."""
    serving = settings.serving
    service: dict[str, Any] = copy.deepcopy(_read("base/rayservice.yaml"))
    service["metadata"] = _metadata(settings, "service", "service")
    service["spec"]["rayClusterConfig"] = cluster()
    patch(service, _read("components/differ/service.yaml"))
    patch(service, _read("components/differ/environment.yaml"))
    config = {
        "http_options": {"host": "0.0.0.0", "port": serving.port},
        "applications": [application(settings)],
    }
    service["spec"]["serveConfigV2"] = dump(config)
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    if serving.gpus_per_replica:
        least = max(serving.min_replicas, 1)
        most = max(serving.max_replicas, least)
        groups[GPU] |= {"replicas": least, "minReplicas": least, "maxReplicas": most}
        for kind in ("requests", "limits"):
            resources = groups[GPU]["template"]["spec"]["containers"][0]["resources"][kind]
            resources["nvidia.com/gpu"] = str(math.ceil(serving.gpus_per_replica))
    else:
        del groups[GPU]
    _name_images(service, bool(serving.gpus_per_replica))
    return service


def application(settings: Settings) -> dict[str, Any]:
    """The application as serve/deploy.py deploys it, but for the version: the alias is resolved when a replica starts."""
    elsewhere = {"model", "host", "port", "route_prefix", "start_timeout_s"}
    arguments = settings.serving.model_dump(mode="json", exclude=elsewhere)
    if settings.monitoring is not None:
        arguments["monitoring"] = settings.monitoring.model_dump(mode="json", exclude={"replay"})
    task, model = served_as(settings), settings.serving.model or f"{settings.name}@champion"
    found: dict[str, Any] = {
        "name": settings.name,
        "route_prefix": settings.serving.route_prefix,
        "import_path": f"serve.{task}:application",
        "args": arguments,
    }
    if task in STARTED_ANEW:
        arguments["model"] = model
    else:
        found["deployments"] = [{"name": task.capitalize(), "user_config": {"model": model}}]
    return found


def cluster() -> dict[str, Any]:
    """The specification of the one cluster. Raises ConfigError outside a checkout."""
    spec: dict[str, Any] = copy.deepcopy(_read("cluster/raycluster.yaml")["spec"])
    return spec


def _metadata(settings: Settings, what: str, component: str) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9]+", "-", settings.name)
    name = name if name[0].isalpha() else f"w-{name}"
    return {
        # A DNS label (RFC 1035).
        "name": f"{name[: LONGEST_NAME - len(what) - 1].rstrip('-')}-{what}",
        "namespace": "whorl",
        "labels": {
            "app.kubernetes.io/name": "whorl",
            "app.kubernetes.io/part-of": "whorl",
            "app.kubernetes.io/component": component,
        },
    }


def _size(group: dict[str, Any], processors: int, memory_gib: int, gpus: int) -> None:
    template = group["template"]["spec"]
    resources = template["containers"][0]["resources"]
    for kind in ("requests", "limits"):
        resources[kind] |= {"cpu": str(processors), "memory": f"{memory_gib}Gi"}
        if gpus:
            resources[kind]["nvidia.com/gpu"] = str(gpus)
    shared = next(v for v in template["volumes"] if v["name"] == "shared-memory")
    shared["emptyDir"]["sizeLimit"] = f"{math.ceil(memory_gib * OBJECT_STORE)}Gi"


def _name_images(document: Any, gpu: bool) -> None:
    """Give the image its tag, as kustomize does in the overlays."""
    images = _read("overlays/gpu/kustomization.yaml" if gpu else "components/release/kustomization.yaml")[
        "images"
    ]
    tag = next(image["newTag"] for image in images if image["name"] == IMAGE)
    for container in containers(document):
        if container["image"] == IMAGE:
            container["image"] = f"{IMAGE}:{tag}"


def _read(name: str) -> Any:
    path: Path = storage.PROJECT / "k8s" / name
    try:
        return copy.deepcopy(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(
            f"--emit k8s begins with {path}, which is not there; run it in a checkout"
        ) from None
