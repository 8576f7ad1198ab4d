"""Killed and gone on with: a worker, the driver, a full disk. Every kill here is a real one.

Tolerance: none. On fp32 CPU a run that was killed and went on with as many workers gives the losses, the
validation figures and the exported weights of a run that was not, bit for bit.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from lib import storage as files
from lib import tracking
from lib.artifacts import DatasetRef
from lib.data.plan import plan
from lib.errors import ConfigError, RegistryError, ResourceError, StorageError
from lib.settings import Settings, TrainingSettings
from lib.training import checkpoints, resume
from lib.training.fit import Fit, fit
from tests.trained import make_dataset, use

# Only what hangs comes to it.
WAIT_SECONDS = 300
EPOCHS, ROWS = 4, 480


def settings_for(base: Path, **training: object) -> Settings:
    """Several windows an epoch, dropout (so that random states count), a checkpoint inside each epoch."""
    values = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "epochs": EPOCHS,
        "learning_rate": 1e-3,
        "tokens_per_batch": 128,
        "accumulation": 2,
        "shuffle_rows": 96,
        "precision": "fp32",
        "log_every": 3,
        "patience": None,
        "metric": "loss",
        "checkpoint_every": 5,
        "max_failures": 2,
    }
    return use(base).model_copy(update={"training": TrainingSettings.model_validate(values | training)})


@pytest.fixture(scope="module", autouse=True)
def quick_commits() -> Iterator[None]:
    """Ray Train commits what was uploaded when it next looks at its workers: every 2 s, here sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        yield


Whole = Callable[[int], Fit]


@pytest.fixture(scope="module")
def unkilled(ray_cluster: None, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Stage → what a run that nothing happened to comes to; each is trained once."""
    folder = tmp_path_factory.mktemp("unkilled")

    @functools.cache
    def of(stage: int) -> Fit:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WHORL_STORAGE", str(folder / f"stage-{stage}"))
            patch.setenv("WHORL_DATABASE", f"sqlite:///{folder}/whorl.db")
            settings = settings_for(tiny_base, zero_stage=stage)
            return train(settings, make_dataset(settings, rows=ROWS))

    return of


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_SECONDS} s for {what}")
        time.sleep(0.01)


def whole_checkpoints(folder: str) -> list[str]:
    try:
        return checkpoints.committed(folder)
    except StorageError:  # Ray is writing its record
        return []


def train_workers() -> list[psutil.Process]:
    """The Ray Train workers of this process's own Ray, by the order in which they were started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            names = [" ".join(p.cmdline()) for p in (process, *process.parents()[:1])]
            # Not a program that a worker calls, which has the worker's name until it begins.
            if ["RayTrainWorker" in name for name in names] == [True, False]:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda p: p.create_time())


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Run `action` in a thread beside the block; what it raises is raised after the block."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(WAIT_SECONDS)
    if raised:
        raise raised[0]


def kill_a_worker(folder: str, index: int) -> None:
    """SIGKILL one of the two workers once a checkpoint is committed."""
    wait_for(lambda: whole_checkpoints(folder), "a checkpoint")
    workers = train_workers()
    assert len(workers) == 2
    workers[index].kill()


def train(settings: Settings, dataset: DatasetRef, run: tracking.Run | None = None) -> Fit:
    opened = tracking.resume_run(run, settings) if run else tracking.start_run("finetune", settings)
    with opened as run:
        run.tag(dataset=dataset.fingerprint)
        return fit(settings, dataset, run)


def assert_same(one: Fit, other: Fit) -> None:
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in one.summary["history"]] == [
        (r["step"], r["loss"], r["learning_rate"]) for r in other.summary["history"]
    ]
    for key in ("steps", "rows", "tokens", "best", "validations"):
        assert one.summary[key] == other.summary[key]
    weights, others = (
        load_file(f"{f.model_uri.removeprefix('file://')}/model.safetensors") for f in (one, other)
    )
    assert weights.keys() == others.keys()
    assert all(weights[name].equal(others[name]) for name in weights)


def assert_one_curve(run: tracking.Run, summary: dict) -> None:
    logged = [m.step for m in run.client.get_metric_history(run.ref.id, "train/loss")]
    assert sorted(logged) == sorted({r["step"] for r in summary["history"]})
    measured = [m.step for m in run.client.get_metric_history(run.ref.id, "validation/loss")]
    assert measured == [v["step"] for v in summary["validations"]]


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(unkilled: Whole, database: Path, tiny_base: Path) -> None:
    settings = settings_for(tiny_base, zero_stage=3)
    dataset = make_dataset(settings, rows=ROWS)
    whole = unkilled(3)
    assert whole.summary["resumed"] == []
    with (
        tracking.start_run("finetune", settings) as run,
        meanwhile(lambda: kill_a_worker(checkpoints.run_folder(run.ref), 0)),
    ):
        killed = fit(settings, dataset, run)
    (at,) = killed.summary["resumed"]
    assert 0 < at < whole.summary["steps"]
    assert_same(killed, whole)
    assert_one_curve(run, killed.summary)
    assert not files.exists(run.ref.checkpoints_uri)


