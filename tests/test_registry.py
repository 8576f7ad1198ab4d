"""The registry: versions that appear whole and never change, aliases, the gate."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from lib import champions, registry, tracking
from lib import storage as files
from lib.artifacts import ModelRef
from lib.errors import ModelError, RegistryError, StorageError
from lib.settings import PromotionSettings, Settings
from tests.trained import LABELS, evaluated, make_dataset, make_measured, make_run, use


@pytest.fixture
def settings(database, tiny_base) -> Settings:
    return use(tiny_base)


@pytest.fixture
def dataset(settings):
    return make_dataset(settings)


def trained(settings, dataset, right=0.9):
    """A run and the report of its evaluation."""
    run = make_run(settings, dataset)
    return run, evaluated(run, dataset, right)


def path(ref: ModelRef) -> Path:
    return path_of(ref.uri)


def path_of(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def test_a_version_holds_the_model_its_checksums_and_its_lineage(settings, dataset):
    run, report = trained(settings, dataset)
    ref = registry.register(run, report)
    assert str(ref) == "shop@1"
    assert AutoModelForSequenceClassification.from_pretrained(path(ref)).config.id2label[2] == LABELS[2]
    lineage = registry.describe(ref)
    assert lineage["run"] == run.ref.id
    assert lineage["dataset"] == dataset.fingerprint
    assert lineage["metrics"] == report.metrics
    assert Settings.model_validate(lineage["config"]) == settings
    assert lineage["git_commit"]
    assert lineage["versions"]["torch"]
    assert set(lineage["files"]) >= {"config.json", "model.safetensors", "task.json", "tokenizer.json"}


def test_a_version_carries_the_adapter_that_its_run_left(settings, dataset):
    run, report = trained(settings, dataset)
    with files.publish(run.ref.adapter_uri) as folder:
        (folder / "adapter_config.json").write_text('{"r": 8}')
        shutil.copy(path_of(run.ref.model_uri) / "model.safetensors", folder / "adapter_model.safetensors")
    ref = registry.register(run, report)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(
        registry.describe(ref)["files"]
    )
    with registry.open_version(ref) as folder:
        assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]


def test_an_adapter_that_unpickles_is_not_registered(settings, dataset):
    run, report = trained(settings, dataset)
    with files.publish(run.ref.adapter_uri) as folder:
        (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"adapter_model\.bin unpickles on loading"):
        registry.register(run, report)
    assert registry.versions("shop") == []


def test_mlflow_shows_the_lineage(settings, dataset):
    run, report = trained(settings, dataset)
    ref = registry.register(run, report)
    row = tracking.client().get_model_version("shop", "1")
    assert row.run_id == run.ref.id
    assert row.tags["dataset"] == dataset.fingerprint
    assert row.tags["uri"] == ref.uri
    assert files.exists(row.tags["config"])
    assert float(row.tags["test/macro_f1"]) == pytest.approx(report.metrics["macro_f1"], abs=1e-4)


def test_registering_a_run_twice_gives_the_same_version(settings, dataset):
    run, report = trained(settings, dataset)
    first = registry.register(run, report)
    before = path(first).stat().st_mtime_ns
    assert registry.register(run, report) == first
    assert path(first).stat().st_mtime_ns == before
    assert registry.versions("shop") == [first]


def test_each_run_becomes_a_version_of_its_own(settings, dataset):
    refs = [registry.register(*trained(settings, dataset)) for _ in range(3)]
    assert [ref.version for ref in refs] == [1, 2, 3]
    assert registry.versions("shop") == refs


def test_resolve_by_number_and_by_alias(settings, dataset):
    first = registry.register(*trained(settings, dataset))
    second = registry.register(*trained(settings, dataset))
    registry.set_alias(first, "champion")
    registry.set_alias(second, "challenger")
    assert registry.resolve("shop") == first
    assert registry.resolve("shop", "champion") == first
    assert registry.resolve("shop", "challenger") == second
    assert registry.resolve("shop", "2") == second
    registry.set_alias(second, "champion")
    assert registry.champion("shop") == second


def test_no_champion_yet_is_one_line_with_the_mend(settings, dataset):
    with pytest.raises(RegistryError, match=r"no champion of 'shop' yet; run python -m jobs.promote first"):
        registry.resolve("shop")
    registry.register(*trained(settings, dataset))
    assert registry.champion("shop") is None
    with pytest.raises(RegistryError, match=r"no champion of 'shop' yet \(versions: 1\)"):
        registry.resolve("shop")
    with pytest.raises(RegistryError, match="did you mean 'shop'"):
        registry.resolve("shpo")


def test_unknown_alias_and_number_name_what_there_is(settings, dataset):
    ref = registry.register(*trained(settings, dataset))
    registry.set_alias(ref, "champion")
    with pytest.raises(RegistryError, match=r"no alias 'champoin' of 'shop'; did you mean 'champion'"):
        registry.resolve("shop", "champoin")
    with pytest.raises(RegistryError, match=r"no model version shop@7 in storage \(there are: 1\)"):
        registry.resolve("shop", "7")


def test_champion_whose_files_are_gone_is_not_passed_over(settings, dataset):
    ref = registry.register(*trained(settings, dataset))
    registry.set_alias(ref, "champion")
    shutil.rmtree(path(ref))
    with pytest.raises(RegistryError, match="no model version shop@1 in storage"):
        registry.champion("shop")


def test_crown_only_if_the_champion_is_still_the_one_compared_with(settings, dataset):
    first, second, third = (registry.register(*trained(settings, dataset)) for _ in range(3))
    assert registry.crown(first, instead_of=None)
    assert registry.crown(second, instead_of=first)
    assert not registry.crown(third, instead_of=first)
    assert registry.champion("shop") == second


def test_a_change_under_a_number_that_another_took_does_not_happen(settings, dataset, monkeypatch):
    first, second = (registry.register(*trained(settings, dataset)) for _ in range(2))
    assert registry.crown(first, instead_of=None)
    latest = champions.latest

    def overtaken(model: str) -> int:
        number = latest(model)
        champions.record(model, number + 1, first.version, None, "promoted by another process")
        return number

    monkeypatch.setattr(champions, "latest", overtaken)
    assert not registry.crown(second, instead_of=first)
    assert registry.champion("shop") == first


def test_rollback_goes_back_one_champion_at_a_time(settings, dataset):
    first, second, third = (registry.register(*trained(settings, dataset)) for _ in range(3))
    with pytest.raises(RegistryError, match="no champion of 'shop' yet"):
        registry.roll_back("shop", "why")
    for ref, instead_of in ((first, None), (second, first), (third, second)):
        assert registry.crown(ref, instead_of)
    assert registry.roll_back("shop", "too slow") == (third, second)
    assert registry.champion("shop") == second
    assert tracking.client().get_model_version("shop", "3").tags["rolled_back"] == "too slow"
    assert registry.roll_back("shop", "wrong") == (second, first)
    with pytest.raises(RegistryError, match="shop@1 has no champion before it"):
        registry.roll_back("shop", "again")
    # One that follows a rollback is undone as any other.
    assert registry.crown(third, first)
    assert registry.roll_back("shop", "still") == (third, first)
    told = [(change.version, change.instead_of, change.why) for change in champions.history("shop")]
    assert told == [
        (1, 3, "rollback: still"),
        (3, 1, "promoted"),
        (1, 2, "rollback: wrong"),
        (2, 3, "rollback: too slow"),
        (3, 2, "promoted"),
        (2, 1, "promoted"),
        (1, None, "promoted"),
    ]


def test_promotion_killed_before_its_files_leaves_nothing_a_reader_sees(settings, dataset):
    run, report = trained(settings, dataset)
    client = tracking.client()
    client.create_registered_model("shop")
    client.create_model_version("shop", source=run.ref.model_uri, run_id=run.ref.id)  # and then: kill -9
    assert registry.versions("shop") == []
    with pytest.raises(RegistryError, match="no model version shop@1"):
        registry.resolve("shop", "1")
    assert registry.register(run, report) == ModelRef("shop", 2)


def test_registration_that_fails_leaves_neither_row_nor_files(settings, dataset, storage):
    run, report = trained(settings, dataset)
    (storage / "models").write_text("a file where the folder should be")
    with pytest.raises(StorageError):
        registry.register(run, report)
    assert list(tracking.client().search_model_versions("name = 'shop'")) == []


def test_new_database_beside_old_storage_does_not_touch_old_versions(
    settings, dataset, storage, empty_database, monkeypatch
):
    old = registry.register(*trained(settings, dataset))
    checksum = files.checksum(f"{old.uri}/model.safetensors")
    new = shutil.copy(empty_database, storage / "new.db")
    monkeypatch.setenv("WHORL_DATABASE", f"sqlite:///{new}")
    assert registry.register(*trained(settings, dataset)).version == 2
    assert files.checksum(f"{old.uri}/model.safetensors") == checksum


def _register(places: dict[str, str], run_id: str, start, results) -> None:
    import os

    os.environ.update(places)
    run = tracking.attach(tracking.RunRef(run_id, "shop"))
    start.wait()
    results.put((run_id, registry.register(run, run.ref.evaluation()).version))


def test_promotions_at_the_same_moment_get_different_versions(settings, dataset):
    runs = [trained(settings, dataset)[0] for _ in range(3)]
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=_register, args=(tracking.places(), run.ref.id, start, results))
        for run in runs
    ]
    for worker in workers:
        worker.start()
    taken = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert sorted(taken.values()) == [1, 2, 3]
    for run_id, version in taken.items():
        assert registry.describe(ModelRef("shop", version))["run"] == run_id


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "task.json").write_text("{}"), "task.json has changed"),
        (lambda folder: (folder / "extra.json").write_text("{}"), "extra.json is new"),
        (lambda folder: (folder / "version.json").unlink(), "not a registered model version"),
    ],
)
def test_version_that_was_tampered_with_does_not_open(settings, dataset, damage, message):
    ref = registry.register(*trained(settings, dataset))
    with registry.open_version(ref) as folder:
        assert (folder / "model.safetensors").is_file()
    damage(path(ref))
    with pytest.raises(ModelError, match=message), registry.open_version(ref):
        pass


def model_folder(run) -> Path:
    return Path(run.ref.model_uri.removeprefix("file://"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
            "pytorch_model.bin unpickles on loading",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.pt"),
            "holds model.pt, which unpickles",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04."),
            "is not a safetensors file",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "task.json").unlink(), "holds no task.json"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_model_that_cannot_be_served_safely_is_not_registered(settings, dataset, damage, message):
    run, report = trained(settings, dataset)
    damage(model_folder(run))
    with pytest.raises(ModelError, match=message):
        registry.register(run, report)
    assert registry.versions("shop") == []


def test_run_without_a_model_is_not_registered(settings, dataset):
    run, report = trained(settings, dataset)
    shutil.rmtree(model_folder(run))
    with pytest.raises(RegistryError, match="has left no model"):
        registry.register(run, report)


def report_of(right: float, dataset: str = "0123456789abcdef"):
    return make_measured("run", dataset, right).report


def test_gate_wants_the_candidate_above_every_baseline():
    conditions = registry.gate(report_of(0.9), None, PromotionSettings())
    assert [c.what for c in conditions] == [
        "macro_f1 above baseline tfidf",
        "macro_f1 above baseline majority",
    ]
    assert all(c.holds for c in conditions)
    assert not any(c.holds for c in registry.gate(report_of(0.4), None, PromotionSettings()))


def test_gate_wants_the_candidate_above_the_champion_by_the_least_gain():
    report, rival = report_of(0.9), report_of(0.87)
    assert registry.gate(report, rival, PromotionSettings())[-1].holds
    assert not registry.gate(report, report, PromotionSettings())[-1].holds  # equal is not better
    assert not registry.gate(report, rival, PromotionSettings(min_gain=0.05))[-1].holds


def test_gate_refuses_reports_of_different_datasets():
    with pytest.raises(RegistryError, match="different datasets"):
        registry.gate(report_of(0.9), report_of(0.8, "fedcba9876543210"), PromotionSettings())


def test_gate_without_baselines_does_not_hold_by_default():
    with pytest.raises(RegistryError, match="no baselines"):
        registry.gate(dataclasses.replace(report_of(0.9), baselines={}), None, PromotionSettings())
