"""Manifests against the schemas of their kinds; a field that a schema does not know is an error.

Kubernetes' own kinds: kubernetes-validate carries their schemas. KubeRay's: its CRDs, which are too large to be kept here
(4 MB) and lie where WHORL_KUBERAY_CRDS says, or in ../shared/kuberay-crds. Other operators': other_kinds.yaml, by hand, only
what we use of them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema_rs import Draft202012Validator, Registry

# The oldest that is supported upstream beside KubeRay 1.6 and later, and the newest that there are schemas of.
VERSIONS = ("1.32", "1.37")
OTHER = Path(__file__).with_name("other_kinds.yaml")
KUBERAY = "ray.io"


def kuberay_crds() -> Path | None:
    """The folder of KubeRay's CRDs; None where there is none."""
    named = os.environ.get("WHORL_KUBERAY_CRDS")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared/kuberay-crds"
    return folder if any(folder.glob("ray.io_*.yaml")) else None


def is_kuberay(document: dict[str, Any]) -> bool:
    return str(document["apiVersion"]).startswith(f"{KUBERAY}/")


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, a line each; its kind must be one that has a schema."""
    kind, version = document["kind"], document["apiVersion"]
    if is_kuberay(document):
        return _told(_kuberay(kind, version), document)
    if (kind, version) in _others():
        return _told(_other(kind, version), document)
    return [f"{line} ({at})" for at in VERSIONS for line in _told(_core(kind, version, at), document)]


def _told(validator: Any, document: dict[str, Any]) -> list[str]:
    if validator is None:
        return [f"no schema of {document['apiVersion']} {document['kind']}"]
    found = []
    for error in validator.iter_errors(document):
        where = ".".join(map(str, error.instance_path)) or "."
        found.append(f"{where}: {error.message[:200]}")
    return found


@functools.cache
def _definitions(version: str) -> tuple[Any, Any]:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    return folder, Registry([("urn:kind:_definitions.json", definitions)])


@functools.cache
def _core(kind: str, version: str, kubernetes: str) -> Any:
    folder, registry = _definitions(kubernetes)
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
    file = folder / f"{kind.lower()}-{group}.json"
    if not file.is_file():
        return None
    text = file.read_text().replace('"_definitions.json', '"urn:kind:_definitions.json')
    return Draft202012Validator(json.loads(text), registry=registry)


@functools.cache
def _kuberay(kind: str, version: str) -> Any:
    folder = kuberay_crds()
    assert folder is not None, "the caller skips"
    file = folder / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        return None
    crd = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert crd["spec"]["names"]["kind"] == kind
    for one in crd["spec"]["versions"]:
        if f"{crd['spec']['group']}/{one['name']}" == version:
            return Draft202012Validator(strict(one["schema"]["openAPIV3Schema"]))
    return None


@functools.cache
def _others() -> dict[tuple[str, str], Any]:
    return {
        (one["kind"], one["apiVersion"]): one["spec"] for one in yaml.safe_load_all(OTHER.read_text()) if one
    }


@functools.cache
def _other(kind: str, version: str) -> Any:
    spec = _others()[kind, version]
    whole = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", *(["spec"] if spec else [])],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            **({"spec": spec} if spec else {}),
        },
    }
    return Draft202012Validator(strict(whole))


def strict(schema: Any, top: bool = True) -> Any:
    """An OpenAPI schema of a CRD as a JSON schema: what is not among the properties is refused, as the API server prunes it.

    Its own keywords: `x-kubernetes-preserve-unknown-fields` lets everything in, `x-kubernetes-int-or-string` is a number or a
    text, `nullable` lets null in. Rules in CEL (`x-kubernetes-validations`) are policies.py's.
    """
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: strict(one, False) for name, one in value.items()}
        elif key in ("items", "additionalProperties", "not"):
            found[key] = strict(value, False)
        elif key in ("allOf", "anyOf", "oneOf"):
            found[key] = [strict(one, False) for one in value]
        elif key not in ("format", "default", "description", "nullable") and not key.startswith("x-"):
            found[key] = value
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
    if top and "properties" in found:  # of every object, whatever its kind
        found["properties"]["metadata"] = METADATA
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in found and not open_ended:
        found["additionalProperties"] = False
    return found


METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "namespace": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
