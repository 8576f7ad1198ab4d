"""Faults under load: what the clients of an application notice of them.

    make bench-faults           (python -m tests.bench.faults --applications chat --faults node index)

Two Ray nodes on this machine, each with a replica. `sentiment` is the champion of `make demo`, or one trained for `make
bench-serving`; `chat` is SmolLM2-135M-Instruct on vLLM, grounded in the help pages of jobs/knowledge, 16 tokens an answer.
Requests come at 70% of what was measured as capacity, whether or not earlier ones were answered, each under a request id
of its own; a client waits and tries again as OpenAI's does (ten minutes; twice, after 0.5 s and 1 s, on a lost
connection, 408, 429 or 5xx).
They come until the fault is over and both replicas are up again. After a third of the least time:

    replica     a replica's process is killed
    proxy       HAProxy is killed
    node        the second node is killed with all that runs there; another joins later
    database    the database answers nobody for 30 s
    version     another version is promoted and deployed, then rolled back and deployed
    index       chat: the knowledge base is made anew with a page more, which must be cited afterwards

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
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cluster.ingress import free_port
from lib import keys, registry, storage, tracking
from lib.artifacts import ModelRef
from lib.settings import Settings, load_settings
from tests.bench.chat import untuned
from tests.bench.report import Report
from tests.bench.retrieval import QUESTIONS
from tests.bench.serving import CONFIG, champion, ray_environment, reviews
from tests.training.nodes import descendants

FAULTS = ("replica", "proxy", "node", "database", "version", "index")
KNOWLEDGE = Path("jobs/knowledge")
AWAY_S = 30.0
"""How long the database is away."""
SHARE = 0.7
RETRIES = 2
MARK = "WHORL_BENCH_FAULTS"
BEGAN = "the first request is sent"
AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass
class Sent:
    """One request, until its last try."""

    id: str
    tries: int
    status: int
    """Of the last try; 0: the connection was lost."""
    seconds: float


class Application:
    """What is asked, and what serves it."""

    name = "sentiment"
    config = CONFIG
    route = "/v1/sentiment"
    faults = FAULTS[:-1]
    clients = 8
    """In flight at once where the capacity is measured."""
    cpus = 1
    """Of each node."""
    words = ("--serving.threads", "1")

    def bodies(self) -> list[dict[str, Any]]:
        return [{"inputs": [text]} for text in reviews(500)]

    def fill(self, folder: Path) -> None:
        """A version's files, before this bench turned to a store of its own."""
        with registry.open_version(champion()) as model:
            skipped = shutil.ignore_patterns(storage.COMPLETE)
            shutil.copytree(model, folder, dirs_exist_ok=True, ignore=skipped)

    def prepare(self) -> None:
        """What is needed before it is deployed, once Ray is up."""


class ChatApplication(Application):
    name = "chat"
    config = "jobs/configs/shop_chat.yaml"
    route = "/v1/chat/completions"
    faults = FAULTS
    clients = 4
    cpus = 3
    words = (
        "--serving.route_prefix", "/", "--serving.threads", "1", "--serving.request_timeout_s", "120",
        "--serving.chat.dtype", "bfloat16" if tracking.cpu_precision() == "bf16" else "float32",
    )  # fmt: skip

    def __init__(self) -> None:
        self.pages = Path(tempfile.mkdtemp(prefix="whorl-bench-")) / "pages"
        shutil.copytree(KNOWLEDGE, self.pages)

    def bodies(self) -> list[dict[str, Any]]:
        asked = [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()]
        return [self.body(text) for text in asked]

    def body(self, text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}

    def fill(self, folder: Path) -> None:
        untuned(folder)

    def prepare(self) -> None:
        from lib.retrieval.build import build
        from lib.retrieval.index import make_current
        from lib.retrieval.plan import plan

        planned = plan(load_settings(self.config, ["--knowledge.source", str(self.pages)]))
        build(planned, lambda _: None)
        make_current(planned.ref, 3)

    def add_page(self) -> None:
        (self.pages / "parking.md").write_text(
            "# Parking\n\nThere are twelve parking spaces behind the shop.\n"
        )
        self.prepare()


APPLICATIONS: dict[str, type[Application]] = {one.name: one for one in (Application, ChatApplication)}


