"""The main job: raw rows in, a served model out, one stage after another.

    python -m jobs.pipeline --config jobs/configs/reviews.yaml [--dotted.key value ...]

Each stage is a command of its own that reads what the one before left in storage and in the database;
the first that fails ends the pipeline with its exit code. `WHORL_PIPELINE` marks the runs of one
pipeline, so that two side by side do not take each other's.

With `WHORL_SERVICE`, the address of another cluster's jobs API, the last stage is a job of that cluster: on Kubernetes the
one that trains ends with its job, and another one answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from lib import keys, storage
from lib.command import main, running_cluster
from lib.data.plan import plan
from lib.settings import Settings
from lib.tasks import load_task

INDEX = ("index", "jobs.index", "documents → knowledge base")
STAGES = (
    ("preprocess", "jobs.preprocess", "raw rows → dataset"),
    ("finetune", "jobs.finetune", "dataset → checkpoint"),
    ("evaluate", "jobs.evaluate", "checkpoint → figures on the test split"),
    ("promote", "jobs.promote", "figures → champion, if the gate holds"),
    ("serve", "serve.deploy", "champion → endpoint"),
)
SHOWN, TIMED, SECONDS = 4, 40, 20
KEY_DAYS = 1


def pipeline(settings: Settings) -> None:
    began = time.monotonic()
    environment = {**os.environ, "WHORL_PIPELINE": os.environ.get("WHORL_PIPELINE") or uuid.uuid4().hex[:12]}
    stages = (INDEX, *STAGES) if settings.knowledge.source else STAGES
    for number, (name, module, what) in enumerate(stages, 1):
        print(f"\n━━ {number}/{len(stages)} {name}: {what} ━━", flush=True)
        started = time.monotonic()
        # The words as they were given: each stage reads the same file and the same overrides.
        code = subprocess.run(stage(name, module), env=environment).returncode
        if code:
            print(f"pipeline stopped: {name} ended with exit code {code}", file=sys.stderr)
            sys.exit(code)
        print(f"   {name} took {time.monotonic() - started:.0f} s", flush=True)
    if service():
        print(f"\nthe service of {service()} answers with what is champion now")
    else:
        print("\n━━ answers ━━")
        ask(settings)
    print(f"\nthe whole pipeline took {time.monotonic() - began:.0f} s")


def service() -> str | None:
    """The jobs API of the cluster that answers, where that is not this one."""
    return os.environ.get("WHORL_SERVICE")


def stage(name: str, module: str) -> list[str]:
    """The command of a stage."""
    elsewhere = service()
    if name != "serve" or not elsewhere:
        return [sys.executable, "-m", module, *sys.argv[1:]]
    ray = str(Path(sys.executable).with_name("ray"))
    words = ["python", "-m", module, *sys.argv[1:], "--serving.host", "0.0.0.0"]
    return [ray, "job", "submit", "--address", elsewhere, "--", *words]


def ask(settings: Settings) -> None:
    """Send rows of the test split to the endpoint, as many as some seconds allow; show some answers and the
    latency of all, and say of the first what it should have been."""
    shard = plan(settings, fresh=False).ref.shards("test")[0]
    with storage.local_copy(shard) as path:
        rows = pq.read_table(path).slice(0, TIMED).to_pylist()
    task = load_task(settings.task)
    classes = task.classes(settings.data)
    serving = settings.serving
    base = f"http://{serving.host}:{serving.port}{serving.route_prefix.rstrip('/')}"
    seconds: list[float] = []
    headers = {}
    if serving.access.required:
        _, secret = keys.create("pipeline", [settings.name], days=KEY_DAYS)
        headers = {"authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=base, timeout=60, headers=headers) as client:
        for number, row in enumerate(rows):
            if number >= SHOWN and sum(seconds) > SECONDS:
                break
            began = time.perf_counter()
            route, body = task.request(row, settings.name)
            reply = client.post(route, json=body)
            seconds.append(time.perf_counter() - began)
            reply.raise_for_status()
            if number < SHOWN:
                print(f"  {task.tell(row, reply.json(), classes)}")
            if number == 0 and serving.events.record and hasattr(task, "feedback"):
                said = task.feedback(row, classes)
                client.post(
                    "/v1/feedback", json={"request_id": reply.headers["x-request-id"], **said}
                ).raise_for_status()
                print(
                    f"    feedback on it is kept: {said}; python -m jobs.curate makes a source of what was said"
                )
        if rows and hasattr(task, "show"):
            for line in task.show(rows[0], lambda path, body: _posted(client, path, body)):
                print(f"  {line}")
    seconds.sort()
    print(
        f"  {len(seconds)} requests one by one: p50 {seconds[len(seconds) // 2] * 1000:.1f} ms, slowest {seconds[-1] * 1000:.1f} ms"
    )
    print(f"\n  API docs     {base}/docs")
    if headers:
        print(f"  a key        {secret}   (for {KEY_DAYS:g} day; python -m serve.keys makes others)")
    if found := running_cluster():
        print(f"  dashboard    {found['dashboard']}   (its token: ray get-auth-token)")
        print(f"  MLflow page  {found['ui']}")
        print("  the service stays up until `make stop`")


def _posted(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = client.post(path, json=body)
    reply.raise_for_status()
    found: dict[str, Any] = reply.json()
    return found


if __name__ == "__main__":
    main(pipeline)
