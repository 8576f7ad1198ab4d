"""Faults under load: what the clients of a sentiment application notice of them.

    make bench-faults

Two Ray nodes on this machine, each with a replica; the champion of `make demo`, or one trained for `make bench-serving`.
Requests come at 70% of what was measured as capacity, whether or not earlier ones were answered, each under a request id
of its own; a client tries again as OpenAI's does (twice, after 0.5 s and 1 s, on a lost connection, 408, 429 or 5xx).
While they come, after a third of the time:

    replica     a replica's process is killed
    proxy       HAProxy is killed
    node        the second node is killed with all that runs there; another joins later
    database    the database answers nobody for half of the time
    version     another version is promoted and deployed, then rolled back and deployed

Shown for each: requests sent, tried again, failed in the end; p50 and p99 of the time until the answer, retries
included; answers without an event in the database once it is quiet again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cluster.local import free_port
from lib import keys, registry, storage, tracking
from lib.artifacts import ModelRef
from lib.settings import Settings, load_settings
from tests.bench.report import Report
from tests.bench.serving import CONFIG, champion, ray_environment, reviews
from tests.training.nodes import descendants

FAULTS = ("replica", "proxy", "node", "database", "version")
SHARE = 0.7
RETRIES = 2
MARK = "WHORL_BENCH_FAULTS"
AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass
class Sent:
    """One request, until its last try."""

    id: str
    tries: int
    status: int
    """Of the last try; 0: the connection was lost."""
    seconds: float


async def send(client: Any, url: str, text: str) -> Sent:
    import httpx

    one = Sent(str(uuid.uuid4()), 0, 0, 0.0)
    began = time.perf_counter()
    for again in range(RETRIES + 1):
        one.tries += 1
        try:
            answer = await client.post(url, json={"inputs": [text]}, headers={"x-request-id": one.id})
            one.status = answer.status_code
        except httpx.HTTPError:
            one.status = 0
        if one.status != 0 and one.status not in AGAIN:
            break
        if again < RETRIES:
            await asyncio.sleep(0.5 * 2**again)
    one.seconds = time.perf_counter() - began
    return one


async def open_loop(url: str, texts: list[str], rate: float, seconds: float) -> list[Sent]:
    """A request each 1/rate seconds, whatever became of those before."""
    import httpx

    headers = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    async with httpx.AsyncClient(headers=headers, timeout=30, limits=limits) as client:
        began, asked = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            asked.append(asyncio.create_task(send(client, url, texts[number % len(texts)])))
        return await asyncio.gather(*asked)


async def closed_loop(url: str, texts: list[str], seconds: float, clients: int = 8) -> float:
    """Requests a second, with so many always in flight: the capacity, this client's work included."""
    import httpx

    headers, answered = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}, 0
    until = time.perf_counter() + seconds
    async with httpx.AsyncClient(headers=headers, timeout=30) as client:

        async def ask(first: int) -> None:
            nonlocal answered
            number = first
            while time.perf_counter() < until:
                await send(client, url, texts[number % len(texts)])
                number, answered = number + clients, answered + 1

        await asyncio.gather(*(ask(i) for i in range(clients)))
    return answered / seconds


class Two:
    """Two nodes with a replica each, and what can happen to them."""

    def __init__(self, settings: Settings, versions: tuple[ModelRef, ModelRef]) -> None:
        import ray
        from ray import serve as ray_serve
        from ray.cluster_utils import Cluster

        from serve.deploy import deploy

        self.settings, self.versions = settings, versions
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.second = self.cluster.add_node(num_cpus=1)
        ray.init(address=self.cluster.address, logging_level="warning")
        # Both nodes have one address and so one port: the proxy is the first node's alone.
        listening = {"host": settings.serving.host, "port": settings.serving.port}
        ray_serve.start(proxy_location="HeadOnly", http_options=listening)
        self.url = f"{deploy(settings)}/v1/sentiment"
        self.wait()

    def details(self) -> dict[str, Any]:
        from ray.serve.context import _get_global_client

        found: dict[str, Any] = _get_global_client().get_serve_details()["applications"][self.settings.name]
        return found

    def wait(self, seconds: float = 120) -> None:
        """Until both replicas run."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            app = self.details()
            states = [r["state"] for r in app["deployments"]["Sentiment"]["replicas"]]
            if states == ["RUNNING", "RUNNING"] and app["status"] == "RUNNING":
                return
            time.sleep(0.3)
        sys.exit(f"the application did not recover: {self.details()['status']}")

    def replica(self, seconds: float) -> None:
        psutil.Process(self.details()["deployments"]["Sentiment"]["replicas"][0]["pid"]).kill()

    def proxy(self, seconds: float) -> None:
        for node in (self.cluster.head_node, self.second):
            for process in descendants(node):
                with suppress(psutil.NoSuchProcess):
                    if process.name() == "haproxy":
                        process.kill()

    def node(self, seconds: float) -> None:
        lost = descendants(self.second)
        self.cluster.remove_node(self.second, allow_graceful=False)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(seconds / 2)
        self.second = self.cluster.add_node(num_cpus=1)

    def database(self, seconds: float) -> None:
        file = tracking.database_url().removeprefix("sqlite:///")
        with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")

    def version(self, seconds: float) -> None:
        from serve.deploy import deploy

        first, second = self.versions
        if not registry.crown(second, registry.champion(first.name)):
            sys.exit("the champion changed meanwhile")
        deploy(self.settings)
        time.sleep(seconds / 2)
        registry.roll_back(first.name, "bench")
        deploy(self.settings)

    def close(self) -> None:
        import ray
        from ray import serve as ray_serve

        ray_serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


def without_event(ids: list[str], patience_s: float = 60) -> int:
    """Answers that have no event, when it does not get less any more."""
    from sqlalchemy import select

    from lib import database
    from lib.events import EVENTS

    deadline, missing = time.monotonic() + patience_s, set(ids)
    while missing and time.monotonic() < deadline:
        with database.engine().connect() as db:
            missing -= set(db.execute(select(EVENTS.c.id)).scalars())
        time.sleep(1)
    return len(missing)


def put(two: Two, fault: str, rate: float, seconds: float) -> list[Sent]:
    """The load, from a process of its own, with the fault in its midst."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "tests.bench.faults", "load", "--url", two.url, "--rate", str(rate)]
        command += ["--seconds", str(seconds), "--out", str(out)]
        process = subprocess.Popen(command)
        time.sleep(seconds / 3)
        happens: Callable[[float], None] = getattr(two, fault)
        thread = threading.Thread(target=happens, args=(seconds / 2 if fault == "database" else seconds / 3,))
        thread.start()
        if process.wait(timeout=seconds + 180):
            sys.exit("the client failed")
        thread.join()
        return [Sent(**one) for one in json.loads(out.read_text())]


