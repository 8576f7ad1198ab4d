"""Rules of our own for every manifest, beyond what schemas know: security, health, sizes, and what KubeRay itself refuses.

`RULES` are functions of one manifest, `OF_ALL` of all manifests of an overlay together. Each yields what is wrong, a line
each; a rule is called by its function's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Any

import yaml

from tests.k8s.building import Document, Pods, clusters, containers, named, pods, ray_jobs

# Of a pod's memory, by Ray's own default (DEFAULT_OBJECT_STORE_MEMORY_PROPORTION).
OBJECT_STORE = Decimal("0.3")
LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/component")
# Those that somebody else makes: Kubernetes in each namespace, cert-manager.
MADE_BY_OTHERS = {("ConfigMap", "kube-root-ca.crt"), ("Secret", "whorl-tls")}
# Ports that KubeRay's Services and probes go by.
LONGEST = {"RayCluster": 63, "RayJob": 47, "RayService": 47, "RayCronJob": 47}
SUFFIXES = {"m": Decimal("0.001"), "": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)} | {
    f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGT", 1)
}  # fmt: skip
DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")

Found = Iterator[str]


def check(document: Document) -> list[tuple[str, str]]:
    """(rule, what is wrong) of one manifest."""
    return [(rule.__name__, f"{named(document)}: {line}") for rule in RULES for line in rule(document)]


def check_all(documents: list[Document]) -> list[tuple[str, str]]:
    """Of an overlay: each of its manifests, and what they are to one another."""
    found = [one for document in documents for one in check(document)]
    return found + [(rule.__name__, line) for rule in OF_ALL for line in rule(documents)]


def quantity(text: Any) -> Decimal:
    """A resource.Quantity of Kubernetes as a number. Raises ValueError for what is none."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if not match or match[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return Decimal(match[1]) * SUFFIXES[match[2]]


def _contexts(document: Document) -> Iterator[tuple[str, Document, Document]]:
    """Each container: where it stands, it, its pod's spec. The autoscaler, which KubeRay puts beside a head, is one."""
    for pod in pods(document):
        for container in containers(pod):
            yield f"{pod.where} {container['name']}", container, pod.spec
    for where, cluster in clusters(document):
        if cluster.get("enableInTreeAutoscaling"):
            options = cluster.get("autoscalerOptions", {})
            head = cluster["headGroupSpec"]["template"]["spec"]
            yield f"{where} autoscaler", {"name": "autoscaler", "image": "the-heads:own", **options}, head


def images_have_a_tag(document: Document) -> Found:
    for where, container, _ in _contexts(document):
        image = container.get("image", "")
        tag = image.rpartition("/")[2].partition(":")[2].partition("@")[0]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{where}: image {image!r} has no tag, or one that moves"


def resources_are_set(document: Document) -> Found:
    for where, container, _ in _contexts(document):
        resources = container.get("resources", {})
        for kind in ("requests", "limits"):
            for name in ("cpu", "memory", "ephemeral-storage"):
                if name not in resources.get(kind, {}):
                    yield f"{where}: no {kind} of {name}"
        for name, wanted in resources.get("requests", {}).items():
            most = resources.get("limits", {}).get(name)
            if most is not None and quantity(wanted) > quantity(most):
                yield f"{where}: asks for more {name} ({wanted}) than its limit ({most})"
            if "/" in name and most != wanted:
                yield f"{where}: {name} cannot be had in part"


def nothing_is_privileged(document: Document) -> Found:
    for where, container, pod in _contexts(document):
        if container.get("securityContext", {}).get("privileged"):
            yield f"{where}: privileged"
        for port in container.get("ports", ()):
            if "hostPort" in port:
                yield f"{where}: hostPort"
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(name):
                yield f"{where}: {name}"
        for volume in pod.get("volumes", ()):
            if "hostPath" in volume:
                yield f"{where}: hostPath {volume['name']}"


def nobody_is_root(document: Document) -> Found:
    for where, container, pod in _contexts(document):
        for context in (container.get("securityContext", {}), pod.get("securityContext", {})):
            if context.get("runAsUser") == 0:
                yield f"{where}: runAsUser 0"
        own = container.get("securityContext", {})
        if not own.get("runAsNonRoot", pod.get("securityContext", {}).get("runAsNonRoot")):
            yield f"{where}: runAsNonRoot is not set"


