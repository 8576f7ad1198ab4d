"""What an overlay asks of a cluster before a job runs, and what one job adds.

    python -m tests.k8s.sizes overlays/kind overlays/production overlays/gpu

Requests of all pods that always run; a worker group counts with its least workers, the autoscaler beside each head too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

from tests.k8s.building import Document, build, clusters, pods
from tests.k8s.policies import quantity

GIB = 2**30


def requested(documents: list[Document]) -> Counter[str]:
    """Resource → how much of it is asked for, in cores, bytes and pieces."""
    total: Counter[str] = Counter()
    for document in documents:
        if document["kind"] in ("RayCronJob", "CronJob"):  # only at night
            continue
        for pod in pods(document):
            times = document["spec"].get("replicas", 1) if not pod.ray else 1
            if pod.ray == "worker" and pod.group:
                times = (
                    max(pod.group["minReplicas"], 1)
                    if _is_job(document, pod.group)
                    else pod.group["minReplicas"]
                )
            for container in pod.spec["containers"]:
                _add(total, container["resources"]["requests"], times)
        for _, cluster in clusters(document):
            if cluster.get("enableInTreeAutoscaling"):
                _add(total, cluster["autoscalerOptions"]["resources"]["requests"], 1)
    return total


def _is_job(document: Document, group: Document) -> bool:
    """A job without GPUs starts one worker, where its driver goes."""
    return document["kind"] == "RayJob" and group["groupName"] == "cpu"


def _add(total: Counter[str], resources: dict[str, str], times: int) -> None:
    for name, value in resources.items():
        total[name] += Decimal(times) * quantity(value)  # type: ignore[assignment]


def table(folders: list[str], built: Callable[[str], list[Document]] = build) -> str:
    rows = ["| | always | a `finetune` job besides |", "| --- | --- | --- |"]
    for overlay in folders:
        always = requested(built(overlay))
        job = requested([d for d in built(f"{overlay}/jobs") if d["metadata"]["name"] == "finetune"])
        rows.append(f"| `{overlay}` | {_told(always)} | {_told(job)} |")
    return "\n".join(rows)


def _told(total: Counter[str]) -> str:
    gpus = f", {int(total['nvidia.com/gpu'])} GPU" if total["nvidia.com/gpu"] else ""
    return f"{float(total['cpu']):.1f} CPU, {float(total['memory']) / GIB:.0f} GiB{gpus}"


if __name__ == "__main__":
    print(table(sys.argv[1:]))
