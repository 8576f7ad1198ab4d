"""Recommendations over HTTP with catalogues of 1,682, 100,000 and 1,000,000 items, beside implicit behind FastAPI.

    make bench-recommend-serving        (python -m tests.bench.recommend_serving --items 1682 100000 1000000)

Ours is what `serve.deploy` deploys: Ray Serve behind HAProxy, one replica, keys, limits and events on, two stages, reasons,
diversity, a cap on a category and exploration. Neighbours, texts and the network that reads histories are random, of the
sizes that MovieLens' are. So are the vectors of items, but in heaps within larger heaps, and a user's 50 interactions are with
items of three heaps: those of trained models lie so, and how much an index must read goes by it (no heap, no index that
reads little: all distances are alike). A catalogue of more than `model.recommender.exact_items` is served through the index that
the export makes, whose recall against the exact answer is told beside. Each request names a user of the database, and asks for
10 items. The rival is implicit's `recommend` of as many random factors behind FastAPI and uvicorn, with the user's items in its
matrix. One server is up at a time; the client (tests/bench/load.py) shares the machine with it.

Then, with two replicas: how long it takes from the sending of an interaction until no replica's answer shows its item
any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ingress import free_port
from lib import keys, storage
from lib.artifacts import ModelRef, TaskFile
from lib.base_models import base_directory
from lib.recommender import store
from lib.recommender.index import Measured as Indexed
from lib.recommender.neighbours import Neighbours
from lib.recommender.predictor import History
from lib.recommender.signals import Signals
from lib.recommender.store import Interaction
from lib.settings import Settings, load_settings
from tests.bench.report import Report
from tests.bench.serving import Measured, healthy, measure, ray_environment, running
from tests.recommending import clustered, companions, write_version

CONFIG = "jobs/configs/movies.yaml"
ITEMS = (1_682, 100_000, 1_000_000)
CLIENTS = (1, 8, 32)
USERS, HISTORY, K = 1_000, 50, 10
RIVAL_ITEMS = 100_000
GENRES, NEIGHBOURS = 19, 64
# The network's weights are this times those it begins with: so what somebody did counts as much as what is popular.
GAIN = 4
PATH = "/v1/recommendations"


def settings_of(port: int, replicas: int = 1) -> Settings:
    words = {
        "serving.model": "movies@1",
        "serving.route_prefix": "/",
        "serving.port": port,
        "serving.min_replicas": replicas,
        "serving.max_replicas": replicas,
        "serving.recommend.diversity": 0.2,
        "serving.recommend.explore": 0.05,
        "serving.recommend.caps": "{genre: 6}",
    }
    return load_settings(CONFIG, [word for key, value in words.items() for word in (f"--{key}", str(value))])


def publish(items: int) -> Indexed | None:
    """movies@1: a model of random items; what was measured of its index, where there is one."""
    import torch

    from lib.recommender import index, predictor, signals
    from lib.recommender.model import Facts, Recommender, Shape
    from lib.recommender.ranker import Ranker

    random = np.random.default_rng(0)
    settings = settings_of(1)
    base = base_directory(settings.model.base)
    none = np.zeros(0, np.int64)
    numbers = {"mean": [], "spread": []}
    genres = [f"genre=g{i:02d}" for i in range(GENRES)]
    shape = Shape(
        items=0, text_width=384, item_categories=genres, item_numbers=numbers, user_categories=[],
        user_numbers=numbers, events=[""], settings=settings.model.recommender.model_dump(mode="json"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Recommender(
        shape, Facts(none, none, np.zeros((0, 0), np.float32), none, np.zeros((0, 384), np.float32))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(GAIN)
    codes = np.sort(random.integers(0, GENRES, (items, 2)), 1)
    seen = random.integers(1, 1000, items).astype(np.float32)
    names = signals.names([], [])
    with storage.publish(ModelRef("movies", 1).uri) as folder:
        predictor.write(model, base, TaskFile("recommend", [], 64, settings.model.base, "0" * 16), folder)
        width = shape.recommender.width
        vectors, _ = heaps(items)
        table = pa.table(
            {
                "item": [f"item-{i}" for i in range(items)],
                "title": [f"A film of number {i}" for i in range(items)],
                "text": [f"A film of number {i}" for i in range(items)],
                "categories": pa.array([[genres[a], genres[b]] for a, b in codes.tolist()]),
                "numbers": pa.array([[]] * items, pa.list_(pa.float32())),
                "interactions": pa.array(seen.astype(np.int32)),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width),
                "bias": pa.array(random.standard_normal(items, np.float32)),
            }
        )
        pq.write_table(table, folder / "items-00000.parquet")
        random_signals(items, seen, codes, random).write(folder)
        weights = [1.0, *random.random(len(names) - 1).tolist()]
        Ranker(names, [], weights, 0.8, {}).write(folder)
        measured = None
        if items > shape.recommender.exact_items:
            loaded = predictor.load(folder, settings.serving)
            histories = taken(items)[: index.ASKED]
            users = loaded.users([did(rows) for rows in histories])
            measured = index.make(loaded.vectors, loaded.bias, users, histories, folder)
            print(measured, flush=True)
        write_version(folder)
    return measured


def heaps(items: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the items, and which heap each is of."""
    return clustered(items, settings_of(1).model.recommender.width, np.random.default_rng(2))


