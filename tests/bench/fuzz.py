"""Everything in each application's OpenAPI description, fuzzed by schemathesis: cases, failures, memory.

    make bench-fuzz                  # 5,000 cases an application
    python -m tests.bench.fuzz --cases 500 --seed 1 --applications sentiment

The applications are real, on Ray Serve behind HAProxy, with keys and events on; the models are tiny and random, since it
is what stands before them that is tried. All of schemathesis' checks are on, but for `chat` and `recommend` the one that wants
every request of the schema's form accepted: OpenAI's form does not say what numbers a temperature may have, and which columns
may be filtered by is the served model's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster import ingress
from cluster.ingress import free_port
from cluster.local import environment
from lib import keys, storage
from lib.artifacts import ModelRef, TaskFile
from lib.registry import VERSION_FILE
from lib.settings import Settings
from tests.bench.report import Report

APPLICATIONS = ("sentiment", "tagging", "recommend", "chat")
ROUND = 500
"""Made requests of each operation in one run of schemathesis; the seed is another for each, and memory is looked at
in between."""
CONFIG = """
[checks.negative_data_rejection]
# What is against the schema and too long as well is refused for its length, before anybody reads it.
expected-statuses = [400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 428, 429]
"""
SECONDS = 20
"""An answer that takes longer is a hang."""
OPEN_SCHEMAS = ("chat", "recommend")


@dataclass
class Fuzzed:
    """What came of some cases."""

    cases: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """How often each kind of schemathesis' failures was found."""
    errors: Counter[str] = field(default_factory=Counter)
    """What kept it from an answer: nothing in time, a broken connection."""
    megabytes: list[float] = field(default_factory=list)
    """Memory of the application's processes after each round."""


def fuzz(url: str, key: str, examples: int, seed: int, *extra: str) -> Fuzzed:
    """Send what schemathesis makes up of the description of the application at `url`, `examples` for each operation
    and some more. Prints what it says of failures."""
    found = Fuzzed()
    with tempfile.TemporaryDirectory() as folder:
        file, config = Path(folder) / "report.json", Path(folder) / "config.toml"
        config.write_text(CONFIG)
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run", f"{url}/openapi.json", "--url", url,
            "--header", f"Authorization: Bearer {key}", "--checks", "all", "--seed", str(seed),
            "--max-examples", str(examples), "--request-timeout", str(SECONDS), "--continue-on-failure",
            "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--no-color",
            "--report", "json", "--report-json-path", str(file), *extra,
        ]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if not file.exists():
            raise RuntimeError(f"schemathesis did not run: {said.stdout[-2000:]}{said.stderr[-2000:]}")
        report = json.loads(file.read_text())
    found.cases = report["test_cases"]["generated"]
    found.failures.update({failure["type"]: failure["count"] for failure in report["failures"]})
    found.errors.update({error["title"]: error["count"] for error in report["errors"]})
    if found.failures or found.errors:
        print(said.stdout)
    return found


def rounds(url: str, key: str, cases: int, seed: int, application: str) -> Fuzzed:
    total = Fuzzed()
    extra = ("--exclude-checks", "positive_data_acceptance") if application in OPEN_SCHEMAS else ()
    while total.cases < cases:
        found = fuzz(url, key, min(ROUND, cases), seed, *extra)
        total.cases += found.cases
        total.failures += found.failures
        total.errors += found.errors
        total.megabytes.append(memory())
        print(f"{application}: {total.cases:,} cases, {total.megabytes[-1]:.0f} MiB", flush=True)
        seed += 1
    return total


def memory() -> float:
    """MiB of the replicas' own pages and of the ingress', which are below this process."""
    names = ("ray::ServeReplica", "haproxy", "VLLM::")
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(names) or process.cmdline()[:1] == ["haproxy"]:
                found += process.memory_full_info().uss
        except psutil.Error:
            continue
    return found / 2**20


