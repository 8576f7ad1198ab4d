"""A cluster whose supervisor was killed: what it left is found by its session, and nothing else is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import local, nodes

# As vLLM's engine does: another title, which takes the place of the environment, and deaf to SIGTERM.
ENGINE = """
import setproctitle, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
setproctitle.setproctitle("VLLM::EngineCore")
print("up", flush=True)
time.sleep(600)
"""
SUPERVISOR = f"""
import subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", {ENGINE!r}], stdout=subprocess.PIPE)
engine.stdout.readline()
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cluster.json"
    monkeypatch.setattr(local, "STATE", path)
    monkeypatch.setattr("lib.command.STATE", path)
    monkeypatch.setattr(nodes, "temporary_folder", lambda: tmp_path / "ray")
    return path


@pytest.fixture
def killed(state: Path) -> Iterator[psutil.Process]:
    """The engine of a supervisor that was killed."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, start_new_session=True
    )
    assert supervisor.stdout is not None
    engine = psutil.Process(int(supervisor.stdout.readline()))
    started = psutil.Process(supervisor.pid).create_time()
    state.write_text(json.dumps({"pid": supervisor.pid, "started": started}))
    supervisor.kill()
    # Its end is waited for, and left to be seen: where no init reaps, a killed supervisor stays as a zombie.
    os.waitid(os.P_PID, supervisor.pid, os.WEXITED | os.WNOWAIT)
    yield engine
    supervisor.wait()
    if engine.is_running():
        engine.kill()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_down_ends_what_a_killed_supervisor_left(
    killed: psutil.Process, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert alive(killed)
    assert killed.environ() == {}
    stranger = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE)
    try:
        local.down()
        assert not alive(killed)
        assert "ended 1 processes" in capsys.readouterr().out
        assert stranger.poll() is None
        assert not state.exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_a_number_that_was_given_to_another_process_ends_nothing(state: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, start_new_session=True)
    try:
        state.write_text(json.dumps({"pid": other.pid, "started": time.time() - 1}))
        assert local.end_leftovers() == 0
        state.write_text(json.dumps({"pid": os.getsid(0), "started": psutil.boot_time() - 1}))
        assert local.end_leftovers() == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
