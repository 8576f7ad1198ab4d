"""Runs in a real SQLite database: what is written, how they end, how they are found again."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from lib import registry, tracking
from lib.artifacts import ModelRef
from lib.errors import DataError, RegistryError
from lib.settings import load_settings
from lib.storage import publish
from tests.servers import Postgres

SETTINGS = load_settings("jobs/configs/reviews.yaml")


def test_run_holds_configuration_environment_and_metrics(storage: Path) -> None:
    with tracking.start_run("finetune", SETTINGS) as run:
        run.log_metrics({"train/loss": 0.5}, step=1)
        run.log_metrics({"train/loss": 0.25}, step=2)
    found = run.client.get_run(run.ref.id)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.learning_rate"] == str(SETTINGS.training.learning_rate)
    assert found.data.tags["kind"] == "finetune"
    assert found.data.tags["git_commit"]
    assert [m.value for m in run.client.get_metric_history(run.ref.id, "train/loss")] == [0.5, 0.25]
    names = {f.path for f in run.client.list_artifacts(run.ref.id)}
    assert {"config.yaml", "environment.json"} <= names
    config = Path(run.client.download_artifacts(run.ref.id, "config.yaml"))
    assert load_settings(config) == SETTINGS


def test_failed_run_keeps_its_one_line_and_is_not_found(storage: Path) -> None:
    with pytest.raises(DataError), tracking.start_run("finetune", SETTINGS) as run:
        raise DataError("row 3 is bad")
    assert run.client.get_run(run.ref.id).info.status == "FAILED"
    assert run.tags()["error"] == "row 3 is bad"
    with pytest.raises(RegistryError, match="no finished finetune run of 'reviews'"):
        tracking.find_run(SETTINGS, "finetune")


def test_latest_run_and_only_the_pipelines_own(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.start_run("finetune", SETTINGS):
        pass
    monkeypatch.setenv("WHORL_PIPELINE", "mine")
    with tracking.start_run("finetune", SETTINGS) as mine:
        pass
    monkeypatch.delenv("WHORL_PIPELINE")
    with tracking.start_run("finetune", SETTINGS) as last:
        pass
    assert tracking.find_run(SETTINGS, "finetune").ref == last.ref
    assert tracking.find_run(SETTINGS, "finetune", mine.ref.id).ref == mine.ref
    monkeypatch.setenv("WHORL_PIPELINE", "mine")
    assert tracking.find_run(SETTINGS, "finetune").ref == mine.ref


def test_a_run_that_failed_is_opened_again(storage: Path) -> None:
    with pytest.raises(DataError), tracking.start_run("finetune", SETTINGS) as run:  # noqa: PT012
        run.log_metrics({"train/loss": 0.5}, step=3)
        raise DataError("row 3 is bad")
    with tracking.start_run("finetune", SETTINGS):
        pass
    (found,) = tracking.unfinished_runs(SETTINGS, "finetune")
    assert found.ref == run.ref
    assert found.settings() == SETTINGS
    assert found.last_step("train/loss") == 3
    assert found.last_step("validation/loss") == -1
    with tracking.resume_run(found, SETTINGS):
        assert found.status() == "RUNNING"
        assert found.driver_is_alive()
        assert "error" not in found.tags()
    assert found.status() == "FINISHED"
    assert found.tags()["resumed"] == "1"
    assert {f.path for f in run.client.list_artifacts(run.ref.id, "resumed-1")} == {
        "resumed-1/config.yaml",
        "resumed-1/environment.json",
    }


def test_a_driver_that_ended_is_not_alive(storage: Path) -> None:
    with tracking.start_run("finetune", SETTINGS) as run:
        host, _, started = run.tags()["driver"].rsplit(":", 2)
        run.tag(driver=f"{host}:1:{started}")  # the number now belongs to another process
        assert not run.driver_is_alive()
        run.tag(driver=f"elsewhere:{os.getpid()}:{started}")
        assert not run.driver_is_alive()


def test_unknown_run_is_one_line_without_the_password(storage: Path) -> None:
    with pytest.raises(RegistryError, match="no run 'nothing'"):
        tracking.find_run(SETTINGS, "finetune", "nothing")


def test_machine_and_versions() -> None:
    machine = tracking.machine()
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert {"python", "ray", "torch", "deepspeed"} <= set(tracking.versions())


def _opened(url: str) -> None:
    os.environ["WHORL_DATABASE"] = url
    tracking.client()


def test_runs_and_versions_on_postgresql(
    postgres: Postgres, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.fresh()
    monkeypatch.setenv("WHORL_DATABASE", url)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_opened, args=(url,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    db = tracking.client()
    db.create_registered_model("reviews")
    for _ in range(2):
        db.create_model_version("reviews", source="nowhere")
    one, two = ModelRef("reviews", 1), ModelRef("reviews", 2)
    for ref in (one, two):
        with publish(ref.uri) as folder:
            (folder / "model.safetensors").write_bytes(b"x")
    assert registry.crown(one, None)
    assert registry.champion("reviews") == one
    assert not registry.crown(two, None)
    assert registry.crown(two, one)
    assert registry.roll_back("reviews", "worse") == (two, one)
