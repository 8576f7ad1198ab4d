"""A search over real trainings: the better setting wins, the worse are ended early, nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import tune
from ray._private.state import actors
from ray.tune.schedulers.pbt import _explore

from lib import storage as places
from lib import tracking
from lib.data.plan import plan
from lib.errors import ConfigError, RegistryError, ResourceError
from lib.settings import Dimension, Settings, load_settings, override
from lib.training import cleaner, population, trials_plots
from lib.training.population import ENDS, TIME
from lib.training.search import Found, Trial, room, search
from lib.training.space import MUTABLE, check
from tests.training.test_fit import make_dataset, settings_for
from tests.training.test_resume import kill, wait_for


def with_search(settings: Settings, **tuning: Any) -> Settings:
    return Settings.model_validate({**settings.model_dump(mode="json"), "tuning": tuning})


def test_room_counts_the_workers_and_the_reads() -> None:
    settings = settings_for(Path("base"), workers=2, cpus_per_worker=1)
    assert room(settings, {"CPU": 16}) == 5
    assert room(settings, {"CPU": 3}) == 1
    gpus = settings_for(Path("base"), workers=2, cpus_per_worker=1, gpus_per_worker=1)
    assert room(gpus, {"CPU": 64, "GPU": 8}) == 4


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, r"tuning\.space is empty"),
        (
            {"training.lerning_rate": {"uniform": [0, 1]}},
            r"tuning\.space\.training\.lerning_rate: .*did you mean",
        ),
        (
            {"training.warmup": {"uniform": [0, 2]}},
            r"tuning\.space\.training\.warmup: .*less than or equal to 1",
        ),
        ({"training.schedule": {"choice": ["linear", "cosin"]}}, r"tuning\.space\.training\.schedule"),
    ],
)
def test_a_space_that_cannot_be_searched_is_named(space: dict[str, Any], said: str) -> None:
    settings = with_search(settings_for(Path("base")), space=space)
    with pytest.raises(ConfigError, match=said):
        check(settings)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("{data.limit: {integer: [1, 9]}}", "'data.limit' cannot be searched"),
        ("{training.epochs: {integer: [3, 1]}}", "integer must rise, not go from 3 to 1"),
        ("{training.warmup: {log_uniform: [0, 1]}}", "log_uniform must begin above 0"),
        (
            "{training.epochs: {integer: [1, 3], choice: [1]}}",
            "give one of uniform, log_uniform, integer, choice, not 2",
        ),
    ],
)
def test_a_wrong_dimension_is_one_line(space: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings("jobs/configs/reviews.yaml", ["--tuning.space", space])


def test_override_names_where_the_value_came_from() -> None:
    settings = settings_for(Path("base"))
    assert override(settings, {"training.warmup": 0.3}, "x").training.warmup == 0.3
    with pytest.raises(ConfigError, match=r"^x: training\.warmup"):
        override(settings, {"training.warmup": -1}, "x")


def trials(count: int) -> Found:
    """Scores that the learning rate decides and the warm-up does not."""
    made = [
        Trial(
            i,
            {"training.learning_rate": 10 ** -(1 + i % 4), "training.warmup": i * 7 % 5 / 5},
            i % 4 / 4,
            3,
            f"r{i}",
        )
        for i in range(count)
    ]
    return Found(sorted(made, key=lambda t: -(t.score or 0)), "macro_f1", lower_is_better=False)


SPACE = {
    "training.learning_rate": Dimension(log_uniform=(1e-5, 1.0)),
    "training.warmup": Dimension(uniform=(0, 1)),
}


def test_importance_finds_what_mattered() -> None:
    weights = trials_plots.importance(trials(40).trials, SPACE)
    assert weights["training.learning_rate"] > 0.8
    assert sum(weights.values()) == pytest.approx(1)
    assert trials_plots.importance(trials(3).trials, SPACE) == {}


def test_pictures_are_written(tmp_path: Path) -> None:
    written = trials_plots.draw(trials(12), SPACE, tmp_path)
    assert [p.name for p in written] == ["parallel.png", "importance.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_places_are_between_the_ends() -> None:
    assert trials_plots.place(Dimension(log_uniform=(1e-4, 1e-2)), 1e-3) == pytest.approx(0.5)
    assert trials_plots.place(Dimension(choice=["a", "b", "c"]), "b") == 0.5
    assert trials_plots.place(Dimension(integer=(1, 5)), 2) == 0.25


POPULATION = {"scheduler": "pbt", "space": {"training.learning_rate": {"uniform": [1e-4, 1e-2]}}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"space": {"training.tokens_per_batch": {"integer": [64, 128]}}},
            r"tuning\.space\.training\.tokens_per_batch: .* changes values during a training, which .*; those "
            r"that do are training\.learning_rate, ",
        ),
        ({"algorithm": "tpe"}, r"tuning\.algorithm tpe does not go with tuning\.scheduler pbt.*; leave"),
        ({"trials": 1}, r"tuning\.trials 1: .* give it 2 or more"),
    ],
)
def test_what_a_population_cannot_do_is_one_line(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(with_search(settings_for(Path("base")), **POPULATION | changed))


def test_mutable_keys_exist_and_may_be_searched_by_a_population() -> None:
    settings = settings_for(Path("base"))
    for key in MUTABLE:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        assert override(settings, {key: value}, key) == settings
        check(with_search(settings, **POPULATION | {"space": {key: {"choice": [value]}}}))


def test_values_stay_between_the_ends_when_they_are_perturbed() -> None:
    space = {"training.label_smoothing": {"uniform": [0.1, 0.11]}, "training.clip": {"choice": [1.0, 2.0]}}
    made = population.scheduler(
        with_search(settings_for(Path("base")), **POPULATION | {"space": space}),
        {"training.label_smoothing": tune.uniform(0.1, 0.11)},
    )
    for _ in range(50):
        values, _ = _explore(
            {"training.label_smoothing": 0.105, "training.clip": 2.0},
            made._hyperparam_mutations,
            made._resample_probability,
            made._perturbation_factors,
            made._custom_explore_fn,
        )
        assert 0.1 <= values["training.label_smoothing"] <= 0.11
        assert values["training.clip"] in (1.0, 2.0)


def test_a_part_is_named_by_what_it_begins_from_and_with(database: Path, tiny_base: Path) -> None:
    with tracking.start_run("trial", settings_for(tiny_base)) as run:
        pass
    rate = {"training.learning_rate": 0.1}
    first = population.part_of(run, rate, None, 0, 2)
    assert first == population.part_of(run, dict(rate), None, 0, 2)
    others = [
        population.part_of(run, {"training.learning_rate": 0.2}, None, 0, 2),
        population.part_of(run, rate, "file:///there", 0, 2),
        population.part_of(run, rate, None, 2, 4),
    ]
    assert len({first.name, *(other.name for other in others)}) == 4


def test_a_search_is_checked_before_ray_is_started(
    database: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import tune as job

    monkeypatch.setattr(job, "connect", lambda: pytest.fail("Ray was started"))
    (tmp_path / "tiny.csv").write_text("text,label\nfits,good\n")
    settings = with_search(settings_for(tiny_base), **POPULATION)
    settings = override(settings, {"data.source": str(tmp_path / "tiny.csv")}, "test")
    make_dataset(settings, rows=40, fingerprint=plan(settings).ref.fingerprint)
    wrong = with_search(settings, space={"training.lerning_rate": {"uniform": [0, 1]}})
    with pytest.raises(ConfigError, match=r"tuning\.space\.training\.lerning_rate"):
        job.tune(wrong)
    monkeypatch.setattr(job, "free_bytes", lambda place: 1 << 20)
    with pytest.raises(
        ResourceError,
        match=r"checkpoints of 8 trials, 4 of 0\.00 GiB each, need .* has 0\.0 GiB free; lower tuning\.trials",
    ):
        job.tune(settings)


class Stub:
    """As much of Tune's controller and trial as the scheduler asks."""

    def __init__(self, **given: Any) -> None:
        self.__dict__ |= given


