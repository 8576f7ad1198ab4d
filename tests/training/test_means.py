"""From a task to an exported model with an adapter; with Ray Train, ZeRO-3, gradient checkpointing and a kill too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ray.train import Checkpoint

from lib import storage as files
from lib import tracking
from lib.artifacts import DatasetRef, RunRef
from lib.settings import Settings
from lib.tasks import load_task
from lib.training import checkpoints
from lib.training.fit import export, fit
from tests.training.engines import DIVIDED
from tests.training.ranks import Ranks
from tests.training.test_fit import make_dataset, settings_for


def answers(values: dict[str, Any], shard: str, to: Path, seed: int) -> torch.Tensor:
    """Train a task's model a few steps through the loop's own engine and save it; logits of some rows."""
    from lib.training import loop

    settings = Settings.model_validate(values)
    dataset = DatasetRef(settings.name, "unread")
    engine, task = loop.build_engine(settings, dataset), load_task(settings.task)
    batch = task.collate(pq.read_table(shard).slice(0, 8), 0)
    balance = dict.fromkeys(settings.data.label_names, 1.0)
    for _ in range(3):
        engine.backward(task.loss(engine, batch, settings, balance)[0], scale_wrt_gas=False)
        engine.step()
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    checkpoints.write_engine(engine, to, seed)
    engine.destroy()
    return logits.clone()


@pytest.mark.parametrize(
    "means", [{"adapter": {"rank": 4, "kind": "dora"}}, {"layers": 1}, {}], ids=["dora", "layers", "all"]
)
def test_a_task_is_exported_with_the_logits_it_was_trained_to(
    means: dict[str, Any], alone: Ranks, storage: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    more = {"zero_stage": 3, "gradient_checkpointing": True, "neftune_alpha": 5.0, "deepspeed": DIVIDED}
    settings = settings_for(tiny_base, **more, **means)
    dataset, run = make_dataset(settings), RunRef("a1", "tiny")
    shard = dataset.shards("train")[0].removeprefix("file://")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (trained,) = alone.run(answers, settings.model_dump(mode="json"), shard, folder, 0)
    export(settings, dataset, run, Checkpoint.from_directory(folder), {})
    with files.local_copy(run.model_uri) as model:
        plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    batch = load_task("sentiment").collate(pq.read_table(shard).slice(0, 8), 0)
    with torch.no_grad():
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(logits, trained, atol=1e-5)
    assert files.exists(run.adapter_uri) == ("adapter" in means)


@pytest.mark.slow
def test_an_adapter_is_trained_and_exported_merged_and_alone(
    ray_cluster: None, storage: Path, tiny_base: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    settings = settings_for(
        tiny_base,
        zero_stage=3,
        adapter={"rank": 8},
        layer_decay=0.9,
        gradient_checkpointing=True,
        learning_rate=2e-2,
        deepspeed=DIVIDED,
    )
    dataset = make_dataset(settings)
    with tracking.start_run("finetune", settings) as run:
        result = fit(settings, dataset, run)
    summary = result.summary
    assert summary["rows"] == settings.training.epochs * 180
    rows = pq.read_table(dataset.shards("validation")[0].removeprefix("file://")).to_pylist()
    with files.local_copy(result.model_uri) as folder, files.local_copy(run.ref.adapter_uri) as adapter:
        merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(
            [r["text"] for r in rows], padding=True, return_tensors="pt"
        )
        base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
        apart = PeftModel.from_pretrained(base, str(adapter)).eval()
        # They begin at zero.
        trained = {n: p for n, p in apart.named_parameters() if "lora_B" in n}
        assert len(trained) == 2 * 6
        assert all(p.abs().max() > 1e-3 for p in trained.values())
        assert not [p.name for p in [*folder.iterdir(), *adapter.iterdir()] if p.suffix == ".bin"]
    with torch.no_grad():
        logits, others = merged(**inputs).logits, apart(**inputs).logits
    assert torch.allclose(logits, others, atol=1e-5)
    right = float((logits.argmax(-1).numpy() == [r["label"] for r in rows]).mean())
    assert right == pytest.approx(summary["best"]["accuracy"], abs=1e-6)