def publish_tagging(base: Path) -> ModelRef:
    """A version of a tagging model, the tiny base with a random head."""
    from transformers import AutoModelForTokenClassification, set_seed

    from lib.tasks import tagging

    set_seed(0)
    classes, ref = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], ModelRef("names", 1)
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(classes))
    with storage.publish(ref.uri) as folder:
        tagging.save(
            model, base, TaskFile("tagging", classes, 32, str(base), "names/0123456789abcdef"), folder
        )
        files = {path.name: storage.checksum(str(path)) for path in folder.iterdir()}
        storage.write_json(str(folder / VERSION_FILE), {"files": files})
    return ref


def deployed(application: str, base: Path, port: int) -> str:
    """The application's URL, with a model of its own."""
    from serve.deploy import deploy
    from tests.serve.conftest import make_settings, publish_version

    limits: dict[str, Any] = {
        "port": port,
        "max_inputs": 8,
        "max_chars": 500,
        "max_body_bytes": 50_000,
        "threads": 1,
    }
    # Made-up ids are nobody's: waiting for each would be all that is done.
    limits |= {"events": {"feedback_waits_s": 0}}
    if application == "sentiment":
        return deploy(make_settings(model=str(publish_version(base, 1)), **limits))
    if application == "tagging":
        serving = limits | {"model": str(publish_tagging(base)), "route_prefix": "/names"}
        data = {"source": "nowhere.csv", "labels": ["PER", "LOC"]}
        values = {"name": "names", "task": "tagging", "data": data, "model": {"base": "nowhere"}}
        return deploy(Settings.model_validate(values | {"serving": serving}))
    if application == "recommend":
        from tests.recommending import publish_films, settings_for

        settings = settings_for(base, text="frozen")
        publish_films(base, settings)
        serving = limits | {"model": "films@1", "route_prefix": "/films"}
        return deploy(Settings.model_validate(settings.model_dump(mode="json") | {"serving": serving}))
    from tests.serve import test_chat

    ref = test_chat.publish_chat(1)
    return deploy(test_chat.chat_settings(port=port, model=str(ref), route_prefix="/helper"))


@contextmanager
def cluster() -> Iterator[None]:
    import ray
    from ray import serve as ray_serve

    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as folder:
        ray.init(num_cpus=8, include_dashboard=False, logging_level="warning", _temp_dir=folder)
        yield
        ray_serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--applications", nargs="+", choices=APPLICATIONS, default=list(APPLICATIONS))
    given = parser.parse_args()
    from tests.conftest import make_tiny_base  # which forgets where this user's own models lie

    # Ray Serve reads these when it is imported.
    os.environ |= environment() | ingress.ports() | {"RAY_AUTH_MODE": "disabled"}
    report, places = Report("fuzz"), {name: os.environ[name] for name in ("WHORL_STORAGE", "WHORL_DATABASE")}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        os.environ |= {"WHORL_STORAGE": folder, "WHORL_DATABASE": f"sqlite:///{own / 'whorl.db'}"}
        base, port, key = make_tiny_base(own / "base"), free_port(), keys.create("fuzz", ["*"])[1]
        with cluster():
            for name in given.applications:
                url = deployed(name, base, port)
                found = rounds(url, key, given.cases, given.seed, name)
                add(report, name, found)
                with urllib.request.urlopen(f"{url}/healthz", timeout=SECONDS) as answer:
                    assert answer.status == 200
    os.environ |= places
    report.finish()


def add(report: Report, name: str, found: Fuzzed) -> None:
    report.row(f"{name}: cases", found.cases, unit="requests")
    for what, count in (
        ("failed checks", found.failures.total()),
        ("5xx", found.failures["ServerError"] + found.failures["ContentTypeServerError"]),
        ("no answer", found.errors.total()),
    ):
        report.row(f"{name}: {what}", count, unit="", target=0, higher_is_better=False)
    grown = found.megabytes[-1] - found.megabytes[0]
    report.row(f"{name}: memory after the first round", found.megabytes[0], unit="MiB")
    report.row(f"{name}: memory since", grown, unit="MiB", target=20, higher_is_better=False)


if __name__ == "__main__":
    main()