def privileges_do_not_grow(document: Document) -> Found:
    for where, container, _ in _contexts(document):
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"{where}: allowPrivilegeEscalation is not false"


def capabilities_are_dropped(document: Document) -> Found:
    for where, container, _ in _contexts(document):
        capabilities = container.get("securityContext", {}).get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            yield f"{where}: capabilities are not all dropped"


def seccomp_is_on(document: Document) -> Found:
    for where, container, pod in _contexts(document):
        own = container.get("securityContext", {}).get("seccompProfile")
        profile = own or pod.get("securityContext", {}).get("seccompProfile", {})
        if profile.get("type") != "RuntimeDefault":
            yield f"{where}: seccompProfile is not RuntimeDefault"


def root_is_read_only(document: Document) -> Found:
    for where, container, _ in _contexts(document):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{where}: readOnlyRootFilesystem is not true"


def no_token_of_the_api(document: Document) -> Found:
    """Only what mounts one by itself has Kubernetes' token: the autoscaler, beside the head's own container."""
    for pod in pods(document):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: automountServiceAccountToken is not false"
        tokens = {
            volume["name"]
            for volume in pod.spec.get("volumes", ())
            if any(
                "serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", ())
            )
        }
        for container in containers(pod):
            if tokens & {mount["name"] for mount in container.get("volumeMounts", ())}:
                yield f"{pod.where} {container['name']}: has a token of Kubernetes' API"


def what_serves_is_probed(document: Document) -> Found:
    for pod in pods(document):
        for container in pod.spec["containers"]:
            if container.get("ports"):
                for probe in ("readinessProbe", "livenessProbe"):
                    if probe not in container:
                        yield f"{pod.where} {container['name']}: no {probe}"


def serving_workers_answer_for_serve(document: Document) -> Found:
    """A worker of a RayService gets requests while it is ready: its probe must ask Serve."""
    if document["kind"] == "RayService":
        for pod in pods(document):
            if pod.ray == "worker":
                ready = pod.spec["containers"][0].get("readinessProbe", {}).get("httpGet", {})
                if (ready.get("path"), ready.get("port")) != ("/-/healthz", 8000):
                    yield f"{pod.where}: its readiness does not ask Serve's proxy"


def all_is_labelled(document: Document) -> Found:
    for where, labels in [
        ("metadata", document["metadata"].get("labels", {})),
        *((pod.where, pod.labels) for pod in pods(document)),
    ]:
        missing = [name for name in LABELS if name not in labels]
        if missing:
            yield f"{where}: no label {', '.join(missing)}"


def scratch_has_bounds(document: Document) -> Found:
    for pod in pods(document):
        shared = Decimal(0)
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume:
                size = volume["emptyDir"].get("sizeLimit")
                if size is None:
                    yield f"{pod.where}: emptyDir {volume['name']} has no sizeLimit"
                elif volume["emptyDir"].get("medium") == "Memory":
                    shared += quantity(size)
        limits = [c.get("resources", {}).get("limits", {}).get("memory") for c in pod.spec["containers"]]
        if shared and all(limits) and shared >= sum(map(quantity, limits)):
            yield f"{pod.where}: what lies in memory is as large as its limit"


def volumes_are_there(document: Document) -> Found:
    for pod in pods(document):
        known = {volume["name"] for volume in pod.spec.get("volumes", ())}
        known |= {one["metadata"]["name"] for one in document.get("spec", {}).get("volumeClaimTemplates", ())}
        mounted = [(c["name"], mount) for c in containers(pod) for mount in c.get("volumeMounts", ())]
        if pod.ray == "head":
            for _, cluster in clusters(document):
                mounts = cluster.get("autoscalerOptions", {}).get("volumeMounts", ())
                mounted += [("autoscaler", mount) for mount in mounts]
        for name, mount in mounted:
            if mount["name"] not in known:
                yield f"{pod.where} {name}: no volume {mount['name']}"
        used = {mount["name"] for _, mount in mounted}
        # Without the autoscaler nobody has the token, which is as well.
        if idle := known - used - {"api-token"}:
            yield f"{pod.where}: volumes that nobody mounts: {', '.join(sorted(idle))}"


