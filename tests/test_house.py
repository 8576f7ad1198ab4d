"""The house's own rules: what the README and the Makefile promise is there, the lock is whole, no host is named."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

FILES = [Path(f) for f in subprocess.run(["git", "ls-files"], capture_output=True, text=True).stdout.split()]
TEXTS = [f for f in FILES if f.is_file() and f.suffix in {".py", ".md", ".toml", ".yaml", ".lock", ""}]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_top_level_folders_are_the_fixed_ones() -> None:
    tops = {f.parts[0] for f in FILES if len(f.parts) > 1 and not f.parts[0].startswith(".")}
    assert tops <= {"cluster", "jobs", "serve", "lib", "tests", "k8s"}


@pytest.mark.skipif(not FILES, reason="not a git checkout")
def test_no_registry_host_is_named() -> None:
    pattern = re.compile(
        r"--(extra-)?index-url[ =]https?|--find-links|https?://[^ ]*(pypi|pythonhosted|download\.pytorch)"
    )
    assert [str(f) for f in TEXTS if f.name != "test_house.py" and pattern.search(f.read_text())] == []


def test_lock_holds_every_requirement_and_is_what_is_installed() -> None:
    locked = dict(
        line.split("==")
        for line in Path("requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
    names = {canonical(n): v for n, v in locked.items()}
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(r for extra in extras.values() for r in extra)]:
        name = canonical(re.split(r"[\[<>=]", requirement)[0])
        assert name in names, f"{name} is not in requirements.lock; make lock"
        assert version(name).split("+")[0] == names[name]


def test_the_lock_suits_the_oldest_python_too() -> None:
    """It is made on one Python 3.11, and some libraries want something more on an earlier one."""
    oldest = {"python_full_version": "3.11.0", "python_version": "3.11", "extra": ""}
    lines = Path("requirements.lock").read_text().splitlines()
    names = {canonical(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    wanted = {
        canonical(requirement.name): found.name
        # Not what setuptools carries with it, which is on the path once something imports it.
        for found in distributions(path=[sysconfig.get_path("purelib")])
        for requirement in map(Requirement, found.requires or [])
        if requirement.marker and "python" in str(requirement.marker) and requirement.marker.evaluate(oldest)
    }
    assert {name: by for name, by in wanted.items() if name not in names} == {}


def test_readme_commands_exist() -> None:
    text = Path("README.md").read_text()
    makefile = Path("Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.M):
        module = Path(f"tests/bench/{target.removeprefix('bench-').replace('-', '_')}.py")
        assert re.search(rf"^{target}:", makefile, re.M) or (
            target.startswith("bench-") and module.is_file()
        ), target
    for module in re.findall(r"python -m ((?:jobs|serve|cluster)\.\w+)", text):
        assert Path(module.replace(".", "/") + ".py").is_file(), module
    for path in re.findall(r"(?:cluster|jobs|serve)/[\w/]+\.yaml|cluster/Dockerfile", text):
        assert Path(path).is_file(), path
    given = set(re.findall(r"--build-arg (\w+)=", text))
    assert given == set(re.findall(r"^ARG (\w+)", Path("cluster/Dockerfile").read_text(), re.M)) - {
        "REVISION"
    }
    from ray.scripts.scripts import cli

    for command in re.findall(r"^(?:\.venv/bin/|RAY_\S+ \.venv/bin/)ray ([a-z-]+)", text, re.M):
        assert command in cli.commands, command
    for image in re.findall(r"\]\((\.github/[^)]+)\)", text):
        assert Path(image).is_file(), image


def test_readme_configurations_are_valid() -> None:
    from lib.settings import Settings
    from lib.tasks import load_task

    blocks = re.findall(r"```yaml\n(.*?)```", Path("README.md").read_text(), re.S)
    found = {}
    for block in blocks:
        settings = Settings.model_validate(yaml.safe_load(block))
        task = load_task(settings.task)
        assert task.columns(settings.data)
        found[settings.name] = task.classes(settings.data)
    assert found == {
        "tickets": ["angry", "calm", "happy"],
        "orders": ["O", "B-SKU", "I-SKU", "B-COLOUR", "I-COLOUR"],
        "wares": [],
        "helpdesk": [],
    }


def test_the_applications_of_the_demo_stand_side_by_side_as_serve_deploys_them() -> None:
    from lib.settings import load_settings

    (configs,) = re.findall(r"^CONFIG \?= (.*)$", Path("Makefile").read_text(), re.M)
    found = [load_settings(file) for file in configs.split()]
    served = yaml.safe_load(Path("serve/config.yaml").read_text())["applications"]
    assert {one.name: one.serving.route_prefix for one in found} == {
        one["name"]: one["route_prefix"] for one in served
    }
    assert len({one.serving.route_prefix for one in found}) == len(found)


def test_make_help_lists_every_documented_target() -> None:
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "stop", "test", "ui", "lock"):
        assert re.search(rf"^{target} ", shown, re.M)
