"""`jobs.promote`: first champion, better and worse candidates, and what a user can get wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.promote import promote
from jobs.rollback import rollback
from lib import registry, tracking
from lib import storage as places
from lib.artifacts import ModelRef
from lib.errors import ConfigError, GateError, ModelError, RegistryError
from tests.trained import evaluated, make_dataset, make_run, use


@pytest.fixture
def settings(database, tiny_base):
    return use(tiny_base)


@pytest.fixture
def dataset(settings):
    return make_dataset(settings)


def choose(settings, **values):
    return settings.model_copy(update={"promotion": settings.promotion.model_copy(update=values)})


def trained(settings, dataset, right):
    run = make_run(settings, dataset)
    evaluated(run, dataset, right)
    return run


def test_first_champion_needs_only_to_beat_the_baselines(settings, dataset, capsys):
    trained(settings, dataset, right=0.8)
    promote(settings)
    assert registry.champion("shop") == ModelRef("shop", 1)
    out = capsys.readouterr().out
    assert "macro_f1 above baseline tfidf" in out
    assert "champion" in out
    assert "python -m serve.deploy" in out


def test_candidate_below_a_baseline_is_registered_but_not_promoted(settings, dataset, capsys):
    trained(settings, dataset, right=0.4)
    promote(settings)
    assert registry.champion("shop") is None
    assert registry.resolve("shop", "candidate") == ModelRef("shop", 1)
    out = capsys.readouterr().out
    assert "gate not met" in out
    assert "shop has no champion yet" in out


def test_better_candidate_takes_over_and_worse_does_not(settings, dataset, capsys):
    trained(settings, dataset, right=0.8)
    promote(settings)
    trained(settings, dataset, right=0.9)
    promote(settings)
    assert registry.champion("shop") == ModelRef("shop", 2)
    trained(settings, dataset, right=0.7)
    capsys.readouterr()
    promote(settings)
    assert registry.champion("shop") == ModelRef("shop", 2)
    assert registry.resolve("shop", "candidate") == ModelRef("shop", 3)
    out = capsys.readouterr().out
    assert "macro_f1 above present champion" in out
    assert "shop@2 stays champion" in out
    assert "95% interval" in out


def test_rollback_tells_who_came_and_what_to_type(settings, dataset, capsys):
    for right in (0.8, 0.9):
        trained(settings, dataset, right=right)
        promote(settings)
    rollback(settings)
    out = capsys.readouterr().out
    assert "shop@1 is champion again, instead of shop@2" in out
    assert "version 2 instead of 1  (promoted)" in out
    assert "next: python -m serve.deploy" in out
    assert registry.champion("shop") == ModelRef("shop", 1)


def test_gate_can_be_required(settings, dataset):
    trained(settings, dataset, right=0.4)
    with pytest.raises(GateError, match="does not meet the gate") as caught:
        promote(choose(settings, require=True))
    assert caught.value.exit_code == 3
    assert registry.champion("shop") is None


def test_least_gain_is_asked_for(settings, dataset):
    trained(settings, dataset, right=0.8)
    promote(settings)
    trained(settings, dataset, right=0.82)
    promote(choose(settings, min_gain=0.1))
    assert registry.champion("shop") == ModelRef("shop", 1)
    promote(choose(settings, min_gain=0.01))
    assert registry.champion("shop") == ModelRef("shop", 2)


def test_promoting_the_champion_again_changes_nothing(settings, dataset, capsys):
    trained(settings, dataset, right=0.8)
    promote(settings)
    promote(settings)
    assert registry.versions("shop") == [ModelRef("shop", 1)]
    assert "shop@1 is the champion already" in capsys.readouterr().out


def test_gate_is_written_down(settings, dataset):
    run = trained(settings, dataset, right=0.8)
    promote(settings)
    written = places.read_json(places.join(run.artifacts_uri(), "promotion.json"))
    assert written["version"] == "shop@1"
    assert written["met"] is True
    assert [c["holds"] for c in written["conditions"]] == [True, True]
    assert tracking.client().get_model_version("shop", "1").tags["gate"] == "met"


def test_champion_of_another_dataset_is_measured_on_this_one(settings, dataset, ray_cluster, capsys):
    trained(settings, dataset, right=0.99)
    promote(settings)
    new = make_dataset(settings, "fedcba9876543210", rows=400, seed=1)
    run = trained(settings, new, right=0.8)
    match_ids(run, new)
    capsys.readouterr()
    promote(settings)
    out = capsys.readouterr().out
    assert "measuring the champion shop@1 on dataset fedcba9876543210" in out
    # The stored 0.99 was of other rows; on these the random model is right on a third.
    assert registry.champion("shop") == ModelRef("shop", 2)


def match_ids(run, dataset) -> None:
    """Give the made-up predictions the ids of the dataset's test rows."""
    import pyarrow.parquet as pq

    file = Path(run.ref.evaluation_uri.removeprefix("file://")) / "predictions.parquet"
    ids = sorted(
        i
        for shard in dataset.shards("test")
        for i in pq.read_table(shard[7:], columns=["id"])["id"].to_pylist()
    )
    rows = pq.read_table(file)
    pq.write_table(rows.set_column(0, "id", [ids]), file)


