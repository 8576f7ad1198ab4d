"""The page's commands, as far as they go without a cluster: kubectl knows them, and what they name is there."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.k8s import policies, schemas, sizes
from tests.k8s.building import FOLDER, KUBECTL, OVERLAYS, ROOT, Document

PAGE = FOLDER / "README.md"
TEXT = PAGE.read_text()
# Names that KubeRay gives to what it makes of ours.
BY_KUBERAY = {"service/whorl-service-serve-svc", "service/whorl-service-head-svc", "job/whorl-restore"}
TOOLS = ("kubectl", "kind", "docker", "helm", "curl", "python", "git")


def commands() -> list[str]:
    """Every line of a fenced block, and every command between backticks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        found += block.replace("\\\n", " ").strip().splitlines()
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    found += [
        " ".join(one.split())
        for one in re.findall(r"`([^`]+)`", prose)
        if one.split()[0] in TOOLS and " " in one
    ]
    return found


def words(command: str) -> list[str]:
    """Without what the shell makes of it: variables, pipes, redirections, another command's output."""
    inner = re.sub(r"^\w+=\$\((.*)\)$", r"\1", command.strip())
    inner = re.sub(r"\$\([^)]*\)", "VALUE", inner)
    inner = re.split(r" [|>] | & *$", inner + " ")[0].rstrip("& ")
    return [word.replace("$HEAD", "pod/head").replace("$KEY", "key") for word in shlex.split(inner)]


COMMANDS = [words(command) for command in commands()]
KUBECTLS = [one for one in COMMANDS if one[0] == "kubectl"]


def test_the_page_has_its_commands() -> None:
    tools = {one[0] for one in COMMANDS}
    assert tools == {"kind", "docker", "helm", "kubectl", "curl", "python", "git"}
    assert len(KUBECTLS) > 30
    for heading in ("On one machine: kind", "On a real cluster", "How large", "What it costs", "Upgrade, and back",
                    "Backup, and restore", "When something is wrong"):  # fmt: skip
        assert f"\n## {heading}\n" in TEXT


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl here: its commands are not parsed")
@pytest.mark.parametrize("command", sorted({" ".join(map(shlex.quote, one)) for one in KUBECTLS}))
def test_kubectl_knows_the_command(command: str) -> None:
    """`--help` is answered once the subcommand is known; an unknown flag before it is an error of its own."""
    one = shlex.split(command)
    inside = one[: one.index("--")] if "--" in one else one
    verb = [word for word in inside[1:] if word != "-n"]
    shown = subprocess.run(
        [*inside, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "KUBECONFIG": os.devnull},
    )
    assert shown.returncode == 0, shown.stderr
    assert "Usage:" in shown.stdout
    assert "Usage:\n  kubectl [flags]" not in shown.stdout, f"no subcommand {verb}"
    flags = {word.split("=")[0] for word in inside if word.startswith("-") and len(word) > 1} - {"-n"}
    known = set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", shown.stdout))
    assert flags <= known, f"kubectl {verb[0]} has no {flags - known}"


@pytest.mark.parametrize("one", COMMANDS, ids=lambda one: " ".join(one)[:80])
def test_what_a_command_names_is_there(one: list[str]) -> None:
    for flag, path in pairwise(one):
        if flag == "-k":
            assert path.removeprefix("k8s/") in OVERLAYS, path
        if flag in ("-f", "--values", "--file", "--config") and path != "mine.yaml" and "/" in path:
            assert (ROOT / path).exists(), path
        if flag == "-m":
            assert (ROOT / (path.replace(".", "/") + ".py")).is_file(), path


def test_a_stage_that_is_chosen_is_there(overlays: dict[str, list[Document]]) -> None:
    for one in KUBECTLS:
        if "create" in one and "-k" in one:
            jobs = overlays[one[one.index("-k") + 1].removeprefix("k8s/")]
            key, _, stage = one[one.index("-l") + 1].partition("=")
            assert [d for d in jobs if d["metadata"]["labels"].get(key) == stage], one


def test_objects_that_are_named_are_there(overlays: dict[str, list[Document]]) -> None:
    every = {
        f"{d['kind'].lower()}/{d['metadata']['name']}" for documents in overlays.values() for d in documents
    }
    named = set(re.findall(r"\b((?:service|rayjob|cronjob|deployment|job)/[a-z][a-z0-9-]+)", TEXT))
    named |= {
        f"{kind}/{name}"
        for kind, name in re.findall(
            r"\b(secret|rayservice|raycronjob|rayjob|deployment) (whorl-[a-z-]+|finetune)\b", TEXT
        )
    }
    assert len(named) > 6
    assert named - every - BY_KUBERAY == set()
    labels = {
        (key, value)
        for documents in overlays.values()
        for document in documents
        for key, value in _labels(document)
    }
    for selector in re.findall(r"-l ([a-z./-]+=[\w./=,-]+)", TEXT):
        for pair in selector.split(","):
            key, _, value = pair.partition("=")
            assert (key, value) in labels, pair


