"""Chat streams over HTTP: this project beside bare vLLM and `transformers serve`.

    make bench-chat

All serve SmolLM2-135M-Instruct and get the same questions, each a stream of at most 64 tokens at temperature 0, from
the same client (tests/bench/streams.py), which shares the machine with them. Ours is what `serve.deploy` deploys: Ray
Serve behind HAProxy, API keys, limits and events on, one replica. Bare vLLM is its own OpenAI server with the same
settings of the engine; transformers serves with continuous batching. One server is up at a time; they take turns, and of
each figure the better one counts, since a machine may be slower for minutes. Tokens are those of the
texts, counted by the model's tokeniser for all alike. The time to the first token is from sending the request; the time
a token is that from the first token to the last, over the tokens between.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.ingress import free_port
from lib import keys, storage, tracking
from lib.artifacts import ModelRef, TaskFile
from lib.base_models import base_directory
from lib.registry import VERSION_FILE
from lib.samples import sample_path
from lib.settings import load_settings
from serve.chat import engine_config
from tests.bench.report import Report
from tests.bench.serving import healthy, ray_environment, running

CONFIG = "jobs/configs/support_chat.yaml"
BASE = "sample://smollm2-135m-instruct"
VLLM, TRANSFORMERS = "bare vLLM", "transformers serve"
CLIENTS = (1, 8, 32)
# So many requests for each client, and no fewer than FEWEST.
ROUNDS, FEWEST = 3, 12
TOKENS = 64
CONTEXT = 1024


@dataclass(frozen=True)
class Measured:
    """One server under one number of clients."""

    tokens_per_s: float
    first_ms: float
    """Median time to the first token."""
    token_ms: float
    """Median time a token after the first."""


def published() -> ModelRef:
    """The base model as a registered version, in a store of this bench's own."""
    own = storage.PROJECT / ".whorl" / "bench" / "chat"
    os.environ |= {"WHORL_STORAGE": str(own), "WHORL_DATABASE": f"sqlite:///{own / 'whorl.db'}"}
    ref = ModelRef("support-chat", 1)
    if not storage.published(ref.uri):
        with storage.publish(ref.uri) as folder:
            untuned(folder)
    return ref


def untuned(folder: Path) -> None:
    """Fill an empty directory with the base model, as a version of a chat model."""
    skipped = shutil.ignore_patterns(storage.COMPLETE)
    shutil.copytree(base_directory(BASE), folder, dirs_exist_ok=True, ignore=skipped)
    TaskFile("chat", [], CONTEXT, BASE, "bench/0000000000000000").write(folder)
    files = {
        path.relative_to(folder).as_posix(): storage.checksum(str(path))
        for path in folder.rglob("*")
        if path.is_file()
    }
    storage.write_json(str(folder / VERSION_FILE), {"files": files})


def questions(count: int) -> list[str]:
    """Different ones: the first sentences of reviews, put as questions."""
    column = pq.read_table(sample_path("sample://reviews", "data"), columns=["Review Text"])["Review Text"]
    texts = [text for text in column.to_pylist() if text][:count]
    return [f"A customer wrote: {text[:200]} What should we answer?" for text in texts]


def words(ref: ModelRef, port: int) -> list[str]:
    """Overrides for both engines alike."""
    chat = {
        "dtype": "bfloat16" if tracking.cpu_precision() == "bf16" else "float32",
        "max_model_len": CONTEXT,
    }
    return ["--serving.model", str(ref), "--serving.port", str(port), "--serving.chat", json.dumps(chat)]


def serve_ours(port: int, model: str) -> None:
    """Deploy on a Ray of our own and stay up until our input ends."""
    import ray
    from ray import serve as ray_serve

    from serve.deploy import deploy

    name, version = model.split("@")
    with tempfile.TemporaryDirectory(prefix="whorl-bench-") as folder:
        ray.init(num_cpus=8, include_dashboard=False, logging_level="warning", _temp_dir=folder)
        print(deploy(load_settings(CONFIG, words(ModelRef(name, int(version)), port))), flush=True)
        sys.stdin.read()
        ray_serve.shutdown()
        ray.shutdown()