def test_champion_with_other_labels_is_still_compared(settings, dataset, ray_cluster):
    two = make_dataset(settings, "aaaaaaaaaaaaaaaa", seed=2)
    run = make_run(settings, two, labels=["positive", "negative"])
    evaluated(run, two, right=0.99)
    promote(settings)
    new = make_dataset(settings, "fedcba9876543210", rows=400, seed=1)
    match_ids(trained(settings, new, right=0.8), new)
    promote(settings)
    assert registry.champion("shop") == ModelRef("shop", 2)


def test_champion_that_was_tampered_with_is_not_measured(settings, dataset):
    trained(settings, dataset, right=0.8)
    promote(settings)
    (Path(ModelRef("shop", 1).uri.removeprefix("file://")) / "config.json").write_text("{}")
    new = make_dataset(settings, "fedcba9876543210", seed=1)
    trained(settings, new, right=0.9)
    with pytest.raises(ModelError, match=r"config.json has changed"):
        promote(settings)
    assert registry.champion("shop") == ModelRef("shop", 1)


def test_run_that_was_never_evaluated(settings, dataset):
    run = make_run(settings, dataset)
    with pytest.raises(RegistryError, match=r"that is evaluated; run python -m jobs.evaluate first"):
        promote(settings)
    with pytest.raises(RegistryError, match=f"run python -m jobs.evaluate --evaluation.run {run.ref.id}"):
        promote(choose(settings, run=run.ref.id))
    assert registry.versions("shop") == []


def test_latest_evaluated_run_is_taken_and_not_a_later_one_without(settings, dataset):
    older = trained(settings, dataset, right=0.8)
    make_run(settings, dataset)
    promote(settings)
    assert registry.describe(ModelRef("shop", 1))["run"] == older.ref.id


def test_unknown_run(settings):
    with pytest.raises(RegistryError, match="no run 'abc'"):
        promote(choose(settings, run="abc"))


def test_run_of_another_use(settings, dataset, tiny_base):
    other = use(tiny_base, "cinema")
    run = trained(other, make_dataset(other), right=0.9)
    with pytest.raises(ConfigError, match="is of 'cinema', not of 'shop'"):
        promote(choose(settings, run=run.ref.id))


def test_metric_that_cannot_decide(settings):
    with pytest.raises(
        ConfigError, match=r"promotion.metric: 'macro_fl' cannot decide; did you mean 'macro_f1'"
    ):
        promote(choose(settings, metric="macro_fl"))


def test_weights_that_are_not_safetensors(settings, dataset):
    run = trained(settings, dataset, right=0.9)
    weights = Path(run.ref.model_uri.removeprefix("file://")) / "model.safetensors"
    shutil.copy(weights, weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match="unpickles on loading"):
        promote(settings)
    assert registry.champion("shop") is None
