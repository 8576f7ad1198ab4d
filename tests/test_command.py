"""Commands: exit codes and one line on standard error, from real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.ingress import free_port
from lib.command import run, split_arguments
from lib.errors import ConfigError, GateError
from lib.settings import Settings


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "job",
    [
        "jobs.preprocess",
        "jobs.finetune",
        "jobs.evaluate",
        "jobs.promote",
        "jobs.curate",
        "jobs.score",
        "jobs.index",
        "jobs.pipeline",
        "jobs.retrain",
        "serve.deploy",
    ],
)
def test_every_command_explains_itself_and_refuses_an_unknown_key(job: str) -> None:
    shown = command(job, "--help")
    assert shown.returncode == 0
    assert f"python -m {job} --config" in shown.stdout
    wrong = command(job, "--config", "jobs/configs/reviews.yaml", "--training.epoch", "1")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines() == [
        "error: jobs/configs/reviews.yaml: unknown key 'training.epoch'; did you mean 'epochs'?"
    ]


def test_arguments() -> None:
    assert split_arguments(["--a", "1", "--config", "x.yaml"]) == ("x.yaml", ["--a", "1"])
    assert split_arguments(["--config=x.yaml"]) == ("x.yaml", [])
    with pytest.raises(ConfigError, match="--config FILE is missing"):
        split_arguments(["--a", "1"])


def test_exit_code_of_an_error_and_of_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def gate(_: Settings) -> None:
        raise RuntimeError("ray") from GateError("not good enough")

    def bug(_: Settings) -> None:
        raise KeyError("x")

    words = ["--config", "jobs/configs/reviews.yaml"]
    assert run(gate, words) == 3
    assert capsys.readouterr().err == "error: not good enough\n"
    with pytest.raises(KeyError):
        run(bug, words)


def test_a_cluster_that_is_gone_is_told_at_once() -> None:
    gone = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", "from lib.command import connect; connect()"],
        env={**os.environ, "RAY_ADDRESS": gone}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f"no Ray cluster answers at {gone}; python -m cluster.local up starts one" in done.stderr
