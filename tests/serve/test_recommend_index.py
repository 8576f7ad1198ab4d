"""Recommendations out of a catalogue that is not looked at as a whole, over a real socket."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.ingress import free_port
from lib import storage
from lib.artifacts import ModelRef
from lib.recommender import index
from lib.recommender.predictor import History, Predictor, load
from lib.settings import ServingSettings, Settings
from serve.recommending import usable_index
from tests.recommending import publish_many, settings_for
from tests.serve.conftest import Endpoint, key

PATH = "/v1/recommendations"
MANY, BLOCKED = 20_000, "film-77"
HISTORY = [12, 400, 77, 9_000]


def many(base: Path, folder: Path, patch: pytest.MonkeyPatch) -> Settings:
    """films@1, and what it is served with."""
    patch.setenv("WHORL_STORAGE", str(folder))
    patch.setenv("WHORL_DATABASE", f"sqlite:///{folder / 'whorl.db'}")
    settings = settings_for(base, width=32, ranker="none", exact_items=10_000)
    serving = {
        "model": "films@1",
        "port": free_port(),
        "engine": "torch",
        "precision": "fp32",
        "threads": 1,
        "recommend": {"block": [BLOCKED]},
    }
    settings = Settings.model_validate(settings.model_dump(mode="json") | {"serving": serving})
    publish_many(base, settings, MANY)
    return settings


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, ray_cluster: None) -> Iterator[Endpoint]:
    from ray import serve as ray_serve

    from serve.deploy import deploy

    with pytest.MonkeyPatch.context() as patch:
        settings = many(tiny_base, tmp_path_factory.mktemp("many"), patch)
        yield Endpoint(deploy(settings), settings, key())
        ray_serve.shutdown()


def exact() -> tuple[Predictor, np.ndarray]:
    """The model, and the scores of all items for HISTORY."""
    with storage.local_copy(ModelRef("films", 1).uri) as folder:
        predictor = load(folder, ServingSettings(engine="torch", precision="fp32", threads=1))
    still = np.zeros(len(HISTORY), np.int64)
    did = History(np.array(HISTORY), still, still, np.zeros(0, np.int64), np.zeros(1, np.float32))
    found: np.ndarray = predictor.scores(predictor.users([did]))[0]
    found[[*HISTORY, int(BLOCKED.rpartition("-")[2])]] = -np.inf
    return predictor, found


def answer(films: Endpoint, k: int = 100, **body: Any) -> list[dict[str, Any]]:
    found = films.post({"history": [f"film-{row}" for row in HISTORY], "k": k, **body}, PATH)
    assert found.status == 200, found.body
    results: list[dict[str, Any]] = found.body["results"]
    return results


def row(one: dict[str, Any]) -> int:
    return int(one["item"].rpartition("-")[2])


def test_answers_are_those_of_all_items_but_for_few(films: Endpoint) -> None:
    _, scores = exact()
    results = answer(films)
    rows = [row(one) for one in results]
    assert np.isin(np.argsort(-scores)[:100], rows).mean() >= 0.95
    assert not {*HISTORY, int(BLOCKED.rpartition("-")[2])} & set(rows)
    assert [one["score"] for one in results] == pytest.approx(scores[rows].tolist(), abs=1e-3)
    left = scores[np.isfinite(scores)].astype(np.float64)
    chances = np.exp(scores[rows] - np.logaddexp.reduce(left))
    assert [one["probability"] for one in results] == pytest.approx(chances.tolist(), rel=0.03)


def test_filters_that_leave_few_leave_the_exact_answer(films: Endpoint) -> None:
    _, scores = exact()
    inside = np.arange(3_000, 3_040)
    inside = inside[inside % 5 != 4]  # the price of every fifth is not known
    wanted = inside[np.argsort(-scores[inside])]
    found = answer(films, filters={"numbers": {"year": [3_000, 3_039]}})
    assert [row(one) for one in found] == wanted.tolist()
    assert answer(films, filters={"numbers": {"year": [1e9, None]}}) == []


def test_a_new_item_is_found_at_once(films: Endpoint) -> None:
    item = {"item": "new-1", "title": "new", "categories": {"genre": ["odd"]}, "numbers": {"year": -5}}
    said = films.post({"items": [item]}, "/v1/items")
    assert (said.status, said.body["taken"]) == (200, 1)
    assert "new-1" in [one["item"] for one in answer(films, filters={"numbers": {"year": [-9, -1]}})]


def test_items_alike(films: Endpoint) -> None:
    predictor, _ = exact()
    vectors = predictor.vectors / np.linalg.norm(predictor.vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[5]
    cosines[[5, int(BLOCKED.rpartition("-")[2])]] = -np.inf
    found = films.get("/v1/items/film-5/similar?k=100").body["results"]
    assert np.isin(np.argsort(-cosines)[:100], [row(one) for one in found]).mean() >= 0.95
    assert [one["similarity"] for one in found] == pytest.approx(
        cosines[[row(one) for one in found]].tolist(), abs=1e-4
    )


def test_an_index_that_finds_too_few_is_not_asked(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = many(tiny_base, tmp_path / "all", monkeypatch)
    folder = tmp_path / "model"
    with storage.local_copy(ModelRef("films", 1).uri) as published:
        shutil.copytree(published, folder)
    predictor, rules = load(folder, settings.serving), settings.serving.recommend
    found = usable_index(folder, predictor, rules)
    assert found is not None
    assert len(found) == MANY
    measured = index.told(str(folder))
    assert measured is not None
    assert rules.least_recall <= measured.least_recall
    (folder / index.TOLD).write_text(json.dumps(dataclasses.asdict(measured) | {"recall": 0.5}))
    assert usable_index(folder, predictor, rules) is None
    assert "recall@200 of the exact answer 0.500" in caplog.text
    assert "below serving.recommend.least_recall 0.95, each request looks at all items" in caplog.text
    assert usable_index(folder, predictor, rules.model_copy(update={"least_recall": 0.5})) is not None
    (folder / index.TOLD).unlink()
    assert usable_index(folder, predictor, rules) is None
    assert "no index of 20,000 items" in caplog.text