def vllm_command(ref: ModelRef, folder: Path, port: int) -> list[str]:
    """vLLM's own server, with the arguments that our engine gets."""
    given = engine_config(load_settings(CONFIG, words(ref, port)).serving, ref).engine_kwargs
    found = ["vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    found += ["--served-model-name", ref.name, "--disable-uvicorn-access-log"]
    for key, value in given.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            found += [flag] if value else []
        else:
            found += [flag, str(value)]
    return found


def measure(url: str, model: str, clients: int, count: Callable[[str], int]) -> Measured:
    """Exits when a stream failed: then there is nothing to compare."""
    asked = questions(max(FEWEST, ROUNDS * clients))
    with tempfile.TemporaryDirectory() as folder:
        bodies, out = Path(folder) / "bodies.jsonl", Path(folder) / "out.json"
        rest = {"model": model, "stream": True, "max_tokens": TOKENS, "temperature": 0}
        lines = [json.dumps({**rest, "messages": [{"role": "user", "content": text}]}) for text in asked]
        bodies.write_text("\n".join(lines))
        command = [sys.executable, "-m", "tests.bench.streams", url, bodies, out, clients]
        subprocess.run(list(map(str, command)), check=True)
        found = json.loads(out.read_text())
    failed = sum(stream["failed"] for stream in found["streams"])
    if failed:
        sys.exit(f"{failed} of {len(asked)} streams from {url} failed")
    tokens = [count(stream["text"]) for stream in found["streams"]]
    pace = [
        (stream["last"] - stream["first"]) / (n - 1)
        for stream, n in zip(found["streams"], tokens, strict=True)
        if n > 1
    ]
    first = [stream["first"] - stream["sent"] for stream in found["streams"] if stream["first"] is not None]
    result = Measured(
        sum(tokens) / found["seconds"], 1e3 * float(np.median(first)), 1e3 * float(np.median(pace))
    )
    print(
        f"    {clients:2} streams: {result.tokens_per_s:6.1f} tokens/s, first after {result.first_ms:.0f} ms, "
        f"then {result.token_ms:.1f} ms each",
        flush=True,
    )
    return result


def best(one: Measured, other: Measured) -> Measured:
    """The better of each figure."""
    return Measured(
        max(one.tokens_per_s, other.tokens_per_s),
        min(one.first_ms, other.first_ms),
        min(one.token_ms, other.token_ms),
    )


def main(rivals: list[str], rounds: int) -> None:
    from transformers import AutoTokenizer

    report = Report("chat")
    ref = published()
    _, key = keys.create(
        "bench", ["*"], requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000, days=1
    )
    folder = Path(ref.uri.removeprefix("file://"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def all_of(model: str) -> list[Measured]:
        measure(url, model, 1, count)  # kernels of all shapes are made
        return [measure(url, model, clients, count) for clients in CLIENTS]

    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["BENCH_KEY"] = key
    ours = ["tests.bench.chat", "serve-ours", "--model", str(ref), "--port", str(port)]
    theirs = ["transformers.cli.transformers", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    health = f"http://127.0.0.1:{port}/health"
    # Name → its command, environment, where it says that it is up, what it calls the model.
    servers: dict[str, tuple[list[str], dict[str, str], str, str]] = {
        "ours": (ours, ray_environment(), f"http://127.0.0.1:{port}/readyz", ref.name),
        VLLM: (vllm_command(ref, folder, port), quiet, health, ref.name),
        TRANSFORMERS: ([*theirs, "--continuous-batching"], quiet, health, str(folder)),
    }
    found: dict[str, list[Measured]] = {}
    for turn in range(rounds):
        for name, (command, environment, up, model) in servers.items():
            # Transformers is far enough away for one turn.
            if name not in ("ours", *rivals) or (turn and name == TRANSFORMERS):
                continue
            print(f"{name}, round {turn + 1}:", flush=True)
            with running(command, lambda up=up: healthy(up), **environment):  # type: ignore[misc]
                measured = all_of(model)
            found[name] = [best(*each) for each in zip(found.get(name, measured), measured, strict=True)]
    for rival in list(found)[1:]:
        rows(report, rival, found["ours"], found[rival])
    report.finish()


def rows(report: Report, rival: str, ours: list[Measured], theirs: list[Measured]) -> None:
    bare = rival == VLLM
    for clients, mine, other in zip(CLIENTS, ours, theirs, strict=True):
        case = f"{clients} stream{'s' if clients > 1 else ''}"
        most = {32: 0.95 if bare else 2.0}.get(clients)
        report.row(
            f"{case}, output",
            mine.tokens_per_s,
            unit="tokens/s",
            rival=rival,
            theirs=other.tokens_per_s,
            target=most,
        )
        for name, what in (("first_ms", "first token"), ("token_ms", "a token after it")):
            values = getattr(mine, name), getattr(other, name)
            report.row(
                f"{case}, {what}", values[0], unit="ms", rival=rival, theirs=values[1], higher_is_better=False
            )
        if bare and clients == 1:
            report.row(
                f"{case}, first token: added", mine.first_ms - other.first_ms, unit="ms", target=10,
                higher_is_better=False,
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="bench", choices=["bench", "serve-ours"])
    parser.add_argument("--model", default="", help="of serve-ours: NAME@VERSION")
    parser.add_argument("--port", type=int, default=0, help="of serve-ours")
    parser.add_argument("--rivals", nargs="*", choices=[VLLM, TRANSFORMERS], default=[VLLM, TRANSFORMERS])
    parser.add_argument(
        "--rounds", type=int, default=2, help="the servers take turns; the better of each figure counts"
    )
    arguments: Any = parser.parse_args()
    if arguments.what == "serve-ours":
        serve_ours(arguments.port, arguments.model)
    else:
        main(arguments.rivals, arguments.rounds)