def workers_have_shared_memory(document: Document) -> Found:
    for pod in pods(document):
        if pod.ray in ("head", "worker"):
            mounts = {m["mountPath"]: m["name"] for m in pod.spec["containers"][0].get("volumeMounts", ())}
            media = {v["name"]: v.get("emptyDir", {}).get("medium") for v in pod.spec.get("volumes", ())}
            if media.get(mounts.get("/dev/shm", "")) != "Memory":
                yield f"{pod.where}: /dev/shm is no emptyDir in memory"
                continue
            sizes = {
                v["name"]: v["emptyDir"].get("sizeLimit") for v in pod.spec["volumes"] if "emptyDir" in v
            }
            size = sizes[mounts["/dev/shm"]]
            memory = pod.spec["containers"][0].get("resources", {}).get("limits", {}).get("memory")
            if size and memory and quantity(size) < OBJECT_STORE * quantity(memory):
                yield f"{pod.where}: of {memory} Ray's object store takes more than the {size} of /dev/shm, and goes to the disk"


def ray_asks_for_a_token(document: Document) -> Found:
    for where, cluster in clusters(document):
        options = cluster.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield f"{where}: no authentication by a token from a Secret"
        elif cluster.get("rayVersion") is None:
            yield f"{where}: authentication needs rayVersion"


def heads_do_no_work(document: Document) -> Found:
    for where, cluster in clusters(document):
        if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
            yield f"{where}: the head has CPUs for work"


def kuberay_takes_the_cluster(document: Document) -> Found:
    """What KubeRay's operator refuses (ValidateRayClusterSpec)."""
    if document["kind"] in LONGEST:
        name = document["metadata"]["name"]
        if len(name) > LONGEST[document["kind"]] or not DNS_LABEL.match(name):
            yield f"{name!r} is no name for a {document['kind']}"
    for where, cluster in clusters(document):
        groups = cluster.get("workerGroupSpecs", ())
        for part in (cluster["headGroupSpec"], *groups):
            start = part.get("rayStartParams", {})
            if part.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
                yield f"{where}: resources both in rayStartParams and in resources"
            if "labels" in start:
                yield f"{where}: labels belong to the group, not to rayStartParams"
            if cluster.get("enableInTreeAutoscaling") and part["template"]["spec"].get(
                "restartPolicy", "Never"
            ) != ("Never"):
                yield f"{where}: autoscaler v2 wants restartPolicy Never"
        names = [group["groupName"] for group in groups]
        if len(set(names)) != len(names):
            yield f"{where}: two groups of one name"
        for group in groups:
            least, now, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
            if not least <= now <= most:
                yield f"{where} {group['groupName']}: replicas {now} is not within {least} and {most}"
        if "gcsFaultToleranceOptions" in cluster:
            head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
            names = {variable["name"] for variable in head.get("env", ())}
            if names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}:
                yield f"{where}: Redis both in the environment and in gcsFaultToleranceOptions"


