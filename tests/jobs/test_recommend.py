"""The whole line for recommendation: CSV files of ratings, films and people in, a champion out."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import evaluate
from jobs.finetune import finetune
from jobs.preprocess import preprocess
from jobs.promote import promote
from lib import events, registry, storage, tracking
from lib.data.plan import plan
from lib.errors import ConfigError, DataError, GateError
from lib.evaluation import report as files
from lib.events import Feedback
from lib.recommender import items as catalogue
from lib.settings import Settings
from tests.tiny import WORDS

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

FILMS, PEOPLE = 30, 120


def write(path: Path, header: list[str], rows: list[list[Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


def write_tables(folder: Path) -> dict[str, str]:
    """People who watch the films of a series in its order: what comes next is what was watched last, and one more.

    Where somebody begins depends on nothing. One film nobody ever watched; one rating is of a film that is not there.
    """
    random = np.random.default_rng(0)
    films = [
        [
            f"f{i}",
            f"{WORDS[i % 20]} {WORDS[(i // 3) % 20]}",
            "long" if i % 2 else "short",
            1990 + i if i % 7 else "",
        ]
        for i in range(FILMS + 1)
    ]
    ratings: list[list[Any]] = []
    for person in range(PEOPLE):
        start, length = random.integers(FILMS), random.integers(6, 12)
        for step in range(length):
            film, time = (start + step) % FILMS, 1_700_000_000 + person * 100_000 + step * 3600
            ratings.append([f"p{person}", f"f{film}", 5, time])
            if step % 3 == 0:  # a film that was not liked shows nothing
                ratings.append([f"p{person}", f"f{random.integers(FILMS)}", 1, time + 60])
    ratings.append(["p0", "f-none", 5, 1_700_000_000])
    order = random.permutation(len(ratings))
    people = [[f"p{i}", ["a", "b"][i % 2], 20 + i % 50] for i in range(PEOPLE - 1)]
    return {
        "ratings": write(folder / "ratings.csv", ["who", "film", "stars", "at"], [ratings[i] for i in order]),
        "films": write(folder / "films.csv", ["film", "title", "kind", "year"], films),
        "people": write(folder / "people.csv", ["who", "town", "age"], people),
    }


@pytest.fixture
def settings(database: Path, tiny_base: Path, tmp_path: Path) -> Settings:
    tables = write_tables(tmp_path)
    return Settings.model_validate(
        {
            "name": "films",
            "task": "recommend",
            "data": {
                "source": tables["ratings"],
                "columns": {"user": "who", "item": "film", "time": "at", "value": "stars"},
                "items": {
                    "source": tables["films"],
                    "id": "film",
                    "text": ["title", "kind"],
                    "categories": ["kind"],
                    "numbers": ["year"],
                },
                "users": {"source": tables["people"], "id": "who", "categories": ["town"], "numbers": ["age"]},
                "interactions": {"least_value": 4, "least_per_user": 3, "new_items": 0.1},
                "rows_per_shard": 50,
            },
            "model": {"base": str(tiny_base), "max_length": 16, "recommender": {"width": 16, "id_dropout": 0.0}},
            "training": {
                "epochs": 12,
                "learning_rate": 2e-2,
                "schedule": "constant",
                "tokens_per_batch": 256,
                "cpus_per_worker": 0.5,
                "validate_every": 40,
                "patience": None,
            },
            "evaluation": {"bootstrap": 200},
            "promotion": {"require": True},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
        }
    )  # fmt: skip


def log_lists(count: int) -> None:
    """Of an application that shows one film by chance to who has seen two of a row; the third is taken."""
    random = np.random.default_rng(5)
    rows, taken = [], []
    for number in range(count):
        start, shown = random.integers(FILMS), random.integers(FILMS)
        asked = {"history": [f"f{start}", f"f{(start + 1) % FILMS}"]}
        rows.append(
            {
                "id": f"r{number}", "application": "films", "model": "films@1", "time": time.time(),
                "route": "/v1/recommendations", "status": 200, "milliseconds": 1.0, "tokens": 0, "key": None,
                "request": json.dumps(asked),
                "answer": json.dumps({"results": [{"item": f"f{shown}", "propensity": 1 / FILMS}]}),
            }
        )  # fmt: skip
        if shown == (start + 2) % FILMS:
            taken.append(Feedback(f"r{number}", label=f"f{shown}", rating=1.0))
    events.write(rows)
    for feedback in taken:
        events.say(feedback, "films")


def earns_in_the_place_of_others(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """What an application logged while it explored tells what this model would have earned in its place."""
    asking = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"logged_days": 1})}
    )
    with pytest.raises(DataError, match=r"evaluation\.logged_days: films logged no list in 1 days"):
        evaluate(asking)
    log_lists(400)
    capsys.readouterr()
    evaluate(asking)
    earned = files.read(tracking.find_run(settings, "finetune").ref.evaluation_uri).report.logged
    assert earned["requests"] == 400
    assert earned["low"] <= earned["estimated"] <= earned["high"]
    # Shown by chance the film that comes next was seldom there; the model knows it.
    assert earned["estimated"] > 3 * earned["logged"] > 0
    said = capsys.readouterr().out
    assert f"{earned['estimated']:.4f} of the places taken" in said


@pytest.mark.slow
def test_the_whole_line(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(settings)
    dataset = plan(settings).ref
    manifest = dataset.manifest()
    assert manifest["dropped"]["of unknown items"] == 1
    assert manifest["dropped"]["below least_value"] > 0
    items = catalogue.read(dataset)
    assert items["item"].to_pylist() == [f"f{i}" for i in range(FILMS + 1)]
    assert items["text"][1].as_py() == "a the. long"
    seen = dict(zip(items["item"].to_pylist(), items["interactions"].to_pylist(), strict=True))
    assert seen[f"f{FILMS}"] == 0
    new = [name for name, count in seen.items() if count == 0 and name != f"f{FILMS}"]
    assert 0 < len(new) < FILMS / 3
    test = pq.read_table([shard.removeprefix("file://") for shard in dataset.shards("test")]).to_pylist()
    assert {items["item"][row["items"][-1]].as_py() for row in test if row["fresh"]} == set(new)
    train = pq.read_table([shard.removeprefix("file://") for shard in dataset.shards("train")]).to_pylist()
    assert sum(len(row["items"]) for row in train) == sum(seen.values())
    assert not {
        name for row in train for item in row["items"] for name in [items["item"][item].as_py()]
    } & set(new)

    finetune(settings)
    evaluate(settings)
    run = tracking.find_run(settings, "finetune")
    report = files.read(run.ref.evaluation_uri).report
    assert report.rows == sum(not row["fresh"] for row in test)
    assert report.deciding == "ndcg_10"
    # What comes next is known but for gaps of held-out films; popularity knows nothing.
    assert report.metrics["ndcg_10"] > 0.6 > report.baselines["popularity"]["ndcg_10"]
    low, high = report.intervals["model"]
    assert low <= report.metrics["ndcg_10"] <= high
    assert report.differences["popularity"][1] > 0
    assert 0.5 < report.metrics["coverage_10"] <= 1
    assert set(report.baselines) == {"retrieval", "popularity", "transitions"}
    assert set(report.slices) == {"history", "item", "user's town"}
    assert set(report.slices["user's town"]) == {"a", "b"}
    assert sum(part["rows"] for part in report.slices["user's town"].values()) <= report.rows
    assert sum(bin["rows"] for bin in report.calibration) == 10 * report.rows
    assert report.logged == {}
    assert report.slices["item"]["held out"]["rows"] == sum(row["fresh"] for row in test)
    with storage.local_copy(run.ref.evaluation_uri) as folder:
        page = (folder / "report.html").read_text()
    example = report.rankings[0]
    assert example["came"] in page
    assert len(example["recommended"]) == 10
    said = capsys.readouterr().out
    assert "NDCG@10 above popularity" in said
    assert f"{report.metrics['ndcg_10']:.3f}" in said

    earns_in_the_place_of_others(settings, capsys)

    # Nothing is better than transitions where one film always follows another: the gate says so.
    with pytest.raises(GateError, match=r"does not meet the gate .*ndcg_10 above baseline transitions"):
        promote(settings)
    (first,) = registry.versions("films")
    registry.set_alias(first, registry.CHAMPION)
    # A second version is held against the first, on the same lists.
    retrieval = {"recommender": settings.model.recommender.model_copy(update={"ranker": "none"})}
    again = settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"max_steps": 2, "seed": 1}),
            "model": settings.model.model_copy(update=retrieval),
        }
    )
    finetune(again)
    evaluate(again)
    promote(again.model_copy(update={"promotion": again.promotion.model_copy(update={"require": False})}))
    champion = registry.champion("films")
    assert champion is not None
    assert champion.version == 1
    assert "ndcg_10 beside films@1 (higher is better): -0." in capsys.readouterr().out


def test_files_that_do_not_belong_together_end_in_one_line(settings: Settings, tmp_path: Path) -> None:
    def preprocessed(**data: Any) -> None:
        changed = settings.data.model_dump(mode="json") | data
        preprocess(Settings.model_validate(settings.model_dump(mode="json") | {"data": changed}))

    items = settings.data.model_dump(mode="json")["items"]
    with pytest.raises(DataError, match=r"no column 'movie'.*data\.items\.id"):
        preprocessed(items={**items, "id": "movie"})
    twice = write(
        tmp_path / "twice.csv", ["film", "title", "kind", "year"], [["f1", "a", "x", 1], ["f1", "b", "x", 1]]
    )
    with pytest.raises(DataError, match=r"twice\.csv row 2 has the film 'f1' of a row before it"):
        preprocessed(items={**items, "source": twice})
    other = write(tmp_path / "other.csv", ["film", "title", "kind", "year"], [["x1", "a", "x", 1]])
    with pytest.raises(
        DataError,
        match=r"no item of the interactions, such as 'f\S+', is in .*other\.csv; see data\.items\.id",
    ):
        preprocessed(items={**items, "source": other})
    wrong = write(tmp_path / "wrong.csv", ["film", "title", "kind", "year"], [["f1", "a", "x", "soon"]])
    with pytest.raises(DataError, match=r"wrong\.csv row 1 has the year 'soon', which is no number"):
        preprocessed(items={**items, "source": wrong})
    late = write(tmp_path / "late.csv", ["who", "film", "stars", "at"], [["p1", "f1", 5, "yesterday"]])
    with pytest.raises(
        DataError, match=r"late\.csv row 1 is wrong in 'at': 'yesterday' is no time; write it as"
    ):
        preprocessed(source=late)
    few = write(tmp_path / "few.csv", ["who", "film", "stars", "at"], [["p1", "f1", 1, 5]])
    with pytest.raises(
        DataError, match=r"no interaction is left of 1 rows \(1 below least_value\); see data\.interactions"
    ):
        preprocessed(source=few)
    with pytest.raises(ConfigError, match=r"least_value needs data\.columns\.value"):
        preprocessed(columns={"user": "who", "item": "film", "time": "at"})


def test_the_planner_says_what_it_does_not_reckon_with(settings: Settings) -> None:
    from jobs.plan import plan as job

    with pytest.raises(ConfigError, match=r"jobs\.plan reckons with the layers of a language model"):
        job(settings)
