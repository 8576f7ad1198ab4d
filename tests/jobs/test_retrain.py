"""A round of feedback, and the pipeline whose last stage is another cluster's job: which commands they come to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import pipeline, retrain
from jobs.curate import curate
from lib import storage as files
from lib.artifacts import curated
from lib.settings import Settings, load_settings
from tests.jobs.test_curate import happened, labelled


@pytest.fixture
def config(tmp_path: Path, storage: Path) -> Path:
    values = {
        "name": "shop",
        "task": "sentiment",
        "data": {
            "source": "nowhere.csv",
            "labels": {"1": "very negative", "2": "positive"},
            "slices": {"department": "Department"},
        },
        "model": {"base": "sample://minilm-l6"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run; each ends well."""
    seen: list[list[str]] = []

    def ran(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", ran)
    return seen


def settings(config: Path) -> Settings:
    return load_settings(config)


def test_without_feedback_the_champion_stays(
    config: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    happened(1, {"inputs": ["a dress"]}, labelled("positive"))
    retrain.retrain(settings(config))
    assert commands == []
    assert "the champion stays" in capsys.readouterr().out


def test_what_was_curated_is_what_the_pipeline_reads(
    config: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    happened(1, {"inputs": ["a dress"]}, labelled("positive"), rating=1)
    curate(settings(config))
    monkeypatch.setattr(sys, "argv", ["jobs.retrain", "--config", str(config), "--training.epochs", "2"])
    retrain.retrain(settings(config))
    first, second = commands
    given = ["--config", str(config), "--training.epochs", "2"]
    assert first == [sys.executable, "-m", "jobs.curate", *given]
    assert second[: 3 + len(given)] == [sys.executable, "-m", "jobs.pipeline", *given]
    # Its words are those of the last file, and make a configuration of it.
    more = second[3 + len(given) :]
    assert more == files.read_json(curated("shop", "latest.json"))["words"]
    read = load_settings(config, more)
    assert isinstance(read.data.source, str)
    assert read.data.source.startswith(curated("shop"))
    assert files.exists(read.data.source)
    assert read.data.labels == ["very negative", "positive"]
    assert (read.data.columns.text, read.data.slices) == ("text", {})


def test_a_job_that_fails_ends_the_round(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened(1, {"inputs": ["a dress"]}, labelled("positive"), rating=1)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 3))
    with pytest.raises(SystemExit) as ended:
        retrain.retrain(settings(config))
    assert ended.value.code == 3


def test_the_last_stage_may_be_another_clusters_job(
    config: Path,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs.pipeline", "--config", "jobs/configs/reviews.yaml"])
    monkeypatch.setenv("WHORL_SERVICE", "http://service:8265")
    monkeypatch.setattr(pipeline, "ask", lambda _: pytest.fail("nobody answers here"))
    pipeline.pipeline(settings(config))
    *stages, last = commands
    assert [words[2] for words in stages] == [
        "jobs.preprocess",
        "jobs.finetune",
        "jobs.evaluate",
        "jobs.promote",
    ]
    assert Path(last[0]).name == "ray"
    assert last[1:] == [
        "job", "submit", "--address", "http://service:8265", "--",
        "python", "-m", "serve.deploy", "--config", "jobs/configs/reviews.yaml", "--serving.host", "0.0.0.0",
    ]  # fmt: skip
    assert "the service of http://service:8265 answers" in capsys.readouterr().out
    monkeypatch.delenv("WHORL_SERVICE")
    assert pipeline.stage("serve", "serve.deploy")[:3] == [sys.executable, "-m", "serve.deploy"]
