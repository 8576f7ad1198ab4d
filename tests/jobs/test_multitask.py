"""A multitask run from two sources to two models, each evaluated by its own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate import evaluate
from jobs.finetune import finetune
from jobs.preprocess import preprocess
from lib import storage as places
from lib import tracking
from lib.data.plan import plan
from lib.errors import ConfigError
from lib.settings import Settings, load_settings
from tests.jobs.test_heads import write_reviews
from tests.jobs.test_tagging import write_sentences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def settings(database: Path, tiny_base: Path, tmp_path: Path) -> Settings:
    write_reviews(tmp_path / "reviews.jsonl", 600)
    write_sentences(tmp_path / "names.jsonl", 300, seed=0)
    return Settings.model_validate(
        {
            "name": "shared",
            "task": "multitask",
            "data": {
                "temperature": 5,
                "parts": {
                    "moods": {
                        "task": "sentiment",
                        "source": str(tmp_path / "reviews.jsonl"),
                        "columns": {"label": "mood"},
                        "labels": ["bad", "good"],
                        "weight": 4,
                    },
                    "names": {
                        "task": "tagging",
                        "source": str(tmp_path / "names.jsonl"),
                        "columns": {"tokens": "words", "tags": "ner"},
                        "labels": ["PER", "LOC"],
                        "metric": "entity_f1",
                    },
                },
                "rows_per_shard": 250,
            },
            "model": {"base": str(tiny_base), "max_length": 48, "dropout": 0.0},
            "training": {
                "epochs": 14,
                "learning_rate": 1e-3,
                "tokens_per_batch": 512,
                "cpus_per_worker": 0.5,
                "precision": "fp32",
                "patience": None,
            },
            "evaluation": {"bootstrap": 100},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
        }
    )


@pytest.mark.long
def test_the_whole_line(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(settings)
    planned = plan(settings)
    manifest = planned.ref.manifest()
    sizes = {name: part.ref.manifest()["splits"]["train"]["rows"] for name, part in planned.parts.items()}
    given = {name: part["rows"] for name, part in manifest["splits"]["train"]["parts"].items()}
    assert manifest["splits"]["train"]["rows"] == sum(given.values())
    assert sum(given.values()) == pytest.approx(sum(sizes.values()), abs=2)
    assert given["moods"] / given["names"] == pytest.approx(
        (sizes["moods"] / sizes["names"]) ** 0.2, rel=0.03
    )
    assert manifest["splits"]["test"]["rows"] == 0
    preprocess(settings)
    assert "skipped" in capsys.readouterr().out

    finetune(settings)
    out = capsys.readouterr().out
    run = tracking.find_run(settings, "finetune")
    with pytest.raises(ConfigError, match="a model for each part"):
        evaluate(settings)
    for name, metric in (("moods", "macro_f1"), ("names", "entity_f1")):
        config = Path(run.ref.model_uri.removeprefix("file://")) / f"{name}.yaml"
        assert f"--config {config}" in out
        own = load_settings(config)
        assert own == settings.part(name)
        part = tracking.find_run(own, "finetune")
        assert part.tags()["part_of"] == run.ref.id
        best = places.read_json(places.join(run.artifacts_uri(), "training.json"))["best"]
        task = places.read_json(places.join(part.ref.model_uri, "task.json"))
        assert task["temperature"] == best[f"{name}/temperature"]
        evaluate(own)
        report = part.ref.evaluation()
        assert report.task == settings.data.parts[name].task
        assert report.metrics[metric] > 0.7
        # What evaluation finds on the test split is what training saw on validation, but for the rows.
        assert report.metrics[metric] == pytest.approx(best[f"{name}/{metric}"], abs=0.2)
    assert np.isfinite(best["loss"])
    assert json.loads((config.parent / "parts.json").read_text()).keys() == {"moods", "names"}
