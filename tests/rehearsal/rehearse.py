"""A rehearsal of what Kubernetes does with our manifests, on one machine: `make rehearse`.

    python -m tests.rehearsal.rehearse [--overlay k8s/overlays/kind] [--workers 2] [--rate 5]

Builds an overlay (`kubectl kustomize`), boots the RayService's cluster out of it (stage.py: each pod a machine with an
address of its own, Redis and PostgreSQL beside them), hands in the RayJob `pipeline`, deploys `serveConfigV2`, and sends
requests while a worker's pod and then the head's are killed and replaced. Then the RayJob `finetune` as ZeRO-3 over both
workers, one of which is killed and replaced. Of jobs the entrypoint is the manifest's, with fewer rows. Needs root, and
kubectl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cluster import machines
from lib import keys
from lib.errors import ResourceError, StorageError
from tests.bench.report import Report
from tests.rehearsal.operator import find
from tests.rehearsal.stage import Service, Stage
from tests.rehearsal.traffic import Traffic

PATH, BODY = "/v1/sentiment", json.dumps({"inputs": ["the dress fits well", "it fell apart"]}).encode()
# So that the jobs take minutes here.
SMALL = "--data.limit 12000 --promotion.metric accuracy --promotion.require true"
ZERO = (
    "--data.limit 12000 --training.zero_stage 3 --training.workers 2 --training.cpus_per_worker 5 --training.max_steps 60 "
    "--training.checkpoint_every 10 --training.max_failures 3 --training.ignore_plan true"
)
QUIET_S, AWAY_S, AFTER_S = 20.0, 20.0, 10.0


def built(overlay: str) -> list[dict[str, Any]]:
    """Manifests of an overlay. Raises ResourceError where there is no kubectl."""
    if shutil.which("kubectl") is None:
        raise ResourceError("kubectl is missing; it builds the manifests (kubectl kustomize)")
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def entrypoint(overlay: str, name: str) -> str:
    """Of a RayJob beside an overlay."""
    return str(find(built(f"{overlay}/jobs"), "RayJob", name)["spec"]["entrypoint"])


class Job:
    """A job handed in as the operator's submitter does it."""

    def __init__(self, stage: Stage, command: str) -> None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": stage.token}
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(stage.dashboard)
        self._id = self._client.submit_job(entrypoint=command)

    def has_ended(self) -> bool:
        return bool(self._client.get_job_status(self._id).is_terminal())

    @property
    def succeeded(self) -> bool:
        return str(self._client.get_job_status(self._id)) == "SUCCEEDED"

    @property
    def words(self) -> str:
        return str(self._client.get_job_logs(self._id))


