"""`jobs.evaluate` on a real model directory: figures, files, the run's page, and what a user can get wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs.evaluate import evaluate
from lib import storage as places
from lib import tracking
from lib.artifacts import EvalReport
from lib.errors import DataError, ModelError, RegistryError, ResourceError, unwrap
from lib.evaluation import report as files
from lib.evaluation import scoring
from tests.trained import make_dataset, make_run, use


@pytest.fixture
def settings(database, tiny_base):
    return use(tiny_base)


def choose(settings, **values):
    return settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update=values)})


def local(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def test_figures_are_those_of_the_model_itself_and_the_run_shows_them(settings, ray_cluster, capsys):
    dataset = make_dataset(settings)
    run = make_run(settings, dataset)
    evaluate(settings)
    measured = files.read(run.ref.evaluation_uri)

    texts, truth = scoring.read_texts("sentiment", dataset.shards("test"))
    folder = local(run.ref.model_uri)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        expected = model(**batch).logits.softmax(-1).numpy()
    ours = np.array(measured.predictions["probabilities"].to_pylist())
    assert np.abs(ours - expected).max() < 1e-4
    assert measured.predictions["label"].to_pylist() == truth.tolist()
    assert measured.report.rows == 60
    assert set(measured.report.slices) == {"department", "length"}
    assert set(measured.report.slices["department"]) == {"tops", "dresses"}
    assert set(measured.report.baselines) == {"tfidf", "majority"}
    assert measured.report.methods["model"].startswith("torch fp32")

    out = capsys.readouterr().out
    assert "tfidf" in out
    assert run.ref.evaluation_uri in out
    assert "python -m jobs.promote" in out

    # The run's page shows them.
    data = run.client.get_run(run.ref.id).data
    assert data.metrics["test/macro_f1"] == pytest.approx(run.ref.evaluation().metrics["macro_f1"])
    assert {"test/tfidf/macro_f1", "test/majority/macro_f1", "test/f1/neutral"} <= set(data.metrics)
    assert data.tags["evaluated"] == run.ref.evaluation().dataset
    shown = {Path(file.path).name for file in run.client.list_artifacts(run.ref.id, "evaluation")}
    assert shown == {"report.json", "report.html", "confusion.png", "reliability.png", "baselines.png"}


def test_given_run_is_taken_before_the_latest_and_a_second_evaluation_replaces_the_first(
    settings, ray_cluster
):
    dataset = make_dataset(settings)
    older, newer = make_run(settings, dataset), make_run(settings, dataset)
    evaluate(choose(settings, run=older.ref.id))
    first = older.ref.evaluation()
    assert isinstance(first, EvalReport)
    with pytest.raises(RegistryError, match=f"--evaluation.run {newer.ref.id}"):
        newer.ref.evaluation()
    evaluate(choose(settings, run=older.ref.id, bootstrap=0, workers=2))
    second = older.ref.evaluation()
    assert first.intervals
    assert second.intervals == {}
    assert second.metrics == pytest.approx(first.metrics)


def test_no_run_yet(settings):
    with pytest.raises(
        RegistryError, match=r"no finished finetune run of 'shop'; run python -m jobs.finetune"
    ):
        evaluate(settings)


def test_unknown_run(settings):
    with pytest.raises(RegistryError, match="no run 'abc' in"):
        evaluate(choose(settings, run="abc"))


def test_run_whose_model_is_gone(settings):
    run = make_run(settings, make_dataset(settings))
    shutil.rmtree(local(run.ref.model_uri))
    with pytest.raises(RegistryError, match="has left no model"):
        evaluate(settings)


def test_weights_that_are_not_safetensors(settings):
    run = make_run(settings, make_dataset(settings))
    weights = local(run.ref.model_uri) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"pytorch_model.bin, which unpickles on loading"):
        evaluate(settings)


def test_model_that_does_not_load_fails_with_one_line_and_leaves_nothing(settings, ray_cluster):
    run = make_run(settings, make_dataset(settings))
    (local(run.ref.model_uri) / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError) as caught:
        evaluate(settings)
    line = str(unwrap(caught.value))  # what the command prints of Ray's wrapped error
    assert "does not load as a sequence classifier" in line
    assert "\n" not in line
    assert not places.published(run.ref.evaluation_uri)
    assert "evaluated" not in run.tags()


def test_dataset_that_is_gone(settings):
    dataset = make_dataset(settings)
    make_run(settings, dataset)
    shutil.rmtree(local(dataset.uri))
    with pytest.raises(DataError, match=r"run python -m jobs.preprocess first"):
        evaluate(settings)


def test_empty_test_split(settings, ray_cluster):
    make_run(settings, make_dataset(settings, test=False))
    with pytest.raises(DataError, match=r"raise data.split.test or data.limit"):
        evaluate(settings)


def test_more_actors_than_the_cluster_can_hold(settings, ray_cluster):
    make_run(settings, make_dataset(settings))
    large = settings.model_copy(
        update={"serving": settings.serving.model_copy(update={"cpus_per_replica": 5})}
    )
    with pytest.raises(ResourceError, match=r"2 scoring actor\(s\) want 10 CPU, and the cluster has 8"):
        evaluate(choose(large, workers=2))


def test_baselines_fit_on_evenly_spaced_rows_when_there_are_too_many(settings):
    dataset = make_dataset(settings)
    texts, labels = scoring.read_texts("sentiment", dataset.shards("train"), most=7)
    everything, _ = scoring.read_texts("sentiment", dataset.shards("train"))
    assert len(texts) == len(labels) == 7
    assert texts[0] == everything[0]
    assert texts[-1] == everything[-1]


def test_label_that_mlflow_would_refuse_as_a_metric_name(settings, ray_cluster):
    odd = ["so/so", "good: yes!", "bad"]
    renamed = settings.model_copy(update={"data": settings.data.model_copy(update={"labels": odd})})
    dataset = make_dataset(settings)
    manifest = dataset.manifest()
    places.write_json(places.join(dataset.uri, "manifest.json"), {**manifest, "labels": odd})
    run = make_run(renamed, dataset, odd)
    evaluate(renamed)
    assert "test/f1/good_ yes_" in tracking.client().get_run(run.ref.id).data.metrics
