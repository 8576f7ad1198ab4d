"""A search over real trainings: the better setting wins, the worse are ended early, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lib import storage as places
from lib import tracking
from lib.errors import ConfigError
from lib.settings import Dimension, Settings, load_settings, override
from lib.training import trials_plots
from lib.training.search import Found, Trial, check, room, search
from tests.conftest import WORDS
from tests.training.test_fit import make_dataset, settings_for


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


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_better_learning_rate_wins_and_nothing_is_left(
    ray_cluster: None, database: Path, tiny_base: Path
) -> None:
    settings = settings_for(tiny_base, workers=1, epochs=5, metric="macro_f1")
    settings = with_search(
        settings,
        space={"training.learning_rate": {"choice": [1e-7, 5e-3]}, "training.warmup": {"uniform": [0, 0.2]}},
        trials=3,
        algorithm="random",
        concurrency=1,
        scheduler="asha",
        reduction=2,
        seed=3,  # draws the good rate, the bad one, the good one
    )
    dataset = make_dataset(settings, rows=160)
    with tracking.start_run("tune", settings) as run:
        found = search(settings, dataset, run)
    assert len(found.trials) == 3
    rates = [trial.values["training.learning_rate"] for trial in found.trials]
    assert set(rates) == {1e-7, 5e-3}, "the seed draws both"
    assert found.best.values["training.learning_rate"] == 5e-3
    assert found.best.score is not None
    assert found.best.score > 0.9
    assert found.trials[-1].values["training.learning_rate"] == 1e-7

    children = tracking.children(run.ref.id, "tiny")
    assert len(children) == 3
    assert {child.status() for child in children} <= {"FINISHED", "KILLED"}
    assert not any(places.exists(child.ref.checkpoints_uri) for child in children)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_winner_is_a_configuration(
    ray_cluster: None,
    database: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jobs import tune as job
    from jobs.preprocess import preprocess

    settings = settings_for(tiny_base, workers=1, epochs=1)
    settings = with_search(
        settings, space={"training.learning_rate": {"log_uniform": [1e-3, 1e-2]}}, trials=2, scheduler="none"
    )
    rows = [
        f"the dress is {['awful', 'great'][i % 2]} {WORDS[i % 20]} {WORDS[i // 20]},{i % 2}"
        for i in range(200)
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]))
    source = {"data.source": str(tmp_path / "mine.csv"), "data.labels": {"0": "bad", "1": "good"}}
    settings = override(settings, source, "test")
    preprocess(settings)
    job.tune(settings)
    run = tracking.find_run(settings, "tune")
    best = places.join(run.ref.uri, job.BEST)
    values = yaml.safe_load(places.read_bytes(best))
    chosen = Settings.model_validate(values)
    assert 1e-3 <= chosen.training.learning_rate <= 1e-2
    assert chosen.model == settings.model
    said = capsys.readouterr().out
    assert f"best settings: {best}" in said
    assert said.index("trial ") < said.index("best settings")
    names = {f.path for f in run.client.list_artifacts(run.ref.id)}
    assert {"trials.json", "parallel.png"} <= names
