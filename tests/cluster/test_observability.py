"""Dashboards and alert rules: they load, and every metric that they name is one that is exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.metrics import INSTRUMENTS, exported

FOLDER = Path("cluster/observability")
DASHBOARDS = sorted(FOLDER.glob("grafana/*.json"))
NAME = re.compile(r"\b(?:ray_[a-z0-9_]+|up\b)")
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here; Debian has it in the package prometheus"
)


def rays_own() -> set[str]:
    """Metrics that Ray's own dashboards show, and what Prometheus itself adds."""
    spec = find_spec("ray.dashboard.modules.metrics.dashboards")
    assert spec is not None
    assert spec.submodule_search_locations
    panels = Path(spec.submodule_search_locations[0]).glob("*_panels.py")
    return {"up"} | {name for file in panels for name in NAME.findall(file.read_text())}


def named(expression: str) -> set[str]:
    """The metrics of an expression of PromQL: what is quoted is a label's value."""
    return set(NAME.findall(re.sub(r'"[^"]*"', '""', expression)))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


def test_every_metric_that_is_named_is_exported() -> None:
    known = exported() | rays_own()
    expressions = {rule["alert"]: rule["expr"] for rule in rules()}
    for file in DASHBOARDS:
        dashboard = json.loads(file.read_text())
        for panel in panels(dashboard):
            for target in panel.get("targets", ()):
                expressions[f"{file.name}: {panel['title']} {target['refId']}"] = target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                expressions[f"{file.name}: ${variable['name']}"] = variable["definition"]
    unknown = {where: found for where, text in expressions.items() if (found := named(text) - known)}
    assert unknown == {}
    assert all(named(text) for text in expressions.values())
    # A quantile is of buckets, a rate of a counter or a histogram.
    assert not [where for where, text in expressions.items() if "quantile(" in text and "_bucket" not in text]
    shown = {name for text in expressions.values() for name in named(text)}
    ours = {f"ray_{name}" for name in INSTRUMENTS}
    assert {one for one in ours if not any(name.startswith(one) for name in shown)} == set()


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.name)
def test_a_dashboard_can_be_imported(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["title"]
    assert "id" not in dashboard, "an id belongs to one Grafana"
    found = list(panels(dashboard))
    numbers = [panel["id"] for panel in found]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)\b", file.read_text())) <= variables
    taken: set[tuple[int, int]] = set()
    for panel in found:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            refs = [target["refId"] for target in panel["targets"]]
            assert refs
            assert len(set(refs)) == len(refs)


def test_dashboards_differ_in_name_and_id() -> None:
    found = [json.loads(file.read_text()) for file in DASHBOARDS]
    assert len(found) == 2
    for key in ("uid", "title"):
        assert len({dashboard[key] for dashboard in found}) == len(found)


def test_every_rule_says_what_to_do_and_is_tested() -> None:
    tested = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    fires = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}
    found = rules()
    assert {rule["alert"] for rule in found} == fires
    for rule in found:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


@promtool
@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "rules.yaml"),
        ("check", "config", "prometheus.yaml"),
        ("test", "rules", "rules_test.yaml"),
    ],
    ids=" ".join,
)
def test_prometheus_takes_the_rules(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