async def send(client: Any, url: str, body: dict[str, Any]) -> Sent:
    import httpx

    one = Sent(str(uuid.uuid4()), 0, 0, 0.0)
    began = time.perf_counter()
    for again in range(RETRIES + 1):
        one.tries += 1
        try:
            answer = await client.post(url, json=body, headers={"x-request-id": one.id})
            one.status = answer.status_code
        except httpx.HTTPError:
            one.status = 0
        if one.status != 0 and one.status not in AGAIN:
            break
        if again < RETRIES:
            await asyncio.sleep(0.5 * 2**again)
    one.seconds = time.perf_counter() - began
    return one


async def open_loop(url: str, bodies: list[dict[str, Any]], rate: float) -> list[Sent]:
    """A request each 1/rate seconds, whatever became of those before, until the standard input ends."""
    import httpx

    headers = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits) as client:
        print(BEGAN, flush=True)
        began, asked = time.perf_counter(), list[asyncio.Task[Sent]]()
        while not ended.done():
            await asyncio.sleep(max(0.0, began + len(asked) / rate - time.perf_counter()))
            asked.append(asyncio.create_task(send(client, url, bodies[len(asked) % len(bodies)])))
        return await asyncio.gather(*asked)


async def closed_loop(url: str, bodies: list[dict[str, Any]], seconds: float, clients: int) -> float:
    """Requests a second, with so many always in flight: the capacity, this client's work included."""
    import httpx

    headers, answered = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}, 0
    until = time.perf_counter() + seconds
    async with httpx.AsyncClient(headers=headers, timeout=600) as client:

        async def ask(first: int) -> None:
            nonlocal answered
            number = first
            while time.perf_counter() < until:
                await send(client, url, bodies[number % len(bodies)])
                number, answered = number + clients, answered + 1

        await asyncio.gather(*(ask(i) for i in range(clients)))
    return answered / seconds


class Two:
    """Two nodes with a replica each, and what can happen to them."""

    def __init__(
        self, application: Application, settings: Settings, versions: tuple[ModelRef, ModelRef]
    ) -> None:
        import ray
        from ray import serve as ray_serve
        from ray.cluster_utils import Cluster

        from serve.deploy import deploy

        self.application, self.settings, self.versions = application, settings, versions
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": application.cpus, "include_dashboard": False}
        )
        self.second = self.cluster.add_node(num_cpus=application.cpus)
        ray.init(address=self.cluster.address, logging_level="warning")
        # Both nodes have one address and so one port: the proxy is the first node's alone.
        listening = {"host": settings.serving.host, "port": settings.serving.port}
        ray_serve.start(proxy_location="HeadOnly", http_options=listening)
        application.prepare()
        self.url = f"{deploy(settings)}{application.route}"
        self.wait()

    def details(self) -> dict[str, Any]:
        from ray.serve.context import _get_global_client

        found: dict[str, Any] = _get_global_client().get_serve_details()["applications"][self.settings.name]
        return found

    def replicas(self) -> list[dict[str, Any]]:
        """Those that compute: of chat, the engine's."""
        deployments = self.details()["deployments"]
        name = next((name for name in deployments if name.startswith("Engine")), "Sentiment")
        found: list[dict[str, Any]] = deployments[name]["replicas"]
        return found

    def wait(self, seconds: float = 240) -> None:
        """Until both replicas run."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = [replica["state"] for replica in self.replicas()]
            if states == ["RUNNING", "RUNNING"] and self.details()["status"] == "RUNNING":
                return
            time.sleep(0.3)
        sys.exit(f"the application did not recover: {self.details()['status']}")

    def replica(self, seconds: float) -> None:
        psutil.Process(self.replicas()[0]["pid"]).kill()

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
        self.second = self.cluster.add_node(num_cpus=self.application.cpus)

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

    def index(self, seconds: float) -> None:
        assert isinstance(self.application, ChatApplication)
        self.application.add_page()
        time.sleep(seconds)
        asked = asyncio.run(cited(self.url, self.application.body("where can I park my car?")))
        if "parking.md" not in asked:
            sys.exit(f"the new page is not cited, but {asked}")

    def close(self) -> None:
        import ray
        from ray import serve as ray_serve

        ray_serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


async def cited(url: str, body: dict[str, Any]) -> list[str]:
    """The sources of an answer."""
    import httpx

    async with httpx.AsyncClient(timeout=600) as client:
        headers = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}
        answer = await client.post(url, json=body, headers=headers)
        return [one["source"] for one in answer.raise_for_status().json()["citations"]]


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
    """The load, from a process of its own, with the fault in its midst; for so many seconds at least."""
    with tempfile.TemporaryDirectory() as folder:
        out, bodies = Path(folder) / "out.json", Path(folder) / "bodies.json"
        bodies.write_text(json.dumps(two.application.bodies()))
        command = [sys.executable, "-m", "tests.bench.faults", "load", "--url", two.url, "--rate", str(rate)]
        command += ["--out", str(out), "--bodies", str(bodies)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while process.stdout.readline().strip() != BEGAN:  # its imports take 10 s
                if process.poll() is not None:
                    sys.exit("the client failed")
            began = time.monotonic()
            time.sleep(seconds / 3)
            happens: Callable[[float], None] = getattr(two, fault)
            happens(AWAY_S if fault == "database" else seconds / 3)
            two.wait()
            time.sleep(max(5.0, began + seconds - time.monotonic()))
        finally:
            process.stdin.close()
            failed = process.wait(timeout=300)
        if failed:
            sys.exit("the client failed")
        return [Sent(**one) for one in json.loads(out.read_text())]


def two_versions(application: Application, name: str, store: Path) -> tuple[ModelRef, ModelRef]:
    """A model as two versions of a store of its own, the first of them champion: nothing of a user's changes."""
    with tempfile.TemporaryDirectory() as scratch:
        application.fill(Path(scratch))
        os.environ |= {"WHORL_STORAGE": str(store), "WHORL_DATABASE": f"sqlite:///{store / 'whorl.db'}"}
        tracking.client().create_registered_model(name)
        first, second = ModelRef(name, 1), ModelRef(name, 2)
        for ref in (first, second):
            with storage.publish(ref.uri) as folder:
                shutil.copytree(scratch, folder, dirs_exist_ok=True)
            tracking.client().create_model_version(name, source=ref.uri)
    assert registry.crown(first, None)
    return first, second