def taken(items: int) -> list[np.ndarray]:
    """What each of the users has taken, in order."""
    _, of = heaps(items)
    return companions(of, USERS, HISTORY, np.random.default_rng(1))


def did(rows: np.ndarray) -> History:
    """As the model is told of it."""
    none = np.zeros(0, np.int64)
    return History(rows, np.arange(len(rows)), np.zeros(len(rows), np.int64), none, np.zeros(0, np.float32))


def random_signals(items: int, seen: np.ndarray, codes: np.ndarray, random: np.random.Generator) -> Signals:
    near = [
        Neighbours(
            np.arange(items + 1, dtype=np.int64) * NEIGHBOURS,
            random.integers(0, items, items * NEIGHBOURS, np.int32),
            random.random(items * NEIGHBOURS, np.float32),
            0.8,
        )
        for _ in range(2)
    ]
    return Signals(
        *near, 10**9, random.standard_normal((items, 384), np.float32).astype(np.float16), seen, seen / 10,
        np.full(items, 9 * 10**8), np.full(GENRES, 1 / GENRES, np.float32), codes.ravel().astype(np.int64),
        np.arange(items + 1, dtype=np.int64) * 2, np.zeros((items, 0), np.float32),
    )  # fmt: skip


def remember(items: int) -> None:
    """What the users have done."""
    now = int(time.time())
    for user, rows in enumerate(taken(items)):
        done = [
            Interaction(f"user-{user}", f"item-{r}", "", now - 600 + i) for i, r in enumerate(rows.tolist())
        ]
        store.add("movies", done)


def serve_ours(port: int, replicas: int) -> None:
    """Deploy on a Ray of our own and stay up until our input ends."""
    import ray
    from ray import serve as ray_serve

    from serve.deploy import deploy

    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as folder:
        cores = max(8, os.cpu_count() or 1)
        ray.init(num_cpus=cores, include_dashboard=False, logging_level="warning", _temp_dir=folder)
        print(deploy(settings_of(port, replicas)), flush=True)
        sys.stdin.read()
        ray_serve.shutdown()
        ray.shutdown()


def serve_rival(port: int) -> None:
    """implicit's recommend, in a thread for each request, as FastAPI has it."""
    import uvicorn
    from fastapi import FastAPI
    from implicit.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    random = np.random.default_rng(0)
    model = AlternatingLeastSquares(factors=64, num_threads=1)
    model.item_factors = random.standard_normal((RIVAL_ITEMS, 64), np.float32)
    model.user_factors = random.standard_normal((USERS, 64), np.float32)
    rows = np.repeat(np.arange(USERS), HISTORY)
    had = csr_matrix(
        (np.ones(len(rows), np.float32), (rows, random.integers(0, RIVAL_ITEMS, len(rows)))),
        (USERS, RIVAL_ITEMS),
    )
    app = FastAPI()

    @app.get("/healthz")
    def up() -> dict[str, str]:
        return {"status": "ok"}

    @app.post(PATH)
    def recommend(body: dict[str, Any]) -> dict[str, Any]:
        user = int(body["user_id"].rpartition("-")[2])
        items, scores = model.recommend(user, had[user], N=body["k"], filter_already_liked_items=True)
        return {"items": [f"item-{i}" for i in items.tolist()], "scores": scores.tolist()}

    threading.Thread(
        target=uvicorn.run, args=(app,), kwargs={"port": port, "log_level": "warning"}, daemon=True
    ).start()
    sys.stdin.read()


def bodies() -> list[dict[str, Any]]:
    return [{"user_id": f"user-{user}", "k": K} for user in range(USERS)]