def test_a_trial_that_ends_early_holds_nobody_up() -> None:
    made = population.scheduler(
        with_search(settings_for(Path("base")), **POPULATION),
        {"training.learning_rate": tune.uniform(1e-4, 1e-2)},
    )
    waiting, ended = Stub(status="PAUSED"), Stub(status="RUNNING")
    controller = Stub(get_live_trials=lambda: [waiting, ended], get_trials=lambda: [waiting, ended])
    made._trial_state = {waiting: Stub(last_train_time=1), ended: Stub(last_train_time=0)}
    assert made.choose_trial_to_run(controller) is None
    assert made.on_trial_result(controller, ended, {TIME: 1, ENDS: True}) == "CONTINUE"
    made.on_trial_complete(controller, ended, {})
    assert made.choose_trial_to_run(controller) is waiting


def standing() -> tuple[float, set[str]]:
    """Free slots of the cluster, and the actors of this job that live."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return ray.available_resources().get("CPU", 0.0), set(actors(job_id=job, actor_state_name="ALIVE"))


def assert_nothing_is_left(before: tuple[float, set[str]]) -> None:
    """No slot is taken, and no worker or controller of a trial lives. What stood before (the controller of a run
    whose error a test still holds, say) is not the search's."""
    job = ray.get_runtime_context().get_job_id()
    wait_for(lambda: not [g for g in cleaner.groups() if g.creator_job_id.hex() == job], "freed slots")
    kinds = ("RayTrainWorker", "TrainController", "Guard", "ImplicitFunc")

    def alive() -> list[str]:
        found = actors(job_id=ray.JobID.from_hex(job), actor_state_name="ALIVE").items()
        names = [a["ActorClassName"] for name, a in found if name not in before[1]]
        return [name for name in names if any(kind in name for kind in kinds)]

    wait_for(lambda: not alive(), "the end of all trials' processes")
    wait_for(lambda: ray.available_resources().get("CPU", 0.0) >= before[0], "the cluster's slots")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_better_learning_rate_wins_and_the_worse_is_ended_early(
    ray_cluster: None, database: Path, tiny_base: Path
) -> None:
    settings = settings_for(tiny_base, workers=1, epochs=4, metric="macro_f1")
    settings = with_search(
        settings,
        space={"training.learning_rate": {"choice": [1e-7, 5e-3]}, "training.warmup": {"uniform": [0, 0.2]}},
        trials=2,
        algorithm="random",
        concurrency=1,
        scheduler="asha",
        grace=1,
        reduction=2,
        seed=3,  # draws the good rate, then the bad one
    )
    dataset = make_dataset(settings, rows=160)
    before = standing()
    with tracking.start_run("tune", settings) as run:
        found = search(settings, dataset, run)
    assert_nothing_is_left(before)
    by_number = sorted(found.trials, key=lambda t: t.number)
    assert [t.values["training.learning_rate"] for t in by_number] == [5e-3, 1e-7], "the seed draws these"
    assert found.best.values["training.learning_rate"] == 5e-3
    assert found.best.validations == 4
    assert found.best.score is not None
    assert found.best.score > 0.9
    assert by_number[1].validations == 1
    assert found.trials[-1] == by_number[1]

    children = {child.tags()["trial"]: child for child in tracking.children(run.ref.id, "tiny")}
    assert len(children) == 2
    assert children[found.best.id].status() == "FINISHED"
    assert children[by_number[1].id].status() == "KILLED"
    assert not any(places.exists(child.ref.checkpoints_uri) for child in children.values())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_population_of_zero_trials_takes_over_from_the_better(
    ray_cluster: None, database: Path, tiny_base: Path
) -> None:
    # With a rate of next to nothing a model stays what it is.
    still, good = 1e-12, 5e-3
    settings = settings_for(
        tiny_base,
        zero_stage=2,
        epochs=4,
        metric="loss",
        schedule="constant",
        warmup=0,
        learning_rate=good,
        tokens_per_batch=24,
    )
    settings = with_search(
        settings,
        space={"training.learning_rate": {"choice": [still, good]}},
        trials=2,
        scheduler="pbt",
        perturb_every=2,
        quantile=0.5,
        seed=2,  # draws the good rate and the other
    )
    dataset = make_dataset(settings, rows=160)
    before = standing()
    assert room(settings, ray.cluster_resources()) >= 2
    with tracking.start_run("tune", settings) as run:
        found = search(settings, dataset, run)
    assert_nothing_is_left(before)
    # Both trained at the same time.
    children = {child.tags()["trial"]: child for child in tracking.children(run.ref.id, "tiny")}
    spans = [child.client.get_run(child.ref.id).info for child in children.values()]
    assert max(span.start_time for span in spans) < min(span.end_time for span in spans)
    assert {child.status() for child in children.values()} == {"FINISHED"}
    assert not any(places.exists(child.ref.checkpoints_uri) for child in children.values())

    def losses(trial: Trial) -> list[float]:
        run = children[trial.id]
        return [m.value for m in run.client.get_metric_history(run.ref.id, "validation/loss")]

    assert [trial.validations for trial in found.trials] == [4, 4]
    giver, taker = sorted(found.trials, key=lambda trial: losses(trial)[1])
    assert giver.values == {"training.learning_rate": good}
    assert not giver.schedule
    # Which rate it goes on with is drawn, and may be the one that it had.
    after = {"training.learning_rate": still}
    if taker.schedule:
        (first, earlier), (then, after) = taker.schedule
        assert (first, then) == (1, 3)
        assert earlier == {"training.learning_rate": still}
    taken, given = losses(taker), losses(giver)
    assert taken[0] == pytest.approx(taken[1], abs=1e-6), "it learned nothing until it took over"
    assert given[1] < taken[1]
    # Weights, optimiser, random states and position are the giver's, and the rate is the taker's own.
    if after["training.learning_rate"] == still:
        assert taken[2:] == pytest.approx([given[1]] * 2, abs=1e-6)
    else:
        assert taken[2:] == given[2:]
    assert found.best.score == min(taken + given)


