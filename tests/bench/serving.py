"""Requests over HTTP: this project beside FastAPI + uvicorn around transformers' pipeline.

    make bench-serving

Both serve the same checkpoint and get the same reviews, one a request, as they come, from the same client
(tests/bench/load.py), which shares the machine with them. Ours is what `serve.deploy` deploys: Ray Serve
behind HAProxy, one replica, default settings. The rival (tests/bench/pipeline_server.py) is written in two
ways, and each figure is compared with the better of them. One server is up at a time. Then the answers
themselves are compared with transformers in fp32, and the engines with each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster import ingress
from cluster.ingress import free_port
from cluster.local import environment
from lib import keys, registry, storage, tracking
from lib.artifacts import ModelRef, TaskFile
from lib.engines import load_encoder
from lib.errors import RegistryError
from lib.samples import sample_path
from lib.settings import ServingSettings, load_settings
from lib.tasks import sentiment
from tests.bench.report import Report

CONFIG = "jobs/configs/reviews.yaml"
CLIENTS = (1, 8, 32)
RIVALS = ("threads", "loop")
REVIEWS = 6000
AGREEMENT_REVIEWS = 2000
ENGINE_REVIEWS = 1000
START_SECONDS = 180


@dataclass(frozen=True)
class Measured:
    """One server under one number of clients."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float


def reviews(count: int) -> list[str]:
    """The first reviews of the sample, in its order."""
    column = pq.read_table(sample_path("sample://reviews", "data"), columns=["Review Text"])["Review Text"]
    return [text for text in column.to_pylist() if text][:count]


def champion() -> ModelRef:
    """The project's champion, or else one trained for this bench, in a store of its own."""
    try:
        return registry.resolve("reviews")
    except RegistryError:
        own = storage.PROJECT / ".whorl" / "bench" / "serving"
        os.environ |= {"WHORL_STORAGE": str(own), "WHORL_DATABASE": f"sqlite:///{own / 'whorl.db'}"}
    try:
        return registry.resolve("reviews")
    except RegistryError:
        print("no champion yet: training one on 4,000 reviews first", flush=True)
    for job in ("preprocess", "finetune", "evaluate", "promote"):
        words = [f"jobs.{job}", "--config", CONFIG, "--data.limit", "4000"]
        subprocess.run([sys.executable, "-m", *words], check=True)
    return registry.resolve("reviews")


def serve_ours(port: int, model: str) -> None:
    """Deploy on a Ray of our own and stay up until our input ends."""
    import ray
    from ray import serve as ray_serve

    from serve.deploy import deploy

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as folder:
        ray.init(num_cpus=max(8, cores), include_dashboard=False, logging_level="warning", _temp_dir=folder)
        print(
            deploy(load_settings(CONFIG, ["--serving.model", model, "--serving.port", str(port)])), flush=True
        )
        sys.stdin.read()
        ray_serve.shutdown()
        ray.shutdown()


@contextmanager
def running(command: list[str], is_up: Callable[[], bool], **variables: str) -> Iterator[None]:
    """A server in a process of its own, a module with its arguments, from when it answers. It ends with its input, or
    else by a signal."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_up():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{command[0]} did not come up:\n{log.read()[-3000:]}")
                time.sleep(0.3)
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if not command[0].startswith("tests."):
                process.terminate()
            process.wait(timeout=60)


def healthy(url: str) -> bool:
    """Whether a GET is answered 200."""
    import httpx

    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def answers(url: str) -> bool:
    try:
        return len(ask(url, ["good"])) == 1
    except OSError:
        return False


def ask(url: str, texts: list[str]) -> list[Any]:
    import httpx

    try:
        headers = {"authorization": f"Bearer {os.environ['BENCH_KEY']}"}
        answer = httpx.post(url, json={"inputs": texts}, headers=headers, timeout=60)
    except httpx.HTTPError as error:
        raise OSError(str(error)) from error
    if answer.status_code != 200:
        raise OSError(f"{answer.status_code}: {answer.text[:300]}")
    results: list[Any] = answer.json()["results"]
    return results


def measure(url: str, requests: list[dict[str, Any]], clients: int, seconds: float) -> Measured:
    """Run the load client against a server. Exits when a request failed: then there is nothing to compare."""
    with tempfile.TemporaryDirectory() as folder:
        bodies, out = Path(folder) / "bodies.jsonl", Path(folder) / "out.json"
        bodies.write_text("\n".join(map(json.dumps, requests)))
        command = [sys.executable, "-m", "tests.bench.load", url, bodies, out, clients, seconds]
        subprocess.run(list(map(str, command)), check=True)
        found = json.loads(out.read_text())
    if found["failed"]:
        sys.exit(f"{found['failed']} of {len(found['latencies_ms'])} requests to {url} failed")
    p50, p99 = np.percentile(found["latencies_ms"], [50, 99])
    result = Measured(len(found["latencies_ms"]) / found["seconds"], float(p50), float(p99))
    print(
        f"    {clients:2} clients: {result.requests_per_s:6.1f}/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms",
        flush=True,
    )
    return result


def compare_answers(report: Report, results: list[Any], texts: list[str], folder: Path) -> None:
    """Our answers beside transformers' own, in fp32 and without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    expected = []
    with torch.inference_mode():
        for text in texts:
            logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits
            expected.append(torch.softmax(logits[0], -1).numpy())
    ours = np.array([[result["scores"][label] for label in labels] for result in results])
    theirs = np.stack(expected)
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    report.row(f"label agreement, {len(texts)} reviews", 100 * same, unit="%", target=99.5)
    report.row("largest score difference", float(abs(ours - theirs).max()), unit="", higher_is_better=False)


