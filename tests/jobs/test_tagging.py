"""The whole line for tagging: JSON Lines with given splits in, entities over HTTP out."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.ingress import free_port
from jobs.evaluate import evaluate
from jobs.finetune import finetune
from jobs.preprocess import preprocess
from jobs.promote import promote
from lib import keys, registry, tracking
from lib.data.plan import plan
from lib.errors import DataError
from lib.evaluation import report as files
from lib.settings import Settings
from lib.tasks import load_task
from serve.deploy import deploy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


def write_sentences(path: Path, rows: int, seed: int) -> None:
    """Sentences in IOB1 whose people begin with `great` and whose places begin with `fine`.

    Every name has an ending of its own: the tokeniser's pieces show what it is, and looking the word up never does.
    """
    random = np.random.default_rng(seed)

    def name(stem: str) -> str:
        return stem + "".join(random.choice(list("abcdefgh"), 6))

    lines = []
    for _ in range(rows):
        tokens, tags = ["the", "dress", "was"], ["O", "O", "O"]
        for _ in range(random.integers(1, 3)):
            kind, stem = [("PER", "great"), ("LOC", "fine")][random.integers(2)]
            words = [name(stem) for _ in range(random.integers(1, 3))]
            tokens += [*words, "is"]
            tags += [f"I-{kind}"] * len(words) + ["O"]
        lines.append(
            json.dumps({"words": tokens, "ner": tags, "shop": str(random.choice(["north", "south"]))})
        )
    path.write_text("\n".join(lines))


@pytest.fixture
def settings(database: Path, tiny_base: Path, tmp_path: Path) -> Settings:
    for split, rows in (("train", 400), ("validation", 80), ("test", 120)):
        write_sentences(tmp_path / f"{split}.jsonl", rows, seed=rows)
    return Settings.model_validate(
        {
            "name": "names",
            "task": "tagging",
            "data": {
                "source": str(tmp_path / "train.jsonl"),
                "validation_source": str(tmp_path / "validation.jsonl"),
                "test_source": str(tmp_path / "test.jsonl"),
                "columns": {"tokens": "words", "tags": "ner"},
                "labels": ["PER", "LOC"],
                "slices": {"shop": "shop"},
                "duplicates": "keep",
            },
            "model": {"base": str(tiny_base), "max_length": 48, "dropout": 0.0},
            "training": {
                "epochs": 6,
                "learning_rate": 5e-3,
                "tokens_per_batch": 512,
                "cpus_per_worker": 0.5,
                "metric": "entity_f1",
            },
            "evaluation": {"bootstrap": 200},
            "promotion": {"metric": "entity_f1", "require": True},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1, "port": free_port()},
        }
    )


def test_the_whole_line(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(settings)
    manifest = plan(settings).ref.manifest()
    assert {name: split["rows"] for name, split in manifest["splits"].items()} == {
        "train": 400,
        "validation": 80,
        "test": 120,
    }
    assert manifest["labels"] == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    assert all(manifest["splits"]["test"]["labels"].values())

    finetune(settings)
    evaluate(settings)
    run = tracking.find_run(settings, "finetune")
    measured = files.read(run.ref.evaluation_uri)
    report = measured.report
    assert report.rows == sum(manifest["splits"]["test"]["labels"].values())
    assert set(report.baselines) == {"lookup", "majority"}
    assert report.metrics["entity_f1"] > 0.9 > report.baselines["lookup"]["entity_f1"]
    assert report.baselines["majority"]["entity_f1"] == 0
    assert set(report.slices) == {"shop", "length"}
    low, high = report.intervals["model"]
    assert low <= report.metrics["macro_f1"] <= high
    assert "entity f1" in capsys.readouterr().out

    promote(settings)
    champion = registry.champion("names")
    assert champion is not None
    url = deploy(settings)
    _, secret = keys.create("test", ["names"])
    headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
    task = load_task("tagging")
    (shard,) = plan(settings).ref.shards("test")
    rows = pq.read_table(shard.removeprefix("file://")).slice(0, 20).to_pylist()
    right = 0
    for row in rows:
        path, body = task.request(row, "names")
        body["inputs"].append(" ".join(row["tokens"]))
        data = json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.load(reply)
        words, text = answer["results"]
        assert [e["text"] for e in words["entities"]] == [e["text"] for e in text["entities"]]
        said = task.tell(row, {"results": [words]}, manifest["labels"])
        told, _, truth = said.partition("   (the data says: ")
        names = [part.rpartition(" ")[0] for part in told.partition("→ ")[2].split("; ")]
        right += names == truth.removesuffix(")").split("; ")
    assert right >= 16
    assert answer["version"] == champion.version
    from ray import serve as ray_serve

    ray_serve.shutdown()


def test_a_row_of_a_wrong_form_ends_in_one_line(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[7] = json.dumps({"words": ["a", "b"], "ner": ["O"], "shop": "north"})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train\.jsonl row 8 has 2 tokens and 1 tags"):
        preprocess(settings)
    lines[7] = json.dumps({"words": ["a", "b"], "ner": ["O", "I-ORG"], "shop": "north"})
    path.write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"1 of 600 rows hold a label outside the mapping \('B-ORG'\); first: .* row 8"
    ):
        preprocess(settings)


def test_a_test_split_of_nothing_but_repetitions_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    update = {"duplicates": "drop", "leakage": "off"}
    dropping = settings.model_copy(update={"data": settings.data.model_copy(update=update)})
    with pytest.raises(
        DataError, match=r"the test split would be empty: no row of data\.test_source is left"
    ):
        preprocess(dropping)
    # With the check, which is the default, it is the training rows that go.
    checked = settings.model_copy(update={"data": settings.data.model_copy(update={"duplicates": "drop"})})
    with pytest.raises(
        DataError, match=r"the train split would be empty: \d+ rows say the same as rows of a split"
    ):
        preprocess(checked)
