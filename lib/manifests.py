"""Manifests of Kubernetes as text, and changes of them: YAML as it is written, and JSON Patch as kustomize applies it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# A text of several lines is shown as such.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def dump(value: Any) -> str:
    """As YAML, in the order given."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def patch(document: Any, steps: list[dict[str, Any]]) -> None:
    """Change `document` by a JSON Patch (RFC 6902) of the operations add, replace and remove.

    Raises KeyError or IndexError for a path that is not there.
    """
    for step in steps:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"][1:].split("/"))
        place = document
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        key: Any = int(last) if isinstance(place, list) else last
        if step["op"] != "add":
            place[key]
        if step["op"] == "remove":
            del place[key]
        else:
            place[key] = copy.deepcopy(step["value"])


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping that names an image, wherever it stands in a manifest."""
    if isinstance(value, list):
        for one in value:
            yield from containers(one)
    elif isinstance(value, dict):
        if isinstance(value.get("image"), str):
            yield value
        for one in value.values():
            yield from containers(one)
