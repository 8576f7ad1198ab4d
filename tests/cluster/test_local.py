"""The local cluster and the main job as a user drives them: real commands on a copy of the tree.

One cluster serves all tests here, on ports of its own; the last test brings it down and looks for what
is left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster.ingress import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TREE = ("cluster", "jobs", "lib", "serve")
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Copy:
    """A checkout's copy, the ports of its cluster, and a small configuration of its own."""

    folder: Path
    ports: dict[str, int]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("WHORL_", "RAY_"))}
        return subprocess.run(
            words,
            cwd=self.folder,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def module(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", *words)

    def tool(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Ray's own command, in the environment that `cluster.local env` prints."""
        lines = self.module("cluster.local", "env").stdout.splitlines()
        environment = dict(line.removeprefix("export ").replace("'", "").split("=", 1) for line in lines)
        return self.run(str(SCRIPTS / name), *words, **environment)

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.tool("ray", "job", "submit", "--working-dir", ".", "--", *words)

    def key(self) -> str:
        made = self.module("serve.keys", "create", "--name", "test", "--scopes", "mine,reviews")
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    @property
    def up(self) -> list[str]:
        return [
            "cluster.local",
            "up",
            *(w for option, port in self.ports.items() for w in (option, str(port))),
        ]

    def processes(self) -> list[psutil.Process]:
        """Every process that works in this copy or has its cluster's folder on its command line."""
        state = self.folder / ".whorl" / "cluster.json"
        supervisor = psutil.Process(json.loads(state.read_text())["pid"])
        return [supervisor, *supervisor.children(recursive=True)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Copy]:
    folder = tmp_path_factory.mktemp("checkout")
    for name in TREE:
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # What is sent with a job is looked at twice by Ray, and must not change in between: .whorl does.
    shutil.copy(".gitignore", folder)
    # The telling word always has another ending: word pieces find it, the TF-IDF baseline never meets it
    # again, so that the gate holds.
    random = np.random.default_rng(0)
    rows = ["review,stars"]
    for i in range(600):
        ending = "".join(random.choice(list("abcdefghij"), 6))
        rows.append(f"the dress {'good' if i % 2 else 'awful'}{ending} fits fine,{5 if i % 2 else 1}")
    (folder / "mine.csv").write_text("\n".join(rows) + "\n")
    serving_port = free_port()
    (folder / "mine.yaml").write_text(
        f"""
name: mine
task: sentiment
data: {{source: {folder}/mine.csv, columns: {{text: review, label: stars}}, labels: {{1: bad, 5: good}}}}
model: {{base: {tiny_base}, max_length: 32}}
training: {{epochs: 6, learning_rate: 5e-3, tokens_per_batch: 128, cpus_per_worker: 0.5}}
promotion: {{min_gain: 0}}
serving: {{port: {serving_port}}}
"""
    )
    options = ("--port", "--dashboard-port", "--ui-port", "--metrics-port")
    ports = {option: free_port() for option in options}
    made = Copy(folder, ports)
    done = made.module(*made.up)
    assert done.returncode == 0, done.stderr
    yield made
    made.module("cluster.local", "down")


def test_up_is_idempotent_and_status_tells(copy: Copy) -> None:
    again = copy.module(*copy.up)
    assert again.returncode == 0
    assert "is up already" in again.stdout
    status = copy.module("cluster.local", "status")
    assert f"127.0.0.1:{copy.ports['--port']}, 8 logical CPUs" in status.stdout
    metrics = re.search(r"metrics +(http://\S+)", status.stdout)
    assert metrics

    def told() -> bytes:
        with suppress(OSError):  # its agent may be busy
            found: bytes = urllib.request.urlopen(metrics[1], timeout=10).read()
            return found
        return b""

    deadline = time.monotonic() + 60
    while b"ray_node_cpu_count{" not in told():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_dashboard_refuses_who_has_no_token(copy: Copy) -> None:
    url = f"http://127.0.0.1:{copy.ports['--dashboard-port']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=10)
    assert refused.value.code == 401


def test_submitted_job_works_and_a_failed_one_shows_its_exit_code_and_its_line(copy: Copy) -> None:
    fine = copy.submit("python", "-m", "jobs.preprocess", "--config", "mine.yaml")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert "fingerprint" in fine.stdout
    # Into the head's storage, not into the job's own temporary copy of the tree.
    assert list((copy.folder / ".whorl" / "datasets" / "mine").glob("*/manifest.json"))
    skipped = copy.module("jobs.preprocess", "--config", "mine.yaml")
    assert "skipped" in skipped.stdout
    wrong = copy.submit("python", "-m", "jobs.preprocess", "--config", "mine.yaml", "--data.limt", "3")
    said = wrong.stdout + wrong.stderr
    assert wrong.returncode != 0
    assert "exit code 2" in said
    assert "error: mine.yaml: unknown key 'data.limt'; did you mean 'limit'?" in said


@pytest.mark.parametrize(
    ("job", "said"), [("jobs.finetune", "best validation:"), ("jobs.evaluate", "macro-F1")]
)
def test_other_stages_are_submitted_alike(copy: Copy, job: str, said: str) -> None:
    done = copy.submit("python", "-m", job, "--config", "mine.yaml", "--training.epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout


def test_a_submitted_pipeline_goes_from_a_csv_to_answers(copy: Copy) -> None:
    done = copy.submit("python", "-m", "jobs.pipeline", "--config", "mine.yaml")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    for stage in ("preprocess", "finetune", "evaluate", "promote", "serve"):
        assert f"{stage} took" in done.stdout
    assert "API docs" in done.stdout
    assert "p50" in done.stdout
    port = (copy.folder / "mine.yaml").read_text().split("port: ")[1].split("}")[0]
    assert ask(int(port), copy.key()) == ["good", "bad"]


def test_serve_deploy_takes_the_shipped_file(copy: Copy) -> None:
    # The other port was chosen when Ray Serve started, and it has one for all applications.
    stopped = copy.tool("serve", "shutdown", "--yes")
    assert stopped.returncode == 0, stopped.stderr
    file, port = copy.folder / "serve" / "config.yaml", free_port()
    text = file.read_text()
    for shipped, here in (("port: 8000", f"port: {port}"), ("reviews@champion", "mine@champion")):
        assert text.count(shipped) == 1
        text = text.replace(shipped, here)
    file.write_text(text)
    done = copy.tool("serve", "deploy", "serve/config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 120
    key = copy.key()
    while isinstance(answer := ask(port, key), OSError) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert answer == ["good", "bad"], f"{answer!r}\n{copy.tool('serve', 'status').stdout}"
    # The file's chat model has no champion here: it says so, and stops nobody else.
    while "no champion of 'shop' yet" not in (status := copy.tool("serve", "status").stdout):
        assert time.monotonic() < deadline, status
        time.sleep(1)


def ask(port: int, key: str) -> list[str] | OSError:
    """The labels of a good and a bad review; why not, while the endpoint does not answer."""
    texts = ["the dress goodabcabc fits fine", "the dress awfulabcabc fits fine"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/sentiment",
        json.dumps({"inputs": texts}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return [result["label"] for result in json.load(reply)["results"]]
    except OSError as error:
        return error


def test_pipeline_stops_at_the_first_stage_that_fails(copy: Copy) -> None:
    done = copy.module("jobs.pipeline", "--config", "mine.yaml", "--data.columns.text", "revew")
    assert done.returncode == 2
    assert "pipeline stopped: preprocess ended with exit code 2" in done.stderr
    assert "did you mean 'review'" in done.stderr
    assert "finetune" not in done.stdout


def test_more_workers_than_slots(copy: Copy) -> None:
    words = ("--training.workers", "99", "--training.ignore_plan", "true")
    done = copy.module("jobs.finetune", "--config", "mine.yaml", *words)
    assert done.returncode == 2
    assert "training.workers 99 need 50.5 CPU slots" in done.stderr


def test_a_killed_replica_leaves_no_engine_behind(copy: Copy) -> None:
    (copy.folder / "orphan.py").write_text(
        """
import os, signal, subprocess, sys, time
import psutil, ray

ray.init()

@ray.remote
class Replica:
    def start(self):
        self.engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return os.getpid(), self.engine.pid

replica = Replica.remote()
pid, engine = ray.get(replica.start.remote())
assert psutil.Process(engine).is_running()
os.kill(pid, signal.SIGKILL)
deadline = time.monotonic() + 30
while psutil.pid_exists(engine) and time.monotonic() < deadline:
    time.sleep(0.2)
print("engine lives:", psutil.pid_exists(engine))
"""
    )
    done = copy.submit("python", "orphan.py")
    assert "engine lives: False" in done.stdout, done.stdout + done.stderr


def test_port_in_use_is_named_with_the_mend(tmp_path: Path, copy: Copy) -> None:
    other = tmp_path / "other"
    for name in TREE:
        shutil.copytree(name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = Copy(other, {}).module(
            "cluster.local", "up", "--port", str(free_port()), "--dashboard-port", str(port)
        )
    assert done.returncode == 2
    assert (
        f"error: port {port} is in use; end what uses it or choose another: --dashboard-port N" in done.stderr
    )
    assert not (other / ".whorl" / "cluster.json").exists()


def test_down_leaves_no_process_and_no_folder(copy: Copy) -> None:
    started = copy.processes()
    assert len(started) > 5
    done = copy.module("cluster.local", "down")
    assert done.returncode == 0, done.stderr
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    for port in copy.ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert "no cluster is up" in copy.module("cluster.local", "down").stdout