def ours(items: int, seconds: float) -> list[Measured]:
    port = free_port()
    with running(
        ["tests.bench.recommend_serving", "--serve", "ours", "--port", str(port)],
        lambda: healthy(f"http://127.0.0.1:{port}/readyz"),
        **ray_environment(),
    ):
        return [measure(f"http://127.0.0.1:{port}{PATH}", bodies(), c, seconds) for c in CLIENTS]


def theirs(seconds: float) -> list[Measured]:
    port = free_port()
    with running(
        ["tests.bench.recommend_serving", "--serve", "rival", "--port", str(port)],
        lambda: healthy(f"http://127.0.0.1:{port}/healthz"),
        OPENBLAS_NUM_THREADS="1",  # as implicit asks for: with more, requests at once are in one another's way
    ):
        return [measure(f"http://127.0.0.1:{port}{PATH}", bodies(), c, seconds) for c in CLIENTS]


def until_changed(report: Report, rounds: int) -> None:
    """With two replicas: from the sending of an interaction to the first answer of every replica without its item."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    waited = []
    with running(
        ["tests.bench.recommend_serving", "--serve", "ours", "--port", str(port), "--replicas", "2"],
        lambda: healthy(f"{url}/readyz"),
        **ray_environment(),
    ), httpx.Client(headers={"authorization": f"Bearer {os.environ['BENCH_KEY']}"}, timeout=60) as client:  # fmt: skip
        for number in range(rounds):
            user = f"user-{number % USERS}"
            asked = {"user_id": user, "k": K}
            item = client.post(f"{url}{PATH}", json=asked).json()["results"][0]["item"]
            began = time.perf_counter()
            client.post(f"{url}/v1/interactions", json={"interactions": [{"user_id": user, "item": item}]})
            clear = 0
            while clear < 6:  # so many in a row that both replicas were asked
                found = client.post(f"{url}{PATH}", json=asked).json()["results"]
                clear = 0 if item in {one["item"] for one in found} else clear + 1
                if clear == 1:
                    waited.append(time.perf_counter() - began)
                elif clear == 0 and waited and len(waited) > number:
                    waited.pop()
    report.row(
        f"interaction to changed answer, 2 replicas, {rounds} times: p99",
        float(np.quantile(waited, 0.99) * 1e3),
        unit="ms", target=1000, higher_is_better=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recommend_serving", description=__doc__)
    parser.add_argument("--items", nargs="+", type=int, default=list(ITEMS))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--serve", choices=["ours", "rival"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--replicas", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve == "ours":
        serve_ours(given.port, given.replicas)
    elif given.serve == "rival":
        serve_rival(given.port)
    else:
        compare(given.items, given.seconds, given.rounds)


def compare(sizes: list[int], seconds: float, rounds: int) -> None:
    report = Report("recommend-serving")
    rival = theirs(seconds)
    for items in sizes:
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"WHORL_STORAGE": folder, "WHORL_DATABASE": f"sqlite:///{folder}/whorl.db"}
            print(f"{items:,} items", flush=True)
            measured = publish(items)
            remember(items)
            os.environ["BENCH_KEY"] = keys.create("bench", ["*"], requests_per_minute=1_000_000, days=1)[1]
            for clients, one, other in zip(CLIENTS, ours(items, seconds), rival, strict=True):
                rows(report, items, clients, one, other)
            if measured is not None:
                case = f"{items:,} items: recall@{measured.depth} of the exact answer"
                report.row(
                    case, measured.recall, unit="", target=settings_of(1).serving.recommend.least_recall
                )
            if items == min(sizes):
                until_changed(report, rounds)
    for name in ("WHORL_STORAGE", "WHORL_DATABASE", "BENCH_KEY"):
        del os.environ[name]
    report.finish()


def rows(report: Report, items: int, clients: int, own: Measured, other: Measured) -> None:
    beside = {"rival": "implicit, FastAPI"} if items == RIVAL_ITEMS else {}
    case = f"{items:,} items, {clients} clients"
    report.row(
        f"{case}: requests/s", own.requests_per_s, unit="",
        **beside, **({"theirs": other.requests_per_s, "target": 1.0} if beside else {}),
    )  # fmt: skip
    report.row(f"{case}: p50", own.p50_ms, unit="ms", higher_is_better=False,
        **beside, **({"theirs": other.p50_ms} if beside else {}))  # fmt: skip
    report.row(f"{case}: p99", own.p99_ms, unit="ms", higher_is_better=False,
        target=20.0 if (items, clients) == (RIVAL_ITEMS, 8) else None)  # fmt: skip


if __name__ == "__main__":
    main()