@pytest.mark.slow
@pytest.mark.long
def test_too_many_kills_end_in_one_line_and_fewer_workers_go_on(
    ray_cluster: None, database: Path, tiny_base: Path
) -> None:
    settings = settings_for(tiny_base, zero_stage=3, max_failures=0)
    dataset = make_dataset(settings, rows=ROWS)
    with pytest.raises(ResourceError) as told, tracking.start_run("finetune", settings) as run:  # noqa: PT012
        run.tag(dataset=dataset.fingerprint)
        with meanwhile(lambda: kill_a_worker(checkpoints.run_folder(run.ref), 1)):
            fit(settings, dataset, run)
    assert f"go on with --training.resume {run.ref.id}" in str(told.value)
    assert run.status() == "FAILED"

    alone = settings_for(tiny_base, zero_stage=3, workers=1, resume="auto")
    found = resume.find(alone, dataset)
    assert found is not None
    assert found.ref == run.ref
    state = checkpoints.latest_state(checkpoints.run_folder(run.ref))
    fitted = train(alone, dataset, found)
    summary = fitted.summary
    assert summary["resumed"] == [state.step]
    assert run.status() == "FINISHED"
    assert "error" not in run.tags()
    # The history before is kept, the epochs are as many, and no row is seen twice or left out.
    assert [v["epoch"] for v in summary["validations"]] == list(range(1, EPOCHS + 1))
    assert summary["rows"] == EPOCHS * ROWS
    assert summary["history"][: len(state.history)] == state.history
    assert summary["history"][-1]["epoch"] == pytest.approx(EPOCHS)
    assert_one_curve(run, summary)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_only_lacks_its_export_is_not_trained_again(
    ray_cluster: None, database: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A number of steps ends it, with a validation there and one before.
    settings = settings_for(
        tiny_base, epochs=50, max_steps=6, validate_every=3, keep_checkpoints=2, checkpoint_every="validation"
    )
    dataset = make_dataset(settings, rows=120)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lib.training.fit.export", interrupted)
        with pytest.raises(KeyboardInterrupt), tracking.start_run("finetune", settings) as run:  # noqa: PT012
            run.tag(dataset=dataset.fingerprint)
            fit(settings, dataset, run)
    assert run.status() == "KILLED"
    state = checkpoints.latest_state(checkpoints.run_folder(run.ref))
    assert len(checkpoints.committed(checkpoints.run_folder(run.ref))) == 2
    again = train(settings, dataset, run)
    assert again.summary["resumed"] == [state.step]
    assert again.summary["steps"] == state.step == 6
    assert [v["step"] for v in again.summary["validations"]] == [3, 6]
    assert again.summary["history"] == state.history
    assert files.published(run.ref.model_uri)


DISK_MIB = 8


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of a few MiB that holds the storage root; the database lies elsewhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "whorl-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    monkeypatch.setenv("WHORL_STORAGE", str(folder / "whorl"))
    monkeypatch.setenv("WHORL_DATABASE", f"sqlite:///{tmp_path / 'whorl.db'}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_full_disk_is_one_line_and_goes_on_with_space(
    unkilled: Whole, small_disk: Path, tiny_base: Path
) -> None:
    settings = settings_for(tiny_base)
    dataset = make_dataset(settings, rows=ROWS)
    filler = small_disk / "filler"

    def fill(folder: str) -> None:
        wait_for(lambda: whole_checkpoints(folder), "a checkpoint")
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                pass

    with pytest.raises(StorageError) as told, tracking.start_run("finetune", settings) as run:  # noqa: PT012
        run.tag(dataset=dataset.fingerprint)
        folder = checkpoints.run_folder(run.ref)
        with meanwhile(lambda: fill(folder)):
            fit(settings, dataset, run)
    line = str(told.value)
    assert "no space left for a checkpoint at " in line
    assert str(small_disk) in line
    assert f"free some space, then go on with --training.resume {run.ref.id}" in line
    filler.unlink()
    checkpoints.mend_record(folder)
    state = checkpoints.latest_state(folder)
    assert state is not None
    for name in checkpoints.committed(folder):
        assert {"engine", "loop.json", "worker_00000.json", "worker_00001.json"} <= set(
            files.ls(files.join(folder, name))
        )
    resumed = train(settings, dataset, run)
    assert resumed.summary["resumed"] == [state.step]
    assert_same(resumed, unkilled(2))


def drive(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """jobs.finetune as a user starts it, with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.finetune", "--config", str(folder / "shop.yaml"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(driver: subprocess.Popen[str]) -> None:
    """SIGKILL a driver, and what of its Ray has not followed it after a while."""
    own = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    psutil.wait_procs(own, timeout=5)
    for process in own:
        if process.is_running():
            process.kill()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_with_resume(
    unkilled: Whole, database: Path, tiny_base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "shop.csv"
    source.write_text("text,label,department\nfits,positive,tops\n")
    values = settings_for(tiny_base).model_dump(mode="json")
    values["data"]["source"] = str(source)
    settings = Settings.model_validate(values)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(values))
    dataset = make_dataset(settings, plan(settings).ref.fingerprint, rows=ROWS)

    with tempfile.TemporaryDirectory(prefix="whorl-", dir="/tmp") as ray_folder:
        environment = {**os.environ, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"}
        driver = drive(tmp_path, environment)
        run_id = next(line for line in driver.stdout if line.startswith("run ")).split()[1].rstrip(":")
        run = tracking.find_run(settings, "finetune", run_id)
        folder = checkpoints.run_folder(run.ref)
        wait_for(lambda: whole_checkpoints(folder) or driver.poll() is not None, "a checkpoint")
        with pytest.raises(RegistryError, match="is being trained by another process"):
            resume.check(run, settings, dataset)
        kill(driver)
        assert run.status() == "RUNNING"
        assert not files.exists(run.ref.model_uri)
        at = checkpoints.latest_state(folder).step

        again = drive(tmp_path, environment, "--training.resume", run_id)
        out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert f"goes on from the checkpoint of step {at}" in out
    assert run.status() == "FINISHED"
    assert run.tags()["resumed"] == "1"
    summary = json.loads(files.read_bytes(files.join(run.artifacts_uri(), "training.json")))
    assert summary["resumed"] == [at]
    assert_one_curve(run, summary)
    assert_same(Fit(run.ref.model_uri, summary), unkilled(2))
    with pytest.raises(RegistryError, match=r"is finished, its model is .*; start a new run"):
        resume.check(run, settings, dataset)


@pytest.fixture
def failed(database: Path, tiny_base: Path) -> tuple[tracking.Run, Settings, DatasetRef]:
    settings = settings_for(tiny_base)
    dataset = DatasetRef(settings.name, "0123456789abcdef")
    with pytest.raises(RuntimeError), tracking.start_run("finetune", settings) as run:  # noqa: PT012
        run.tag(dataset=dataset.fingerprint)
        raise RuntimeError("killed")
    return run, settings, dataset


def resuming(settings: Settings, run_id: str, **training: object) -> Settings:
    values = settings.training.model_dump() | training | {"resume": run_id}
    return settings.model_copy(update={"training": TrainingSettings.model_validate(values)})


Failed = tuple[tracking.Run, Settings, DatasetRef]


def test_what_may_change_and_what_may_not(failed: Failed) -> None:
    run, settings, dataset = failed
    free = resuming(settings, run.ref.id, workers=[1, 4], checkpoint_every="validation", keep_checkpoints=3)
    assert resume.find(free, dataset).ref == run.ref
    changed = resuming(settings, run.ref.id, learning_rate=0.5, zero_stage=1)
    with pytest.raises(
        ConfigError,
        match=r"differs: training.learning_rate 0.001 there, 0.5 here; training.zero_stage 2 there, 1 here; chang",
    ):
        resume.find(changed, dataset)
    with pytest.raises(ConfigError, match="dataset 0123456789abcdef there, fedcba9876543210 here"):
        resume.find(resuming(settings, run.ref.id), DatasetRef(settings.name, "fedcba9876543210"))


def test_unknown_and_foreign_runs(failed: Failed) -> None:
    _, settings, dataset = failed
    with pytest.raises(RegistryError, match="no run 'nothing'"):
        resume.find(resuming(settings, "nothing"), dataset)
    with tracking.start_run("evaluate", settings) as other:
        pass
    with pytest.raises(RegistryError, match=r"is of jobs.evaluate, not of jobs.finetune; start a new run"):
        resume.find(resuming(settings, other.ref.id), dataset)


def test_auto_takes_the_latest_unfinished_run_of_this_configuration(failed: Failed) -> None:
    run, settings, dataset = failed
    with tracking.start_run("finetune", settings) as finished:
        finished.tag(dataset=dataset.fingerprint)
    other = resuming(settings, "auto", learning_rate=0.5)
    assert resume.find(other, dataset) is None
    assert resume.find(resuming(settings, "auto"), dataset).ref == run.ref
    with pytest.raises(RegistryError, match="is finished"):
        resume.find(resuming(settings, finished.ref.id), dataset)
    assert resume.find(settings, dataset) is None