def drive(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """jobs.tune as a user starts it, with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", "--config", str(folder / "tiny.yaml"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_in_its_second_trial(driver: subprocess.Popen[str]) -> tuple[str, tracking.Run]:
    """The id of the search's run, and the run of its first trial, which was finished."""
    run_id = next(line for line in driver.stdout if line.startswith("run ")).split()[1].rstrip(":")

    def states() -> list[str]:
        return sorted(child.status() for child in tracking.children(run_id, "tiny"))

    try:
        wait_for(lambda: states() == ["FINISHED", "RUNNING"] or driver.poll() is not None, "two trials")
    finally:
        assert driver.poll() is None, driver.stderr.read()
        kill(driver)
    assert states() == ["FINISHED", "RUNNING"]
    (first,) = [c for c in tracking.children(run_id, "tiny") if c.status() == "FINISHED"]
    return run_id, first


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_search_goes_on_and_its_winner_is_a_configuration(
    database: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from jobs import tune as job

    values = with_search(
        settings_for(tiny_base, workers=1, epochs=1),
        space={"training.learning_rate": {"log_uniform": [1e-3, 1e-2]}},
        trials=2,
        scheduler="none",
        concurrency=1,
    ).model_dump(mode="json")
    source = tmp_path / "tiny.csv"
    source.write_text("text,label\nfits,good\n")
    values["data"]["source"] = str(source)
    settings = Settings.model_validate(values)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    make_dataset(settings, rows=160, fingerprint=plan(settings).ref.fingerprint)

    with tempfile.TemporaryDirectory(prefix="whorl-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment = {**os.environ, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"}
        run_id, first = killed_in_its_second_trial(drive(tmp_path, environment))
        ended = first.client.get_run(first.ref.id).info.end_time

        again = drive(tmp_path, environment, "--tuning.resume", run_id)
        said, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    assert "Failed to query" not in err + said
    assert "multiple active Ray" not in err + said
    run = tracking.find_run(settings, "tune", run_id)
    assert run.status() == "FINISHED"
    # The trial that was finished was not trained again, the one that was interrupted was, and none came twice.
    everyone = tracking.children(run_id, "tiny")
    children = [child for child in everyone if child.status() == "FINISHED"]
    # Ray Tune writes down what it has begun every few seconds: a trial that was killed before that begins anew.
    lost = [child for child in everyone if child.status() == "KILLED"]
    assert (len(children), len(lost)) in ((2, 0), (2, 1))
    assert len(everyone) == len(children) + len(lost)
    assert first.client.get_run(first.ref.id).info.end_time == ended
    assert sorted("resumed" in child.tags() for child in children) == [False, not lost]
    trials = json.loads(places.read_bytes(places.join(run.artifacts_uri(), "trials.json")))["trials"]
    assert len({trial["id"] for trial in trials}) == 2
    assert all(trial["score"] is not None for trial in trials)

    best = places.join(run.ref.uri, job.BEST)
    chosen = Settings.model_validate(yaml.safe_load(places.read_bytes(best)))
    assert chosen.training.learning_rate == trials[0]["values"]["training.learning_rate"]
    assert chosen.model == settings.model
    assert f"best settings: {best}" in said
    assert said.index("trial ") < said.index("best settings")
    names = {f.path for f in run.client.list_artifacts(run.ref.id)}
    assert {"trials.json", "parallel.png"} <= names
    with pytest.raises(RegistryError, match="is finished, its best settings are"):
        job.interrupted(with_search(settings, **values["tuning"] | {"resume": run_id}))