def kuberay_takes_the_job(document: Document) -> Found:
    """What KubeRay's operator refuses (ValidateRayJobSpec), and the rules of its CRDs in CEL."""
    for where, job in ray_jobs(document):
        strategy = job.get("deletionStrategy", {})
        rules = strategy.get("deletionRules", [])
        if "deletionStrategy" in job and not (rules or {"onSuccess", "onFailure"} <= set(strategy)):
            yield f"{where}: a deletionStrategy without rules"
        if rules and (job.get("shutdownAfterJobFinishes") or {"onSuccess", "onFailure"} & set(strategy)):
            yield f"{where}: deletionRules beside another way of deletion"
        if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
            yield f"{where}: ttlSecondsAfterFinished without shutdownAfterJobFinishes"
        order: dict[str, dict[str, int]] = {}
        for rule in rules:
            condition = rule["condition"]
            if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
                yield f"{where}: a rule of deletion needs one of jobStatus and jobDeploymentStatus"
                continue
            if rule["policy"] == "DeleteWorkers" and job["rayClusterSpec"].get("enableInTreeAutoscaling"):
                yield f"{where}: DeleteWorkers with the autoscaler"
            state = condition.get("jobStatus") or condition["jobDeploymentStatus"]
            if rule["policy"] in order.setdefault(state, {}):
                yield f"{where}: two rules of deletion for {state} and {rule['policy']}"
            order[state][rule["policy"]] = condition.get("ttlSeconds", 0)
        for state, times in order.items():
            row = [times[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in times]
            if row != sorted(row):
                yield f"{where}: {state} deletes the job before its cluster"
        mode = job.get("submissionMode", "K8sJobMode")
        if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
            yield f"{where}: no submissionMode {mode!r}"
        if mode == "K8sJobMode" and re.search(r"[;&|`$<>\n]", job.get("entrypoint", "").strip()):
            yield f"{where}: the submitter's shell would read this entrypoint otherwise"
        if job.get("backoffLimit", 0) < 0 or job.get("activeDeadlineSeconds", 1) <= 0:
            yield f"{where}: a negative backoffLimit or activeDeadlineSeconds"
        queued = "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {})
        if (queued or job.get("suspend")) and not job.get("shutdownAfterJobFinishes"):
            yield f"{where}: what is suspended, by Kueue too, must shut its cluster down by itself"
        if queued and job["rayClusterSpec"].get("enableInTreeAutoscaling"):
            yield f"{where}: Kueue admits a cluster whose size is known"


def kuberay_takes_the_service(document: Document) -> Found:
    """What KubeRay's operator refuses (ValidateRayServiceSpec)."""
    if document["kind"] != "RayService":
        return
    spec = document["spec"]
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type") not in (None, "NewCluster", "None", "NewClusterWithIncrementalUpgrade"):
        yield f"no upgradeStrategy {strategy['type']!r}"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        options = strategy.get("clusterUpgradeOptions", {})
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling") or not options.get("gatewayClassName"):
            yield "an upgrade in steps needs the autoscaler and a gatewayClassName"
        for name in ("stepSizePercent", "maxSurgePercent"):
            if not 0 < options.get(name, 100) <= 100:
                yield f"{name} is no share of the requests"
    config = yaml.safe_load(spec.get("serveConfigV2") or "") or {}
    if not config.get("applications"):
        yield "serveConfigV2 has no application"
    if config.get("http_options", {}).get("host") != "0.0.0.0":
        yield "Serve would listen where nobody reaches it"


def cron_schedules_are_five_fields(document: Document) -> Found:
    schedule = document.get("spec", {}).get("schedule")
    if document["kind"] in ("CronJob", "RayCronJob") and not re.fullmatch(
        r"([\d*/,-]+ ){4}[\d*/,-]+", schedule
    ):
        yield f"schedule {schedule!r}"


def budgets_count_pods(document: Document) -> Found:
    """Kubernetes cannot tell how many pods a Ray cluster should have: only a number of pods that stay works."""
    if document["kind"] == "PodDisruptionBudget":
        spec = document["spec"]
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            yield "only minAvailable, as a number, works for Ray's pods"


def services_stay_inside(document: Document) -> Found:
    if document["kind"] == "Service" and document["spec"].get("type", "ClusterIP") != "ClusterIP":
        yield f"a Service of type {document['spec']['type']} is reached from outside"
    for where, cluster in clusters(document):
        if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
            yield f"{where}: the head's Service is reached from outside"
        if cluster["headGroupSpec"].get("enableIngress"):
            yield f"{where}: the dashboard has an Ingress"


RULES: list[Callable[[Document], Iterable[str]]] = [
    images_have_a_tag, resources_are_set, nothing_is_privileged, nobody_is_root, privileges_do_not_grow,
    capabilities_are_dropped, seccomp_is_on, root_is_read_only, no_token_of_the_api, what_serves_is_probed,
    serving_workers_answer_for_serve, all_is_labelled, scratch_has_bounds, volumes_are_there, workers_have_shared_memory,
    ray_asks_for_a_token, heads_do_no_work, kuberay_takes_the_cluster, kuberay_takes_the_job, kuberay_takes_the_service,
    cron_schedules_are_five_fields, budgets_count_pods, services_stay_inside,
]  # fmt: skip


def references_exist(documents: list[Document]) -> Found:
    """ConfigMaps, Secrets, claims and service accounts that pods name."""
    if not any(document["kind"] == "Namespace" for document in documents):
        return  # jobs alone: their overlay has them
    there = {(d["kind"], d["metadata"]["name"]) for d in documents} | MADE_BY_OTHERS
    there |= {("Secret", d["spec"]["target"]["name"]) for d in documents if d["kind"] == "ExternalSecret"}
    for document in documents:
        for kind, name in _references(document):
            if (kind, name) not in there:
                yield f"{named(document)}: no {kind} {name}"


def _references(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            match key, one:
                case (("configMapRef" | "configMapKeyRef" | "configMap"), {"name": name}) if not one.get(
                    "optional"
                ):
                    yield "ConfigMap", name
                case (("secretRef" | "secretKeyRef"), {"name": name}) if not one.get("optional"):
                    yield "Secret", name
                case "secret", {"secretName": name}:
                    yield "Secret", name
                case "authOptions", {"secretName": name}:
                    yield "Secret", name
                case "persistentVolumeClaim", {"claimName": name}:
                    yield "PersistentVolumeClaim", name
                case "serviceAccountName", str(name):
                    yield "ServiceAccount", name
            yield from _references(one)


def selectors_select(documents: list[Document]) -> Found:
    """A Service, a budget or a monitor that selects no pod is a mistake in a label. (What KubeRay adds is its own.)"""
    templates = [(p, {**p.labels, **_by_kuberay(p, d)}) for d in documents for p in pods(d)]
    for document in documents:
        spec = document.get("spec", {})
        match document["kind"]:
            case "Service":
                wanted = spec["selector"]
            case "PodDisruptionBudget" | "PodMonitor":
                wanted = spec["selector"]["matchLabels"]
            case _:
                continue
        chosen = [pod for pod, labels in templates if wanted.items() <= labels.items()]
        if not chosen:
            yield f"{named(document)}: selects no pod"
        ports = {p["name"] for pod in chosen for c in pod.spec["containers"] for p in c.get("ports", ())}
        asked = [p["targetPort"] for p in spec.get("ports", ())]
        asked += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", ())]
        if missing := set(asked) - ports:
            yield f"{named(document)}: no port {', '.join(sorted(missing))} in what it selects"


def _by_kuberay(pod: Pods, document: Document) -> dict[str, str]:
    """Labels that KubeRay gives to a pod of a RayCluster; those of others have names that are made when they start."""
    if not pod.ray or pod.ray == "submitter":
        return {}
    found = {"ray.io/node-type": pod.ray, "ray.io/is-ray-node": "yes"}
    return found | (
        {"ray.io/cluster": document["metadata"]["name"]} if document["kind"] == "RayCluster" else {}
    )


def names_are_single(documents: list[Document]) -> Found:
    seen: set[tuple[str, str, str]] = set()
    for document in documents:
        key = (document["kind"], document["metadata"].get("namespace", ""), document["metadata"]["name"])
        if key in seen:
            yield f"{named(document)} is there twice"
        seen.add(key)


def pods_fit_the_limits(documents: list[Document]) -> Found:
    """A claim beyond what a LimitRange allows is refused when it is made."""
    for limits in (d for d in documents if d["kind"] == "LimitRange"):
        most = next(
            (one["max"]["storage"] for one in limits["spec"]["limits"] if one["type"] == "PersistentVolumeClaim"), None
        )  # fmt: skip
        for document in documents:
            claims = document.get("spec", {}).get("volumeClaimTemplates", [])
            for claim in [*claims, *([document] if document["kind"] == "PersistentVolumeClaim" else [])]:
                size = claim["spec"]["resources"]["requests"]["storage"]
                if most is not None and quantity(size) > quantity(most):
                    yield f"{named(document)}: a claim of {size}, and the most is {most}"


OF_ALL: list[Callable[[list[Document]], Iterable[str]]] = [
    references_exist, selectors_select, names_are_single, pods_fit_the_limits
]  # fmt: skip
