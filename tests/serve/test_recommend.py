"""Recommendations over a real socket: what a user did changes the next answer, on both replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.ingress import free_port
from lib import storage
from lib.artifacts import ModelRef
from lib.errors import ConfigError
from lib.recommender.predictor import History, Predictor, load
from lib.recommender.ranker import candidates
from lib.settings import ServingSettings, Settings
from lib.tasks import recommend
from tests.recommending import ITEMS, item_rows, publish_films, settings_for
from tests.serve.conftest import Endpoint, key

PATH = "/v1/recommendations"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, ray_cluster: None) -> Iterator[Endpoint]:
    from ray import serve as ray_serve

    from serve.deploy import deploy

    folder = tmp_path_factory.mktemp("films")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHORL_STORAGE", str(folder))
        patch.setenv("WHORL_DATABASE", f"sqlite:///{folder / 'whorl.db'}")
        settings = settings_for(tiny_base, text="frozen")
        serving = {
            "model": "films@1",
            "port": free_port(),
            "min_replicas": 2,
            "max_replicas": 2,
            "engine": "torch",
            "precision": "fp32",
            "threads": 1,
            "recommend": {"block": ["film-5"]},
        }
        settings = Settings.model_validate(settings.model_dump(mode="json") | {"serving": serving})
        publish_films(tiny_base, settings)
        yield Endpoint(deploy(settings), settings, key())
        ray_serve.shutdown()


def ids(answer: Any) -> list[str]:
    assert answer.status == 200, answer.body
    return [one["item"] for one in answer.body["results"]]


def test_an_answer_says_what_and_why(films: Endpoint) -> None:
    history = [
        "film-1",
        {"item": "film-2", "event": "buy", "time": "2026-01-01T00:00:00Z"},
        "film-1",
        "nothing",
    ]
    answer = films.post({"history": history, "k": 4}, PATH)
    found = ids(answer)
    assert len(set(found)) == 4
    assert not {"film-1", "film-2", "film-5"} & set(found)
    assert answer.body["unknown"] == ["nothing"]
    assert (answer.body["model"], answer.body["version"]) == ("films", 1)
    assert answer.body["request_id"] == answer.headers["x-request-id"]
    scores = [one["score"] for one in answer.body["results"]]
    assert scores == sorted(scores, reverse=True)
    for one in answer.body["results"]:
        assert 0 < one["probability"] < 1
        assert one["propensity"] == 1
        assert {named["item"] for named in one["reason"]["because"]} <= {"film-1", "film-2"}
    assert films.post({"history": history, "k": 4}, PATH).body["results"] == answer.body["results"]
    # All of them: those that were had too, but not what is blocked.
    everything = ids(films.post({"history": history, "k": 1000, "exclude_seen": False}, PATH))
    assert set(everything) == {f"film-{i}" for i in range(ITEMS)} - {"film-5"}


def loaded() -> Predictor:
    with storage.local_copy(ModelRef("films", 1).uri) as folder:
        return load(folder, ServingSettings(engine="torch", precision="fp32", threads=1))


def did(rows: list[int]) -> History:
    none, still = np.zeros(0, np.int64), np.zeros(len(rows), np.int64)
    return History(np.array(rows), still, still, none, np.zeros(1, np.float32))


def retrieved(predictor: Predictor, rows: list[int]) -> np.ndarray:
    found: np.ndarray = predictor.scores(predictor.users([did(rows)]))[0]
    return found


def test_answers_are_those_of_the_model(films: Endpoint) -> None:
    predictor, rows = loaded(), [3, 9, 4]
    scores = retrieved(predictor, rows)
    best = candidates(scores, np.array([3, 9, 4, 5]))
    worth = predictor.rank(did(rows), int(time.time()), best, scores[best])
    assert predictor.ranker is not None
    answer = films.post({"history": [f"film-{r}" for r in rows], "k": 5}, PATH)
    assert ids(answer) == [f"film-{i}" for i in best[np.argsort(-worth)[:5]]]
    chances = np.exp(worth) / np.exp(worth).sum() * predictor.ranker.coverage
    told = [one["probability"] for one in answer.body["results"]]
    assert told == pytest.approx(np.sort(chances)[::-1][:5].tolist(), rel=1e-3)


def test_what_a_user_does_is_in_the_next_answer_of_every_replica(films: Endpoint) -> None:
    before = [ids(films.post({"user_id": "ada", "k": 3}, PATH)) for _ in range(6)]
    assert all(found == before[0] for found in before)
    did = [{"user_id": "ada", "item": item, "event": "buy", "id": f"e-{item}"} for item in before[0]]
    for _ in range(2):  # sent twice, counted once
        answer = films.post({"interactions": did}, "/v1/interactions")
        assert answer.status == 200, answer.body
    assert (answer.body["taken"], answer.body["new"]) == (3, 0)
    after = [films.post({"user_id": "ada", "k": 3}, PATH) for _ in range(12)]
    assert not set(before[0]) & {item for answer in after for item in ids(answer)}
    assert all(ids(answer) == ids(after[0]) for answer in after)
    reasons = {named["item"] for one in after[0].body["results"] for named in one["reason"]["because"]}
    assert reasons <= set(before[0])


def test_the_demo_shows_how_an_answer_changes(films: Endpoint) -> None:
    row = {
        "user": "eve",
        "item_names": ["film-1", "film-2", "film-3"],
        "item_titles": ["One", "Two", "Three"],
    }
    path, body = recommend.request(row, "films")
    assert body["history"] == ["film-1", "film-2"]
    told = recommend.tell(row, films.post(body, path).body, [])
    assert told.startswith("One · Two\n    → ")
    assert told.endswith("(the data says: Three)")
    before, after = recommend.show(row, lambda path, body: films.post(body, path).body)
    first = before.removeprefix("user demo-eve: ").partition(";")[0]
    assert after.startswith(f"after {first}: ")
    assert before.partition(": ")[2] != after.partition(": ")[2]


def test_good_interactions_are_taken_and_bad_ones_told(films: Endpoint) -> None:
    later = (datetime.now(UTC) + timedelta(days=30)).isoformat()
    batch = [
        {"user_id": "bob", "item": "film-3"},
        {"user_id": "bob"},
        "nonsense",
        {"user_id": "bob", "item": "film-4", "time": later},
        {"user_id": "bob", "item": "film-4", "event": "eat"},
        {"user_id": "bob", "item": "not-yet", "time": "2026-01-01T00:00:00Z"},
        {"user_id": "bob", "item": "film-6", "more": 1},
    ]
    answer = films.post({"interactions": batch}, "/v1/interactions")
    assert answer.status == 200
    assert (answer.body["taken"], answer.body["new"], answer.body["unknown"]) == (2, 2, ["not-yet"])
    refused = {one["index"]: one["message"] for one in answer.body["refused"]}
    assert list(refused) == [1, 2, 3, 4, 6]
    assert "item" in refused[1]
    assert refused[3] == "time is more than a day ahead"
    assert refused[4] == "event: 'eat' is none of view, buy"
    assert "more" in refused[6]
    known = films.post({"user_id": "bob", "k": 30}, PATH)
    assert "film-3" not in ids(known)
    assert known.body["unknown"] == ["not-yet"]


def test_a_new_item_is_recommendable_at_once_and_may_go_again(films: Endpoint) -> None:
    item = {
        "item": "new/1",
        "title": "great fabric",
        "categories": {"genre": ["odd"]},
        "numbers": {"year": 3},
    }
    answer = films.post({"items": [item, {"item": "x"}, {**item, "numbers": {"weight": 1}}]}, "/v1/items")
    assert answer.status == 200, answer.body
    assert answer.body["taken"] == 1
    assert [one["index"] for one in answer.body["refused"]] == [1, 2]
    assert "numbers.weight" in answer.body["refused"][1]["message"]
    odd = {"history": ["film-1"], "k": 50, "filters": {"categories": {"genre": ["odd"]}}}
    deadline = time.monotonic() + 30
    seen = 0
    while seen < 12 and time.monotonic() < deadline:  # on both replicas
        seen = seen + 1 if "new/1" in ids(films.post(odd, PATH)) else 0
    assert seen == 12
    similar = films.get("/v1/items/new/1/similar?k=3")
    assert len(ids(similar)) == 3
    films.post({"items": [{**item, "available": False}]}, "/v1/items")
    seen = 0
    while seen < 12 and time.monotonic() < deadline:
        seen = seen + 1 if "new/1" not in ids(films.post(odd, PATH)) else 0
    assert seen == 12


def test_words_find_what_says_the_same(films: Endpoint) -> None:
    titles = item_rows(Path(films.settings.model.base))["title"].to_pylist()
    answer = films.post({"query": titles[7], "k": 3, "taste": 0}, f"{PATH}/search")
    assert ids(answer), answer.body
    similar = [one["similarity"] for one in answer.body["results"]]
    assert similar == sorted(similar, reverse=True)
    assert similar[0] > 0
    by_taste = films.post({"query": titles[7], "k": 24, "taste": 1, "history": ["film-1"]}, f"{PATH}/search")
    scores = retrieved(loaded(), [1])
    assert ids(by_taste) == [f"film-{i}" for i in np.argsort(-scores) if i not in (1, 5)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "give user_id or history"),
        ({"user_id": "a", "history": []}, "give user_id or history"),
        ({"history": [], "k": 0}, "k"),
        ({"history": [], "k": 1001}, "k"),
        ({"history": ["x" * 300]}, "history"),
        (
            {"history": [{"item": "film-1", "time": "2999-01-01T00:00:00Z"}]},
            "history.0.time is more than a day",
        ),
        ({"history": ["film-1"] * 10_001}, "history"),
        ({"history": [], "filters": {"categories": {"color": ["red"]}}}, "filters.categories.color"),
        ({"history": [], "filters": {"numbers": {"weight": [1, 2]}}}, "filters.numbers.weight"),
        ({"history": [], "context": {"shoe": 42}}, "context.shoe"),
        ({"history": [], "diversity": 2}, "diversity"),
        ({"history": [], "diversity": False}, "diversity"),
        ({"history": [], "exclude_seen": "yes"}, "exclude_seen"),
        ({"history": [], "k": "5"}, "k"),
        ({"history": [], "unknown": 1}, "unknown"),
    ],
)
def test_a_clients_mistake_is_a_4xx_that_says_which(films: Endpoint, body: dict[str, Any], says: str) -> None:
    answer = films.post(body, PATH)
    assert 400 <= answer.status < 500, answer.body
    assert says in f"{answer.body['error']['message']} {answer.body['error']['param']}"


def test_what_is_odd_but_right_is_answered(films: Endpoint) -> None:
    assert len(ids(films.post({"history": []}, PATH))) == 10
    assert len(ids(films.post({"user_id": "nobody"}, PATH))) == 10
    assert ids(films.post({"history": [], "context": {"town": "b"}}, PATH)) != []
    assert ids(films.post({"history": ["none", "of", "these"]}, PATH)) == ids(
        films.post({"history": []}, PATH)
    )
    assert len(ids(films.post({"history": ["film-1"] * 10_000}, PATH))) == 10
    nothing = films.post({"history": [], "filters": {"numbers": {"year": [9000, None]}}}, PATH)
    assert ids(nothing) == []
    unknown = films.get("/v1/items/film-99/similar")
    assert unknown.status == 404
    assert "'film-99'" in unknown.body["error"]["message"]


def test_no_canary_for_lists() -> None:
    from serve.recommend import application

    with pytest.raises(ConfigError, match=r"serving\.canary"):
        application(ServingSettings.model_validate({"canary": {}}))
