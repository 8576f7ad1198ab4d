"""Who reaches whom: the evaluator, and with it a table of flows for each overlay."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.building import Document, pods
from tests.k8s.network import End, allowed, selects

# ------------------------------------------------------------------ the evaluator


def policy(selector: Document | None = None, namespace: str = "a", **spec: Any) -> Document:
    return {
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {"podSelector": selector or {}, **spec},
    }


WEB, DATA = {"app": "web"}, {"app": "data"}
web, data = End("a", WEB), End("a", DATA, ports={"sql": 5432})
stranger = End("b", WEB, {"team": "b"})
outside = End(address="203.0.113.7")


def only(**spec: Any) -> list[Document]:
    return [policy({"matchLabels": DATA}, policyTypes=["Ingress"], **spec)]


def test_without_a_policy_everything_is_let_through() -> None:
    assert allowed([], web, data, 1)
    assert allowed(
        [policy({"matchLabels": {"app": "other"}}, policyTypes=["Ingress", "Egress"])], web, data, 1
    )
    assert allowed([policy(namespace="b", policyTypes=["Ingress", "Egress"])], web, data, 1)


def test_who_is_selected_is_reached_by_nobody_else() -> None:
    assert not allowed([policy(policyTypes=["Ingress"])], web, data, 1)
    assert not allowed([policy(policyTypes=["Egress"])], web, data, 1)
    # Types are told by the rules where they are not given.
    assert not allowed([policy()], web, data, 1)
    assert allowed([policy({"matchLabels": WEB})], web, data, 1), "ingress alone: web asks"
    assert not allowed([policy({"matchLabels": WEB}, egress=[{"to": [{"podSelector": {"matchLabels": WEB}}]}])], web, data, 1)  # fmt: skip
    # An empty rule lets everybody in.
    assert allowed([policy(policyTypes=["Ingress"], ingress=[{}])], outside, data, 1)


def test_policies_add_up() -> None:
    nobody = policy(policyTypes=["Ingress", "Egress"])
    inward = policy({"matchLabels": DATA}, policyTypes=["Ingress"], ingress=[{"from": [{"podSelector": {"matchLabels": WEB}}]}])  # fmt: skip
    outward = policy({"matchLabels": WEB}, policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": DATA}}]}])  # fmt: skip
    assert not allowed([nobody, inward], web, data, 1)
    assert not allowed([nobody, outward], web, data, 1)
    assert allowed([nobody, inward, outward], web, data, 1)
    assert not allowed([nobody, inward, outward], data, web, 1)


def test_a_pod_of_another_namespace_needs_a_namespace_selector() -> None:
    rule = {"podSelector": {"matchLabels": WEB}}
    assert allowed(only(ingress=[{"from": [rule]}]), web, data, 1)
    assert not allowed(only(ingress=[{"from": [rule]}]), stranger, data, 1)
    team = {"namespaceSelector": {"matchLabels": {"team": "b"}}}
    assert allowed(only(ingress=[{"from": [team]}]), stranger, data, 1)
    assert not allowed(only(ingress=[{"from": [team]}]), web, data, 1)
    # In one entry both must hold, in two either.
    both = {**team, "podSelector": {"matchLabels": DATA}}
    assert not allowed(only(ingress=[{"from": [both]}]), stranger, data, 1)
    assert allowed(
        only(ingress=[{"from": [team, {"podSelector": {"matchLabels": DATA}}]}]), stranger, data, 1
    )
    name = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "b"}}}
    assert allowed(only(ingress=[{"from": [name]}]), stranger, data, 1)
    assert allowed(only(ingress=[{"from": [{"namespaceSelector": {}}]}]), stranger, data, 1)
    assert not allowed(only(ingress=[{"from": [{"namespaceSelector": {}}]}]), outside, data, 1)


def test_blocks_of_addresses() -> None:
    block = {"ipBlock": {"cidr": "203.0.113.0/24", "except": ["203.0.113.128/25"]}}
    assert allowed(only(ingress=[{"from": [block]}]), outside, data, 1)
    assert not allowed(only(ingress=[{"from": [block]}]), End(address="203.0.113.200"), data, 1)
    assert not allowed(only(ingress=[{"from": [block]}]), End(address="2001:db8::1"), data, 1)
    out = policy({"matchLabels": WEB}, policyTypes=["Egress"], egress=[{"to": [block]}])
    assert allowed([out], web, outside, 443)
    assert not allowed([out], web, data, 443)


@pytest.mark.parametrize(
    ("ports", "port", "protocol", "passes"),
    [
        ([{"port": 5432}], 5432, "TCP", True),
        ([{"port": 5432}], 5433, "TCP", False),
        ([{"port": 5432}], 5432, "UDP", False),
        ([{"port": 53, "protocol": "UDP"}], 53, "UDP", True),
        ([{"protocol": "TCP"}], 9, "TCP", True),
        ([{"port": 5000, "endPort": 6000}], 5432, "TCP", True),
        ([{"port": 5000, "endPort": 5100}], 5432, "TCP", False),
        ([{"port": "sql"}], 5432, "TCP", True),
        ([{"port": "sql"}], 5433, "TCP", False),
        ([{"port": "http"}], 5432, "TCP", False),
        ([{"port": 1}, {"port": 2}], 2, "TCP", True),
    ],
)
def test_ports(ports: list[Document], port: int, protocol: str, passes: bool) -> None:
    assert allowed(only(ingress=[{"ports": ports}]), web, data, port, protocol) is passes


def test_expressions_of_labels() -> None:
    def holds(operator: str, *values: str) -> bool:
        return selects(
            {"matchExpressions": [{"key": "app", "operator": operator, "values": list(values)}]}, WEB
        )

    assert holds("In", "web", "data")
    assert not holds("In", "data")
    assert holds("NotIn", "data")
    assert not holds("NotIn", "web")
    assert holds("Exists")
    assert not holds("DoesNotExist")
    assert selects({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}, WEB)
    with pytest.raises(ValueError, match="Near"):
        holds("Near")


# ------------------------------------------------------------------ what the overlays let through


def ends(documents: list[Document]) -> dict[str, End]:
    """The pods of an overlay by what they are, with the labels that they have there, and who is not of it."""
    found = {
        "operator": End("kuberay-system", {"app.kubernetes.io/component": "kuberay-operator"}),
        "pretended operator": End("elsewhere", {"app.kubernetes.io/component": "kuberay-operator"}),
        "dns": End("kube-system", {"k8s-app": "kube-dns"}),
        "gateway": End("gateways", {"app": "envoy"}, {"whorl/ingress": "allowed"}),
        "prometheus": End("monitoring", {"app": "prometheus"}, {"whorl/metrics": "allowed"}),
        "another namespace": End("elsewhere", {"app.kubernetes.io/name": "whorl"}),
        "any pod here": End("whorl", {"app": "somebody"}),
        "internet": End(address="203.0.113.7"),
        "kubernetes": End(address="10.96.0.1"),
        "managed database": End(address="10.20.0.5"),
        "metadata": End(address="169.254.169.254"),
        "metadata of ecs": End(address="169.254.170.2"),
    }
    kinds = {"Deployment", "StatefulSet", "CronJob", "RayService", "RayCluster", "RayCronJob"}
    for document in documents:
        if document["kind"] in kinds:
            for pod in pods(document):
                component = pod.labels["app.kubernetes.io/component"]
                of = {"RayService": "service's ", "RayCronJob": "job's "}.get(document["kind"], "")
                found.setdefault(f"{of}{component}", End("whorl", pod.labels))
    return found


RAY = (
    "ray-head",
    "ray-worker",
    "service's ray-head",
    "service's ray-worker",
    "job's ray-head",
    "job's ray-worker",
)
ANYBODY = ("internet", "another namespace", "any pod here", "gateway", "prometheus", "pretended operator")
SUBMITTER = "job's submitter"

# (who, whom, ports): let through, in every overlay.
OPEN = [
    *[(ray, ray, (6379, 8265, 10001, 12345)) for ray in RAY],
    ("job's ray-worker", "service's ray-head", (8265,)),  # the last stage of a pipeline
    ("operator", "service's ray-head", (8265, 8000)),
    ("operator", "job's ray-head", (8265,)),
    (SUBMITTER, "job's ray-head", (8265,)),
    ("gateway", "service's ray-worker", (8000,)),
    *[("prometheus", ray, (8080, 9101)) for ray in RAY],
    ("prometheus", "ray-head", (44217, 44227)),
    *[(ray, "redis", (6379,)) for ray in RAY],
    *[(ray, "internet", (443,)) for ray in RAY],
    *[(who, "managed database", (5432,)) for who in ("ray-head", "service's ray-worker", "mlflow")],
    ("ray-head", "kubernetes", (443, 6443)),
    ("mlflow", "internet", (443,)),
]  # fmt: skip

# Not let through.
CLOSED = [
    # Dashboard and jobs API, client, control store, runtime agent: nobody from outside, a gateway neither.
    *[(who, ray, (8265, 10001, 6379, 52365)) for who in ANYBODY for ray in RAY],
    *[(who, "service's ray-head", (8000,)) for who in ("gateway", "internet", "another namespace", "any pod here")],
    *[(who, "service's ray-worker", (8000,)) for who in ("internet", "another namespace", "any pod here", "prometheus")],
    ("gateway", "ray-worker", (8000,)),
    ("gateway", "service's ray-worker", (8080, 9101)),
    ("operator", "ray-worker", (8265, 8000)),
    ("operator", "service's ray-head", (6379, 10001)),
    (SUBMITTER, "job's ray-head", (6379, 10001)),
    (SUBMITTER, "ray-worker", (8265,)),
    (SUBMITTER, "internet", (443,)),
    (SUBMITTER, "redis", (6379,)),
    *[(who, "redis", (6379,)) for who in (*ANYBODY, "mlflow", "operator")],
    *[(who, "mlflow", (5000,)) for who in (*ANYBODY, "ray-worker", "operator")],
    # What a cloud tells its machines.
    *[(ray, where, (80, 443)) for ray in (*RAY, "mlflow") for where in ("metadata", "metadata of ecs")],
    *[(ray, "internet", (22, 25, 80, 6379)) for ray in RAY],
    ("redis", "internet", (443,)),
    ("mlflow", "ray-head", (8265,)),
    ("any pod here", "internet", (443,)),
]  # fmt: skip

# Of the trial's own stores.
STORES_OPEN = [
    *[(who, "database", (5432,)) for who in (*RAY, "mlflow", "backup")],
    *[(who, "storage", (8333,)) for who in (*RAY, "mlflow")],
]
STORES_CLOSED = [
    *[(who, "database", (5432,)) for who in (*ANYBODY, SUBMITTER, "redis", "storage")],
    *[(who, "storage", (8333, 8080, 9333)) for who in (*ANYBODY, SUBMITTER, "backup")],
    ("ray-worker", "storage", (9333, 8888)),
    ("database", "internet", (443,)),
    ("storage", "internet", (443,)),
    ("backup", "internet", (443,)),
]


def flows(overlay: str) -> list[tuple[str, str, int, bool]]:
    stores = overlay == "overlays/kind"
    table = [(OPEN, True), (CLOSED, False)]
    table += [(STORES_OPEN, True), (STORES_CLOSED, False)] if stores else []
    return [
        (who, whom, port, passes) for rows, passes in table for who, whom, ports in rows for port in ports
    ]


@pytest.mark.parametrize("overlay", ["kind", "production", "gpu", "incremental-upgrade"])
def test_flows(overlay: str, overlays: dict[str, list[Document]]) -> None:
    documents = overlays[f"overlays/{overlay}"]
    known = ends(documents)
    wrong = [
        f"{who} → {whom}:{port} {'is not' if passes else 'is'} let through"
        for who, whom, port, passes in flows(f"overlays/{overlay}")
        if allowed(documents, known[who], known[whom], port) is not passes
    ]
    assert wrong == []


@pytest.mark.parametrize("overlay", ["kind", "production", "gpu"])
def test_everybody_may_ask_for_names(overlay: str, overlays: dict[str, list[Document]]) -> None:
    documents = overlays[f"overlays/{overlay}"]
    known = ends(documents)
    for name, end in known.items():
        if end.namespace == "whorl":
            assert allowed(documents, end, known["dns"], 53, "UDP"), name
            assert not allowed(documents, end, known["dns"], 5353, "UDP"), name


def test_each_policy_is_needed(overlays: dict[str, list[Document]]) -> None:
    """Without any one of them a flow of the table is another one: none is there for nothing, and the table sees each."""
    documents = overlays["overlays/kind"]
    known = ends(documents)
    table = flows("overlays/kind")
    names = [d["metadata"]["name"] for d in documents if d["kind"] == "NetworkPolicy"]
    assert len(names) == 13
    for name in names:
        if name == "names":
            continue
        left = [d for d in documents if (d["kind"], d["metadata"]["name"]) != ("NetworkPolicy", name)]
        assert any(
            allowed(left, known[who], known[whom], port) is not passes for who, whom, port, passes in table
        ), name
