"""Fine-tuning on real Ray Train workers and DeepSpeed engines, small enough for two cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib import tracking
from lib.artifacts import DatasetRef, TaskFile
from lib.errors import DataError, ResourceError
from lib.settings import Settings
from lib.tasks import load_task
from lib.training.fit import check_resources, fit

pytestmark = pytest.mark.ray

EPOCHS = 5
GOOD, BAD = ["good", "great", "love"], ["bad", "poor", "awful"]
FILLER = ["the", "dress", "fits", "size", "color", "fabric", "is", "was"]


def settings_for(base: Path, **training: object) -> Settings:
    values = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "epochs": EPOCHS,
        "learning_rate": 5e-3,
        "tokens_per_batch": 64,
        "precision": "fp32",
        "log_every": 1,
        "patience": None,
    }
    return Settings.model_validate(
        {
            "name": "tiny",
            "task": "sentiment",
            "data": {"source": "unused.csv", "labels": ["bad", "good"]},
            "model": {"base": str(base), "max_length": 32, "dropout": 0.0},
            "training": values | training,
        }
    )


def make_dataset(settings: Settings, rows: int = 240, fingerprint: str = "0123456789abcdef") -> DatasetRef:
    """Texts whose one telling word decides the label; published as jobs.preprocess would."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, rows)
    texts = []
    for label in labels:
        words = list(random.choice(FILLER, random.integers(2, 12)))
        words.insert(random.integers(0, len(words)), random.choice(GOOD if label else BAD))
        texts.append(" ".join(words))
    table = pa.table(
        {"id": [f"{i:016x}" for i in range(rows)], "text": texts, "label": pa.array(labels, pa.int32())}
    )
    table = load_task("sentiment").encode(table, settings.model)
    ref = DatasetRef("tiny", fingerprint)
    shares = {"train": (0, rows * 3 // 4), "validation": (rows * 3 // 4, rows), "test": (0, 0)}
    manifest = {"splits": {}}
    with files.publish(ref.uri) as folder:
        for split, (start, end) in shares.items():
            part = table.slice(start, end - start)
            counts = {
                n: int((part["label"].to_numpy() == i).sum()) for i, n in enumerate(settings.data.label_names)
            }
            manifest["splits"][split] = {"rows": part.num_rows, "labels": counts}
            if part.num_rows:
                (folder / split).mkdir()
                pq.write_table(part, folder / split / "part-00000.parquet", row_group_size=64)
        files.write_json(str(folder / "manifest.json"), manifest)
    return ref


@pytest.mark.slow
# The others: test_trainable.py, test_resume.py.
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_zero_stage_learns_and_exports_what_plain_transformers_reads(
    stage: int, ray_cluster: None, database: Path, tiny_base: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    settings = settings_for(tiny_base, zero_stage=stage, accumulation=2 if stage == 1 else 1)
    dataset = make_dataset(settings)
    with tracking.start_run("finetune", settings) as run:
        result = fit(settings, dataset, run)
    summary = result.summary
    assert summary["rows"] == EPOCHS * 180
    assert summary["history"][-1]["loss"] < 0.6 * summary["history"][0]["loss"]
    assert summary["best"]["macro_f1"] > 0.9
    assert len(summary["peak_memory_gib"]) == 2
    # The exported weights are those that were measured: plain transformers finds the same answers.
    with files.local_copy(result.model_uri) as folder:
        assert TaskFile.read(folder).labels == ["bad", "good"]
        assert not list(folder.glob("*.bin"))
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config._attn_implementation != "whorl_cpu"
    rows = pq.read_table(dataset.shards("validation")[0].removeprefix("file://")).to_pylist()
    with torch.no_grad():
        logits = model(**tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")).logits
    right = float((logits.argmax(-1).numpy() == [r["label"] for r in rows]).mean())
    assert right == pytest.approx(summary["best"]["accuracy"], abs=1e-6)
    assert not files.exists(run.ref.checkpoints_uri)
    logged = run.client.get_metric_history(run.ref.id, "train/loss")
    assert len(logged) == summary["steps"]


@pytest.mark.slow
def test_early_stopping(ray_cluster: None, database: Path, tiny_base: Path) -> None:
    # A learning rate of next to nothing: no validation after the first is better by min_delta.
    settings = settings_for(
        tiny_base, workers=1, epochs=50, learning_rate=1e-9, patience=2, min_delta=0.01, validate_every=2
    )
    dataset = make_dataset(settings, rows=120)
    with tracking.start_run("finetune", settings) as run:
        stopped = fit(settings, dataset, run).summary
    assert stopped["stopped_early"]
    assert stopped["steps"] == 6
    assert [v["step"] for v in stopped["validations"]] == [2, 4, 6]


def test_more_workers_than_slots_is_one_line(ray_cluster: None, tiny_base: Path) -> None:
    with pytest.raises(ResourceError, match=r"training.workers 64 need 33 CPU slots .* cluster has 8; lower"):
        check_resources(settings_for(tiny_base, workers=64))
    with pytest.raises(ResourceError, match="GPU slots"):
        check_resources(settings_for(tiny_base, gpus_per_worker=1))


def test_fewer_rows_than_workers(ray_cluster: None, storage: Path, tiny_base: Path) -> None:
    settings = settings_for(tiny_base, workers=4)
    dataset = make_dataset(settings, rows=4)
    with (
        tracking.start_run("finetune", settings) as run,
        pytest.raises(DataError, match="3 training rows for 4"),
    ):
        fit(settings, dataset, run)
