"""NetworkPolicies, evaluated: who reaches whom, as https://kubernetes.io/docs/concepts/services-networking/network-policies/
says it. A connection is let through where the policies of the one who asks let it out and those of the other let it in."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.k8s.building import Document


@dataclass(frozen=True)
class End:
    """A pod, or with neither labels nor a namespace an address outside the cluster."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    namespace_labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.0.0.1"
    ports: dict[str, int] = field(default_factory=dict)
    """Names of a pod's ports."""

    @property
    def is_pod(self) -> bool:
        return bool(self.namespace)

    @property
    def of_namespace(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace, **self.namespace_labels}


def allowed(policies: Iterable[Document], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` reaches this port of `target`."""
    policies = [policy for policy in policies if policy["kind"] == "NetworkPolicy"]
    out = _passes(policies, "Egress", source, target, target, port, protocol)
    return out and _passes(policies, "Ingress", target, source, target, port, protocol)


def _passes(
    policies: list[Document], side: str, subject: End, other: End, target: End, port: int, protocol: str
) -> bool:
    """Whether the policies that select `subject` let it speak to `other`; without one, everything is let through."""
    if not subject.is_pod:
        return True
    ours = [policy for policy in policies if _is_about(policy, subject) and side in _sides(policy["spec"])]
    if not ours:
        return True
    peers = "to" if side == "Egress" else "from"
    return any(
        _peers(rule.get(peers), other, policy["metadata"].get("namespace", "default"))
        and _ports(rule.get("ports"), target, port, protocol)
        for policy in ours
        for rule in policy["spec"].get(side.lower()) or ()
    )


def _is_about(policy: Document, end: End) -> bool:
    inside = policy["metadata"].get("namespace", "default") == end.namespace
    return inside and selects(policy["spec"]["podSelector"], end.labels)


def _sides(spec: Document) -> list[str]:
    """Without policyTypes: Ingress always, Egress where there are rules of it."""
    given: list[str] = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    return given


def _peers(peers: list[Document] | None, other: End, namespace: str) -> bool:
    """None and an empty list let everybody through."""
    return not peers or any(_peer(peer, other, namespace) for peer in peers)


def _peer(peer: Document, other: End, namespace: str) -> bool:
    if "ipBlock" in peer:
        block, address = peer["ipBlock"], ipaddress.ip_address(other.address)
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(one) for one in block.get("except", ())
        )
    if not other.is_pod:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], other.of_namespace):
            return False
    elif other.namespace != namespace:
        return False
    return selects(peer.get("podSelector", {}), other.labels)


def _ports(ports: list[Document] | None, target: End, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for one in ports:
        if one.get("protocol", "TCP") != protocol:
            continue
        wanted = one.get("port")
        number = target.ports.get(wanted) if isinstance(wanted, str) else wanted
        if wanted is None or (number is not None and number <= port <= one.get("endPort", number)):
            return True
    return False


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """A label selector; an empty one selects everything."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(_matches(one, labels) for one in selector.get("matchExpressions", ()))


def _matches(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise ValueError(f"no operator {expression['operator']}")
