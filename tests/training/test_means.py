"""The whole line with an adapter: Ray Train, ZeRO-3, gradient checkpointing, a killed worker, the export."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib import tracking
from lib.training import checkpoints
from lib.training.fit import fit
from tests.training.engines import DIVIDED
from tests.training.test_fit import make_dataset, settings_for
from tests.training.test_resume import kill_a_worker, meanwhile


@pytest.mark.slow
def test_an_adapter_is_trained_goes_on_after_a_kill_and_is_exported_merged_and_alone(
    ray_cluster: None, storage: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    settings = settings_for(
        tiny_base,
        zero_stage=3,
        adapter={"rank": 8},
        layer_decay=0.9,
        gradient_checkpointing=True,
        learning_rate=2e-2,
        checkpoint_every=5,
        max_failures=2,
        deepspeed=DIVIDED,
    )
    dataset = make_dataset(settings)
    with (
        tracking.start_run("finetune", settings) as run,
        meanwhile(lambda: kill_a_worker(checkpoints.run_folder(run.ref), 1)),
    ):
        result = fit(settings, dataset, run)
    summary = result.summary
    assert summary["resumed"]
    assert summary["rows"] == 8 * 180
    assert summary["history"][-1]["loss"] < 0.8 * summary["history"][0]["loss"]
    rows = pq.read_table(dataset.shards("validation")[0].removeprefix("file://")).to_pylist()
    with files.local_copy(result.model_uri) as folder, files.local_copy(run.ref.adapter_uri) as adapter:
        merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(
            [r["text"] for r in rows], padding=True, return_tensors="pt"
        )
        base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
        apart = PeftModel.from_pretrained(base, str(adapter)).eval()
        assert not [p.name for p in [*folder.iterdir(), *adapter.iterdir()] if p.suffix == ".bin"]
    with torch.no_grad():
        logits, others = merged(**inputs).logits, apart(**inputs).logits
    assert torch.allclose(logits, others, atol=1e-5)
    right = float((logits.argmax(-1).numpy() == [r["label"] for r in rows]).mean())
    assert right == pytest.approx(summary["best"]["accuracy"], abs=1e-6)