class Rehearsal:
    def __init__(self, stage: Stage, report: Report, rate: float) -> None:
        self.stage, self.report, self.rate = stage, report, rate

    def run_pipeline(self, command: str) -> None:
        job = Job(self.stage, command)
        took = self.stage.wait(job.has_ended, "the pipeline", 1800)
        if not job.succeeded:
            sys.exit(f"the pipeline failed:\n{job.words[-4000:]}")
        self.report.row("RayJob pipeline, small: from raw rows to a champion", took, unit="s")

    def serve(self) -> None:
        self.stage.deploy()
        took = self.stage.wait(self.stage.is_serving, "the application", 600)
        self.report.row("RayService: applications run, with a replica for each worker", took, unit="s")

    def undisturbed(self, traffic: Traffic) -> None:
        begin = time.monotonic()
        time.sleep(QUIET_S)
        self.tell("undisturbed", traffic, begin)

    def lose_worker(self, traffic: Traffic) -> None:
        begin = time.monotonic()
        self.stage.kill(self.stage.workers[0])
        nodes = 1 + len(self.stage.workers)
        # First it must be seen that there are fewer.
        self.stage.wait(lambda: not self.stage.is_serving(), "the news of the loss", 60)
        self.stage.wait(
            lambda: self.stage.is_serving() and self.stage.alive() >= nodes, "the other worker", 600
        )
        recovered = time.monotonic() - begin
        time.sleep(AFTER_S)
        self.tell("a worker's pod is killed", traffic, begin, recovered)

    def lose_head(self, traffic: Traffic) -> None:
        begin, nodes, head = time.monotonic(), 1 + len(self.stage.workers), self.stage.head
        assert head is not None
        self.stage.is_held.set()
        self.stage.kill(head)
        time.sleep(AWAY_S)
        self.tell("while there is no head", traffic, begin)
        again = time.monotonic()
        self.stage.is_held.clear()
        recovered = self.stage.wait(
            lambda: self.stage.alive() >= nodes and self.stage.is_serving(), "the head", 600
        )
        time.sleep(AFTER_S)
        self.tell("the head's pod comes back, with another address", traffic, again, recovered)
        self.stage.deploy()
        took = self.stage.wait(self.stage.is_serving, "the application after another deployment", 300)
        self.report.row("the same deployed again by the new head", took, unit="s")

    def tell(self, what: str, traffic: Traffic, begin: float, recovered: float | None = None) -> None:
        """Of the requests since `begin`, when all of them have their answer."""
        end = time.monotonic()
        time.sleep(1)
        asked = traffic.between(begin, end)
        self.report.row(f"{what}: requests", len(asked), unit="sent")
        self.report.row(
            f"{what}: first tries without an answer", sum(not one.first for one in asked), unit="of them"
        )
        failed = sum(not one.answered for one in asked)
        self.report.row(f"{what}: failed", failed, unit="of them", target=0, higher_is_better=False)
        times = sorted(one.took_s for one in asked)
        if times:
            p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
            self.report.row(f"{what}: median", statistics.median(times) * 1000, unit="ms")
            self.report.row(f"{what}: p99", p99 * 1000, unit="ms")
        if recovered is not None:
            self.report.row(f"{what}: all is as before after", recovered, unit="s")

    def train(self, command: str) -> None:
        """Over two workers, of which one is lost after the first checkpoint."""
        job = Job(self.stage, command)

        known = self.checkpoints()
        self.stage.wait(lambda: self.checkpoints() - known or saved_nothing(job), "a checkpoint", 900)
        self.stage.kill(self.stage.workers[0])
        took = self.stage.wait(job.has_ended, "the training", 1800)
        if not job.succeeded:
            sys.exit(f"the training did not survive:\n{job.words[-4000:]}")
        self.report.row("RayJob finetune, ZeRO-3 on two workers: ended after one was lost", took, unit="s")

    def checkpoints(self) -> set[str]:
        """That are whole."""
        from lib.training import checkpoints  # imports Ray, which reads once how it is to log in

        records = (self.stage.folder / "storage/runs").glob(f"**/{checkpoints.RECORD}")
        found: set[str] = set()
        for record in records:
            with suppress(StorageError):  # Ray is writing it
                found |= set(checkpoints.committed(str(record.parent)))
        return found


def saved_nothing(job: Job) -> bool:
    if job.has_ended():
        sys.exit(f"the training ended before it saved anything:\n{job.words[-4000:]}")
    return False


def rehearse(given: argparse.Namespace, folder: Path, report: Report) -> None:
    stage = Stage(built(given.overlay), folder, given.workers)
    try:
        began = time.monotonic()
        stage.start()
        report.row(f"RayCluster: head and {given.workers} workers", time.monotonic() - began, unit="s")
        rehearsal = Rehearsal(stage, report, given.rate)
        rehearsal.run_pipeline(f"{entrypoint(given.overlay, 'pipeline')} {SMALL}")
        rehearsal.serve()
        os.environ |= stage.places
        traffic = Traffic(Service(stage).address, PATH, BODY, keys.create("rehearsal", ["*"])[1], given.rate)
        steps: list[Callable[[Traffic], None]] = [
            rehearsal.undisturbed,
            rehearsal.lose_worker,
            rehearsal.lose_head,
        ]
        for step in steps:
            step(traffic)
        traffic.close()
        rehearsal.train(f"{entrypoint(given.overlay, 'finetune')} {ZERO}")
    finally:
        stage.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.rehearse", description=__doc__)
    parser.add_argument("--overlay", default="k8s/overlays/kind")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument(
        "--keep", type=Path, help="a folder for what the pods wrote; none: it goes when this ends"
    )
    given = parser.parse_args()
    if not machines.available():
        sys.exit("error: making machines needs root (network namespaces)")
    # So that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    folder = given.keep or Path(tempfile.mkdtemp(prefix="whorl-rehearsal-"))
    report = Report("rehearsal")
    try:
        rehearse(given, folder, report)
    except (ResourceError, TimeoutError) as error:
        sys.exit(f"error: {error}")
    finally:
        for name in ("WHORL_STORAGE", "WHORL_DATABASE"):
            os.environ.pop(name, None)
        if given.keep is None:
            with suppress(OSError):
                shutil.rmtree(folder)
        report.finish()  # as far as it came


if __name__ == "__main__":
    main()
