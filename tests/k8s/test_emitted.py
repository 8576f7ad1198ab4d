"""`python -m jobs.plan --emit k8s`: a job in the plan's layout and a service, held against schemas and rules as k8s/ is."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import plan
from lib.command import run, split_arguments
from lib.manifests import dump, patch
from lib.planner import hardware, layouts, manifests
from lib.planner.memory import GIB
from lib.settings import Settings, load_settings
from tests.k8s import policies, schemas
from tests.k8s.building import Document


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as far as the planner reads it: config.json and the header of its weights."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 100, **shape}))
    shapes = {
        "bert.embeddings.word_embeddings.weight": [100, 32],
        "bert.encoder.layer.0.output.dense.weight": [32, 64],
    }
    header = json.dumps(
        {name: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for name, s in shapes.items()}
    )
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return folder


@pytest.fixture
def config(tmp_path: Path, base: Path, storage: Path) -> Path:
    values = {
        "name": "my_tickets",
        "task": "sentiment",
        "data": {"source": str(tmp_path / "source.csv"), "labels": {1: "good", 2: "bad"}},
        "model": {"base": str(base), "max_length": 32},
        "training": {"cpus_per_worker": 2},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def emit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def emitted(config: Path | str, *more: str) -> tuple[str, list[Document]]:
        words = ["--config", str(config), "--emit", "k8s", *more]
        monkeypatch.setattr(sys, "argv", ["jobs.plan", *words])
        assert run(plan.plan, plan.words()) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        return text, list(yaml.safe_load_all(text))

    return emitted


def check(documents: list[Document]) -> None:
    for document in documents:
        assert policies.check(document) == []
        if schemas.kuberay_crds():
            assert schemas.problems(document) == []


def group(job: Document, name: str) -> Document:
    return next(g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == name)


def test_without_a_gpu_all_workers_are_in_one_pod(emit: Any, config: Path) -> None:
    text, (job, service) = emit(
        config, "--plan.accelerator", "this", "--plan.workers", "2", "--plan.zero_stage", "2"
    )
    check([job, service])
    assert text.startswith("# Of python -m jobs.plan: 2 workers, ZeRO-2, on this: ")
    assert (job["kind"], service["kind"]) == ("RayJob", "RayService")
    assert (job["metadata"]["name"], service["metadata"]["name"]) == (
        "my-tickets-finetune",
        "my-tickets-service",
    )
    (only,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (only["groupName"], only["replicas"], only["minReplicas"], only["maxReplicas"]) == ("cpu", 1, 1, 1)
    resources = only["template"]["spec"]["containers"][0]["resources"]
    # Two workers of two processors, and two more for the driver and what reads the data.
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"] == "6"
    assert "nvidia.com/gpu" not in resources["limits"]
    _, _, _, *words = job["spec"]["entrypoint"].split()
    path, overrides = split_arguments(words)
    read = load_settings(path, overrides)
    assert (read.training.workers, read.training.zero_stage, read.training.gpus_per_worker) == (2, 2, 0)
    assert read.training.resume == "auto"


def test_on_gpus_the_layout_says_how_many_pods_there_are(emit: Any, config: Path) -> None:
    more = ("--plan.accelerator", "l4", "--plan.workers", "8", "--plan.workers_per_host", "4")
    _, (job, service) = emit(
        config, *more, "--training.learning_rate", "1e-4", "--serving.gpus_per_replica", "0.5"
    )
    check([job, service])
    gpu = group(job, "gpu")
    assert (gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (2, 2, 2)
    container = gpu["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["resources"]["requests"]["cpu"] == "10"
    assert container["image"] == "ghcr.io/whorl/whorl:0.1.0-gpu"
    entrypoint = job["spec"]["entrypoint"]
    assert "--training.learning_rate 1e-4" in entrypoint, (
        "what the command line changed holds in the job, too"
    )
    assert "--training.gpus_per_worker 1" in entrypoint
    assert "plan." not in entrypoint
    served = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"]) for g in served] == [("cpu", 2), ("gpu", 1)]


def test_a_large_model_gets_the_memory_of_its_plan() -> None:
    values = {"name": "big", "task": "chat", "data": {"source": "s3://b/t.jsonl"}, "model": {"base": "x"}}
    wanted = {
        "architecture": "llama-70b",
        "accelerator": "h100",
        "workers": [16],
        "zero_stage": [3],
        "offload": ["optimizer"],
    }
    settings = Settings.model_validate({**values, "plan": {**wanted, "host_memory_gib": 2000}})
    (judged,) = layouts.report(settings, 10**9).judged
    best = judged.recommended
    assert best is not None
    job = manifests.ray_job(settings, best, "jobs/configs/big.yaml", {})
    check([job])
    gpu = group(job, "gpu")
    memory = policies.quantity(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    assert gpu["replicas"] == 2
    # Its workers and Ray's object store beside them.
    shared = next(v for v in gpu["template"]["spec"]["volumes"] if v["name"] == "shared-memory")
    left = float(memory) - float(policies.quantity(shared["emptyDir"]["sizeLimit"]))
    assert best.memory.host < left < 1.3 * best.memory.host
    assert best.memory.host > 400 * GIB
    assert "--training.offload optimizer" in job["spec"]["entrypoint"]
    assert manifests.pod_memory(best) == math.ceil(best.memory.host / GIB / 0.65)


@pytest.mark.parametrize("config", ["reviews", "finance", "ner", "movies", "shop_chat", "support_chat"])
def test_the_application_is_what_serve_deploy_deploys(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.artifacts import ModelRef
    from serve import deploy

    monkeypatch.setattr(deploy, "_runtime_env", dict)
    settings = load_settings(f"jobs/configs/{config}.yaml")
    theirs = deploy.application_config(settings, ModelRef(settings.name, 7))
    ours = manifests.application(settings)
    # That one serves a version, this one follows the alias; where files lie is in the pods' environment.
    assert theirs.pop("runtime_env") == {}
    assert theirs["args"].pop("version", 7) == 7
    if "deployments" in theirs:
        assert theirs["deployments"][0]["user_config"] == {"model": f"{settings.name}@7"}
        theirs["deployments"][0]["user_config"] = {"model": f"{settings.name}@champion"}
    assert ours == theirs


def test_the_service_has_this_application_alone(emit: Any, config: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    _, (_, service) = emit(config, "--plan.accelerator", "this")
    found = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [a.name for a in found.applications] == ["my_tickets"]
    assert found.http_options.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--plan.accelerator", "[l4, h100]"],
            "plan.accelerator has 2 (l4, h100); choose one: --plan.accelerator h100",
        ),
        (["--plan.accelerator", "h100", "--plan.architecture", "llama-7b"], "not plan.architecture"),
        (["--plan.emit", "helm", "--plan.accelerator", "h100"], "plan.emit"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str],
    says: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs.plan", "--config", str(config), "--emit", "k8s", *more])
    assert run(plan.plan, plan.words()) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_what_fits_nowhere_is_no_job(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "host_memory", lambda: 1e8)
    words = ["--config", str(config), "--emit=k8s", "--plan.accelerator", "this"]
    monkeypatch.setattr(sys, "argv", ["jobs.plan", *words])
    assert run(plan.plan, plan.words()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: on this none fits: ")


def test_outside_a_checkout_it_says_so(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manifests.storage, "PROJECT", tmp_path)
    words = ["--config", str(config), "--emit", "k8s", "--plan.accelerator", "this"]
    monkeypatch.setattr(sys, "argv", ["jobs.plan", *words])
    assert run(plan.plan, plan.words()) == 2
    assert "run it in a checkout" in capsys.readouterr().err


def test_it_is_one_command(config: Path) -> None:
    words = ["--config", str(config), "--plan.accelerator", "this", "--emit", "k8s"]
    done = subprocess.run([sys.executable, "-m", "jobs.plan", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [d["kind"] for d in yaml.safe_load_all(done.stdout)] == ["RayJob", "RayService"]


@pytest.mark.parametrize("name", ["a" * 63, "2024-reviews", "a_b-c", "x"])
def test_any_name_of_a_use_becomes_one_of_kubernetes(name: str) -> None:
    values = {"name": name, "task": "chat", "data": {"source": "t.jsonl"}, "model": {"base": "x"}}
    check([manifests.ray_service(Settings.model_validate(values))])


def test_patches() -> None:
    document = {"a": {"b/c": [1, 2, 3]}, "d": 1}
    patch(
        document,
        [
            {"op": "replace", "path": "/a/b~1c/1", "value": {"x": 1}},
            {"op": "remove", "path": "/d"},
            {"op": "add", "path": "/e", "value": []},
        ],
    )
    assert document == {"a": {"b/c": [1, {"x": 1}, 3]}, "e": []}
    for path in ("/nowhere/x", "/a/nothing", "/a/b~1c/9"):
        with pytest.raises((KeyError, IndexError)):
            patch(document, [{"op": "replace", "path": path, "value": 1}])


def test_texts_of_several_lines_are_shown_as_such() -> None:
    shared = {"x": 1}
    assert dump({"a": "b\nc\n", "d": [shared, shared]}) == "a: |\n  b\n  c\nd:\n  - x: 1\n  - x: 1\n"