def _labels(value: object) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    if isinstance(value, dict):
        for key, one in value.items():
            if isinstance(one, str):
                found.add((str(key), one))
            found |= _labels(one)
    elif isinstance(value, list):
        for one in value:
            found |= _labels(one)
    return found


def test_namespaces_are_let_in_by_the_labels_of_the_policies() -> None:
    text = (FOLDER / "base/network.yaml").read_text()
    for label in re.findall(r"label namespace \S+ (\S+)", TEXT):
        key, _, value = label.partition("=")
        assert f"{{{key}: {value}}}" in text


def test_the_four_secrets_are_those_that_pods_have() -> None:
    made = re.findall(r"create secret generic (\S+)((?: --from-literal=\S+)+)", TEXT)
    found = {name: set(re.findall(r"--from-literal=(\w+)=", keys)) for name, keys in made}
    stored: dict[str, set[str]] = {}
    for document in yaml.safe_load_all((FOLDER / "components/external-secrets/secrets.yaml").read_text()):
        if document["kind"] == "ExternalSecret":
            keys = {one["secretKey"] for one in document["spec"]["data"]}
            stored[document["spec"]["target"]["name"]] = keys
    assert found == stored


def test_files_that_the_text_names_are_there() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:yaml|py|env))`", prose):
        places = [
            ROOT / name,
            FOLDER / name,
            FOLDER / "overlays/production" / name,
            ROOT / "ray-operator" / name,
        ]
        assert any(place.exists() for place in places), name
    for folder in re.findall(r"^\| `(\w+)/` \|", prose, re.M):
        assert (FOLDER / folder).is_dir(), folder
    for path in re.findall(r"`((?:components|overlays|base|queues|k8s)/[\w/-]+)`", prose):
        assert (FOLDER / path).exists() or (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http)([^)]+)\)", prose):
        assert (FOLDER / link).exists(), link


def test_sizes_are_what_the_command_prints(overlays: dict[str, list[Document]]) -> None:
    (command,) = (one for one in COMMANDS if "tests.k8s.sizes" in one)
    assert f"\n{sizes.table(command[3:], overlays.__getitem__)}\n" in TEXT


def test_costs_are_what_the_command_prints() -> None:
    from jobs import plan
    from lib.command import run

    (command,) = (one for one in COMMANDS if "--plan.price" in one)
    said = io.StringIO()
    with redirect_stdout(said):
        assert run(plan.plan, command[3:]) == 0
    assert said.getvalue().partition("Recommended\n\n")[2] in TEXT


def test_versions_of_the_page() -> None:
    tags = set(re.findall(r"ghcr\.io/whorl/whorl:(\S+)", TEXT))
    release = yaml.safe_load((FOLDER / "components/release/kustomization.yaml").read_text())
    images = {image["name"]: image["newTag"] for image in release["images"]}
    assert tags == {images["ghcr.io/whorl/whorl"]}
    assert schemas.VERSIONS[0] in TEXT
    restore = yaml.safe_load((FOLDER / "restore.yaml").read_text())
    (container,) = restore["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"postgres:{images['postgres']}"
    assert schemas.problems(restore) == []
    assert policies.check(restore) == []


def test_ten_failures_and_how_they_are_seen() -> None:
    table = TEXT.partition("\n| what | what shows it | what to do |\n")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 10
    for _, shows, _ in rows:
        assert shows.startswith("`kubectl ")
    asked = (
        "placement group",
        "object store",
        "image",
        "unknown field",
        "head",
        "401",
        "Kueue",
        "PVC",
        "probes",
        "OOMKilled",
    )
    for row, word in zip(rows, asked, strict=True):
        assert word in row[0]


def test_feature_gates_are_those_that_manifests_need(overlays: dict[str, list[Document]]) -> None:
    gates = {
        g["name"]
        for g in yaml.safe_load((FOLDER / "kuberay.yaml").read_text())["featureGates"]
        if g["enabled"]
    }
    every = [document for documents in overlays.values() for document in documents]
    assert ("RayCronJob" in gates) == any(d["kind"] == "RayCronJob" for d in every)
    assert ("RayJobDeletionPolicy" in gates) == any("deletionStrategy" in d.get("spec", {}) for d in every)
    assert ("RayServiceIncrementalUpgrade" in gates) == any(
        d.get("spec", {}).get("upgradeStrategy", {}).get("type") == "NewClusterWithIncrementalUpgrade"
        for d in every
    )


def test_nothing_of_a_machine_is_named() -> None:
    from cluster.kubernetes import IMAGE as CODE

    for file in FOLDER.rglob("*"):
        if file.is_file():
            for path in re.findall(r"(?<![\w.$:/*}])/(?:work|root|home)/\w+[\w/]*", file.read_text()):
                assert path.startswith("/home/whorl"), f"{file.name}: {path}"
    assert str(CODE) in (FOLDER / "cluster/raycluster.yaml").read_text()
    assert Path(PAGE).is_file()
