"""A model store with three versions, and the deployed application on a real socket."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.ingress import free_port
from lib import keys, storage
from lib.artifacts import IndexRef, ModelRef, TaskFile
from lib.registry import VERSION_FILE
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import PASSAGE, make_current, with_vectors, write_table
from lib.settings import ServingSettings, Settings
from tests.serve.collector import Collector

LABELS = ["negative", "neutral", "positive"]


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """An application's URL, and requests to it."""

    url: str
    settings: Settings
    key: str
    collector: Collector | None = None
    """Where its spans go."""

    def post(self, body: bytes | str | dict[str, Any], path: str = "/v1/sentiment", **headers: str) -> Answer:
        data = json.dumps(body) if isinstance(body, dict) else body
        raw = data.encode() if isinstance(data, str) else data
        named = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        named |= {k.replace("_", "-"): v for k, v in headers.items()}
        return self._send(urllib.request.Request(self.url + path, raw, named))

    def get(self, path: str, method: str = "GET") -> Answer:
        named = {"authorization": f"Bearer {self.key}"}
        return self._send(urllib.request.Request(self.url + path, headers=named, method=method))

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return self._answer(answer.status, answer)
        except urllib.error.HTTPError as error:
            with error:
                return self._answer(error.code, error)

    def _answer(self, status: int, answer: Any) -> Answer:
        headers = {k.lower(): v for k, v in answer.headers.items()}
        text = answer.read()
        is_json = headers.get("content-type") == "application/json"
        return Answer(status, json.loads(text) if is_json else text.decode(), headers)


def make_settings(**serving: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "reviews",
            "task": "sentiment",
            "data": {"source": "nowhere.csv", "labels": LABELS},
            "model": {"base": "nowhere"},
            "serving": serving,
        }
    )


def publish_version(base: Path, version: int, labels: list[str] | None = None) -> ModelRef:
    """A model version in the storage root: the tiny base with a random head, another for each version."""
    from transformers import AutoModelForSequenceClassification, set_seed

    from lib.tasks import sentiment

    ref = ModelRef("reviews", version)
    set_seed(version)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    info = TaskFile("sentiment", labels or LABELS, 32, str(base), "reviews/0123456789abcdef")
    with storage.publish(ref.uri) as folder:
        sentiment.save(model, base, info, folder)
        files = {path.name: storage.checksum(str(path)) for path in folder.iterdir()}
        storage.write_json(str(folder / VERSION_FILE), {"files": files})
    return ref


def publish_index(base: Path, passages: dict[str, str], fingerprint: str) -> IndexRef:
    """An index whose vectors are the tiny encoder's."""
    rows = [
        {"id": i, "uri": f"file:///srv/{title}.md", "source": f"{title}.md", "title": title, "headings": [],
         "place": "paragraph 1", "text": text, "searched": text, "tokens": 9}
        for i, (title, text) in enumerate(passages.items())
    ]  # fmt: skip
    ref = IndexRef("shop", fingerprint)
    vectors = Embedder(str(base), ServingSettings(threads=1)).vectors(list(passages.values()))
    with storage.publish(ref.uri) as folder:
        write_table(folder, iter([with_vectors(pa.Table.from_pylist(rows, PASSAGE), vectors)]), "English")
        manifest = {"base": str(base), "encoder": "tiny", "query_prefix": "", "passages": len(rows)}
        storage.write_json(str(folder / "manifest.json"), manifest)
    make_current(ref, keep=3)
    return ref


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """A storage root that holds reviews@1 and reviews@2, and reviews@9, which names one label too few."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHORL_STORAGE", str(folder))
        patch.setenv("WHORL_DATABASE", f"sqlite:///{folder / 'whorl.db'}")
        for version in (1, 2):
            publish_version(tiny_base, version)
        publish_version(tiny_base, 9, LABELS[:2])
        yield folder


def key(*scopes: str) -> str:
    """A new key for all applications, or for some."""
    return keys.create("tests", scopes or ["*"])[1]


@pytest.fixture(scope="module")
def endpoint(store: Path, ray_cluster: None) -> Iterator[Endpoint]:
    """reviews@1, deployed on a free port."""
    from ray import serve as ray_serve

    from serve.deploy import deploy

    with Collector.running() as collector:
        settings = make_settings(
            model="reviews@1",
            port=free_port(),
            max_inputs=8,
            max_chars=500,
            max_body_bytes=20_000,
            traces=collector.url,
        )
        yield Endpoint(deploy(settings), settings, key(), collector)
        ray_serve.shutdown()


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped() -> Samples:
    """What Prometheus reads from the shared Ray's node: name and labels → value."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum over all samples of a name that have these labels."""
    wanted = labels.items()
    return sum(value for (found, has), value in samples.items() if found == name and wanted <= has)
