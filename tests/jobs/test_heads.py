"""The whole line for a model of two heads: labels that are missing, a temperature, behaviours, a gate on one head."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate import evaluate
from jobs.finetune import finetune
from jobs.preprocess import preprocess
from jobs.promote import promote
from lib import registry, tracking
from lib import storage as places
from lib.artifacts import EvalReport, TaskFile
from lib.data.plan import plan
from lib.evaluation import report as files
from lib.settings import Settings
from lib.tasks import sentiment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]

TOPICS = {"fabric": "soft", "fit": "fits"}
MOODS = {"good": "great", "bad": "awful"}


def write_reviews(path: Path, rows: int) -> None:
    """Reviews whose words tell mood and topic; a third of the rows lacks the one, a third the other label."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(rows):
        mood, topic = random.choice(list(MOODS)), random.choice(list(TOPICS))
        letters = " ".join(random.choice(list("abcdefghij"), 5))
        row = {
            "text": f"the dress is {MOODS[mood]} {letters} {TOPICS[topic]}",
            "mood": mood,
            "about": topic,
            "shop": str(random.choice(["north", "south"])),
        }
        if i % 3 < 2:
            row[["mood", "about"][i % 3]] = None
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))


@pytest.fixture
def settings(database: Path, tiny_base: Path, tmp_path: Path) -> Settings:
    write_reviews(tmp_path / "reviews.jsonl", 900)
    return Settings.model_validate(
        {
            "name": "twofold",
            "task": "sentiment",
            "data": {
                "source": str(tmp_path / "reviews.jsonl"),
                "leakage": "off",  # of rows that are alike but for some letters
                "heads": {
                    "mood": {"column": "mood", "labels": ["bad", "good"]},
                    "topic": {"column": "about", "labels": ["fabric", "fit"]},
                },
                "slices": {"shop": "shop"},
            },
            "model": {"base": str(tiny_base), "max_length": 32, "dropout": 0.0},
            "training": {
                "epochs": 8,
                "learning_rate": 1e-3,
                "tokens_per_batch": 192,
                "patience": None,
                "cpus_per_worker": 0.5,
                "precision": "fp32",
                # The mean over the heads: by one of them alone, an early checkpoint of the other would do.
                "metric": "macro_f1",
            },
            "evaluation": {
                "bootstrap": 200,
                "behaviours": [
                    {"name": "case", "kind": "invariance", "change": "upper_case", "rows": 30},
                    {
                        "name": "flips",
                        "kind": "minimum",
                        "templates": ["the dress is great a b c d e {word}"],
                        "slots": {"word": ["soft"]},
                        "label": "fit",
                        "head": "topic",
                    },
                ],
            },
            "promotion": {"metric": "topic/macro_f1", "behaviours": {"case": 0.0}},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
        }
    )


@pytest.mark.long
def test_the_whole_line(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(settings)
    manifest = plan(settings).ref.manifest()
    assert manifest["labels"] == ["mood/bad", "mood/good", "topic/fabric", "topic/fit"]
    assert sum(split["rows"] for split in manifest["splits"].values()) == 900 - sum(
        manifest["dropped"].values()
    )
    assert manifest["dropped"]["unlabelled"] == 0
    weighted = settings.data.heads | {"topic": settings.data.heads["topic"].model_copy(update={"weight": 9})}
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"heads": weighted})})
    assert plan(other).ref == plan(settings).ref  # what a head weighs makes no other dataset

    finetune(settings)
    run = tracking.find_run(settings, "finetune")
    best = places.read_json(places.join(run.artifacts_uri(), "training.json"))["best"]
    with places.local_copy(run.ref.model_uri) as folder:
        info = TaskFile.read(folder)
        predictor = sentiment.load(folder, settings.serving)
    assert info.heads["topic"] == {"labels": ["fabric", "fit"], "temperature": best["topic/temperature"]}
    (answer,) = sentiment.predict(
        predictor, sentiment.Request(inputs=["the dress is awful c d e a b soft"])
    ).results
    assert (answer.label, answer.heads["topic"].label) == ("bad", "fabric")

    evaluate(settings)
    out = capsys.readouterr().out
    assert "━━ topic" in out
    assert "fitted on the validation split" in out
    measured = files.read(run.ref.evaluation_uri)
    report, topic = measured.report, measured.others["topic"].report
    assert report.metrics["topic/macro_f1"] == topic.metrics["macro_f1"] > 0.9
    assert report.metrics["mood/macro_f1"] == report.metrics["macro_f1"] > 0.9
    assert report.baselines["tfidf"]["topic/macro_f1"] == topic.baselines["tfidf"]["macro_f1"]
    test = manifest["splits"]["test"]
    assert report.rows == test["labels"]["mood/bad"] + test["labels"]["mood/good"] < test["rows"]
    assert set(topic.slices) == {"shop", "length"}
    assert {b["name"]: b["failure_rate"] for b in report.behaviours} == {"case": 0.0, "flips": 1.0}
    page = places.read_bytes(places.join(run.ref.evaluation_uri, "report.html")).decode()
    assert page.count("data:image/png;base64,") == 6
    assert "the dress is great a b c d e soft" in page
    metrics = tracking.client().get_run(run.ref.id).data.metrics
    assert {"test/topic/macro_f1", "test/topic/tfidf/macro_f1", "test/failures/case"} <= set(metrics)

    # Words decide all of it, so TF-IDF is as good: the gate must not hold, and must say on what.
    promote(settings)
    assert registry.champion("twofold") is None
    out = capsys.readouterr().out
    assert "topic/macro_f1 above baseline tfidf" in out
    assert "failures of case" in out
    made_worse = {**report.baselines, "tfidf": {**report.baselines["tfidf"], "topic/macro_f1": 0.5}}
    lowered = EvalReport(**{**vars(report), "baselines": made_worse})
    with places.publish(run.ref.evaluation_uri, replace=True) as scratch:
        files.write(files.Measured(lowered, measured.predictions, measured.others), scratch)
    promote(settings)
    assert registry.champion("twofold") is not None