def main(applications: list[str], faults: list[str], seconds: float) -> None:
    report = Report("faults")
    places = {name: os.environ.get(name) for name in ("WHORL_STORAGE", "WHORL_DATABASE")}
    for name in applications:
        os.environ |= {key: value for key, value in places.items() if value is not None}
        run(report, APPLICATIONS[name](), faults, seconds)
    report.finish()


def run(report: Report, application: Application, faults: list[str], seconds: float) -> None:
    with tempfile.TemporaryDirectory() as store:
        versions = two_versions(application, load_settings(application.config).name, Path(store))
        limits = {"requests_per_minute": 10_000_000, "tokens_per_minute": 1_000_000_000}
        _, os.environ["BENCH_KEY"] = keys.create("bench", ["*"], days=1, **limits)
        words = ["--serving.port", str(free_port()), "--serving.min_replicas", "2"]
        words += ["--serving.max_replicas", "2", *application.words]
        two = Two(application, load_settings(application.config, words), versions)
        try:
            measure(report, two, [fault for fault in faults if fault in application.faults], seconds)
        finally:
            two.close()


def measure(report: Report, two: Two, faults: list[str], seconds: float) -> None:
    kind, bodies = two.application, two.application.bodies()
    asyncio.run(closed_loop(two.url, bodies, 5, kind.clients))  # kernels of all shapes are made
    capacity = asyncio.run(closed_loop(two.url, bodies, 15, kind.clients))
    report.row(f"{kind.name}: capacity", capacity, unit="requests/s")
    for fault in faults:
        rows(report, f"{kind.name}, {fault}", put(two, fault, SHARE * capacity, seconds))


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
    parser.add_argument("--applications", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seconds", type=float, default=45, help="of load at least, for each fault")
    for name in ("url", "rate", "out", "bodies"):
        parser.add_argument(f"--{name}", help="of load")
    arguments = parser.parse_args()
    if arguments.what == "load":
        bodies = json.loads(Path(arguments.bodies).read_text())
        load = open_loop(arguments.url, bodies, float(arguments.rate))
        Path(arguments.out).write_text(json.dumps([asdict(one) for one in asyncio.run(load)]))
    elif os.environ.get(MARK) is None:
        # Ray reads its environment when it is imported, and what this module imports has done that.
        given = {**os.environ, **ray_environment(), "RAY_AUTH_MODE": "disabled", MARK: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench.faults", *sys.argv[1:]], given)
    else:
        main(arguments.applications, arguments.faults, arguments.seconds)