def two_versions(model: Path, store: Path) -> tuple[ModelRef, ModelRef]:
    """A model directory as two versions of a store of its own, the first of them champion: nothing of a user's
    changes."""
    os.environ |= {"WHORL_STORAGE": str(store), "WHORL_DATABASE": f"sqlite:///{store / 'whorl.db'}"}
    name = load_settings(CONFIG).name
    tracking.client().create_registered_model(name)
    first, second = ModelRef(name, 1), ModelRef(name, 2)
    for ref in (first, second):
        with storage.publish(ref.uri) as folder:
            shutil.copytree(
                model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(storage.COMPLETE)
            )
        tracking.client().create_model_version(name, source=ref.uri)
    assert registry.crown(first, None)
    return first, second


def main(faults: list[str], seconds: float) -> None:
    report = Report("faults")
    with registry.open_version(champion()) as model, tempfile.TemporaryDirectory() as store:
        versions = two_versions(model, Path(store))
        _, os.environ["BENCH_KEY"] = keys.create("bench", ["*"], requests_per_minute=10_000_000, days=1)
        words = ["--serving.port", str(free_port()), "--serving.min_replicas", "2"]
        words += ["--serving.max_replicas", "2", "--serving.threads", "1"]
        two = Two(load_settings(CONFIG, words), versions)
        try:
            measure(report, two, faults, seconds)
        finally:
            two.close()
    report.finish()


def measure(report: Report, two: Two, faults: list[str], seconds: float) -> None:
    capacity = asyncio.run(closed_loop(two.url, reviews(500), 10))
    report.row("capacity", capacity, unit="requests/s")
    for fault in faults:
        rows(report, fault, put(two, fault, SHARE * capacity, seconds))
        two.wait()


def rows(report: Report, fault: str, sent: list[Sent]) -> None:
    good = [one for one in sent if one.status == 200]
    p50, p99 = np.percentile([1e3 * one.seconds for one in good], [50, 99])
    failed = len(sent) - len(good)
    report.row(f"{fault}: requests sent", len(sent), unit="requests")
    report.row(f"{fault}: tried again", sum(one.tries > 1 for one in sent), unit="requests")
    report.row(f"{fault}: failed in the end", failed, unit="requests", target=0, higher_is_better=False)
    report.row(f"{fault}: p50", float(p50), unit="ms")
    report.row(f"{fault}: p99", float(p99), unit="ms")
    lost = without_event([one.id for one in good])
    report.row(f"{fault}: answers without an event", lost, unit="events", target=0, higher_is_better=False)
    print(f"{fault}: {len(sent)} sent, {failed} failed, {lost} events lost", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="bench", choices=["bench", "load"])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seconds", type=float, default=45, help="of load, for each fault")
    for name in ("url", "rate", "out"):
        parser.add_argument(f"--{name}", help="of load")
    arguments = parser.parse_args()
    if arguments.what == "load":
        load = open_loop(arguments.url, reviews(500), float(arguments.rate), arguments.seconds)
        Path(arguments.out).write_text(json.dumps([asdict(one) for one in asyncio.run(load)]))
    elif os.environ.get(MARK) is None:
        # Ray reads its environment when it is imported, and what this module imports has done that.
        given = {**os.environ, **ray_environment(), "RAY_AUTH_MODE": "disabled", MARK: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench.faults", *sys.argv[1:]], given)
    else:
        main(arguments.faults, arguments.seconds)