def compare_engines(report: Report, texts: list[str], folder: Path) -> None:
    """Rows per second in batches, and one row alone, without HTTP; all against torch in fp32."""
    tokenizer = sentiment.load_tokenizer(folder, TaskFile.read(folder).max_length)
    rows, _ = sentiment.tokenize(tokenizer, texts)
    first: tuple[float, float] | None = None
    # Where a processor has no bf16, it takes minutes.
    precisions = list(dict.fromkeys(["fp32", tracking.cpu_precision()]))
    for engine, precision in itertools.product(("torch", "openvino"), precisions):
        encoder = load_encoder(
            folder, ServingSettings.model_validate({"engine": engine, "precision": precision})
        )
        encoder.logits(rows)  # kernels of all shapes are made
        start = time.perf_counter()
        encoder.logits(rows)
        speed = len(rows) / (time.perf_counter() - start)
        alone = []
        for row in rows[:200]:
            start = time.perf_counter()
            encoder.logits([row])
            alone.append((time.perf_counter() - start) * 1e3)
        one = float(np.median(alone))
        first = first or (speed, one)
        report.row(
            f"engine {encoder.name}, batches", speed, unit="rows/s", rival="torch fp32", theirs=first[0]
        )
        report.row(
            f"engine {encoder.name}, one row", one, unit="ms", rival="torch fp32", theirs=first[1],
            higher_is_better=False,
        )  # fmt: skip


def main(seconds: float) -> None:
    ref = champion()
    # With a limit, so that it is counted too.
    _, os.environ["BENCH_KEY"] = keys.create("bench", ["*"], requests_per_minute=1_000_000, days=1)
    texts = reviews(REVIEWS)
    chosen, bodies = texts[:AGREEMENT_REVIEWS], [{"inputs": [text]} for text in texts]
    report = Report("serving")
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with registry.open_version(ref) as folder:
        rival: dict[str, list[Measured]] = {}
        command = [
            "uvicorn",
            "tests.bench.pipeline_server:app",
            "--port",
            str(port),
            "--log-level",
            "warning",
        ]
        with running(command, lambda: answers(f"{base}/loop"), MODEL=str(folder)):
            for kind in RIVALS:
                print(f"transformers pipeline in FastAPI + uvicorn, {kind}:", flush=True)
                rival[kind] = [measure(f"{base}/{kind}", bodies, clients, seconds) for clients in CLIENTS]
        url = f"{base}/v1/sentiment"
        command = ["tests.bench.serving", "serve-ours", "--model", str(ref), "--port", str(port)]
        with running(command, lambda: answers(url), **ray_environment()):
            print(f"Whorl, {ref}:", flush=True)
            ours = [measure(url, bodies, clients, seconds) for clients in CLIENTS]
            results = [r for i in range(0, len(chosen), 50) for r in ask(url, chosen[i : i + 50])]
        for i, clients in enumerate(CLIENTS):
            rows(report, clients, ours[i], {kind: rival[kind][i] for kind in RIVALS})
        compare_answers(report, results, chosen, folder)
        compare_engines(report, texts[:ENGINE_REVIEWS], folder)
    report.finish()


def ray_environment() -> dict[str, str]:
    """What `cluster.local up` sets, with ports that a cluster which is up does not have."""
    return {**environment(), **ingress.ports(), "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}


def rows(report: Report, clients: int, ours: Measured, rival: dict[str, Measured]) -> None:
    """Three comparisons, each with the rival that is better in it."""
    case = f"{clients} client{'s' if clients > 1 else ''}"
    most = max(rival, key=lambda kind: rival[kind].requests_per_s)
    report.row(
        f"{case}, requests", ours.requests_per_s, unit="1/s", rival=f"pipeline ({most})",
        theirs=rival[most].requests_per_s, target=3.0 if clients == 32 else None,
    )  # fmt: skip
    for name, target in (
        ("p50_ms", 1.0 if clients == 1 else None),
        ("p99_ms", 1.0 if clients == 32 else None),
    ):
        least = min(rival, key=lambda kind: getattr(rival[kind], name))
        report.row(
            f"{case}, {name[:3]}", getattr(ours, name), unit="ms", rival=f"pipeline ({least})",
            theirs=getattr(rival[least], name), target=target, higher_is_better=False,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="bench", choices=["bench", "serve-ours"])
    parser.add_argument("--model", default="", help="of serve-ours: NAME@VERSION")
    parser.add_argument("--port", type=int, default=0, help="of serve-ours")
    parser.add_argument("--seconds", type=float, default=10, help="of measuring, for each row")
    arguments = parser.parse_args()
    if arguments.what == "serve-ours":
        serve_ours(arguments.port, arguments.model)
    else:
        main(arguments.seconds)
