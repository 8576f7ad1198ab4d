"""The sentiment task: encoding, loss, weights, and a model directory's round trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.errors import ConfigError, ModelError
from lib.settings import ModelSettings, Settings
from lib.tasks import load_task, sentiment

TEXTS = ["the dress fits", "great", "the fabric is soft and the size was fine " * 6]


def settings_for(base: Path, **training: object) -> Settings:
    return Settings.model_validate(
        {
            "name": "x",
            "task": "sentiment",
            "data": {"source": "x.csv", "labels": ["bad", "fine", "good"]},
            "model": {"base": str(base), "max_length": 32},
            "training": training,
        }
    )


def encoded(base: Path) -> pa.Table:
    table = pa.table({"text": TEXTS, "label": pa.array([0, 2, 1], pa.int32())})
    return sentiment.encode(table, ModelSettings(base=str(base), max_length=32))


def test_encode_is_what_transformers_gives(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    rows = encoded(tiny_base)
    expected = AutoTokenizer.from_pretrained(tiny_base)(TEXTS, truncation=True, max_length=32)["input_ids"]
    assert rows["input_ids"].to_pylist() == expected
    assert rows["length"].to_pylist() == [len(i) for i in expected]
    assert rows["truncated"].to_pylist() == [False, False, True]


def test_collate_pads_to_the_longest(tiny_base: Path) -> None:
    rows = encoded(tiny_base)
    batch = sentiment.collate(rows.slice(0, 2), pad=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == rows["length"].to_pylist()[:2]
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() in ([0], [])
    assert batch["labels"].tolist() == [[0], [2]]


def test_loss_is_a_sum_so_that_batches_add_up(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    balance = {"bad": 2.0, "fine": 1.0, "good": 0.5}
    model = sentiment.build(tiny_base, settings).eval()
    rows = encoded(tiny_base)
    with torch.no_grad():
        whole, outputs = sentiment.loss(model, sentiment.collate(rows, 0), settings, balance)
        parts = [
            sentiment.loss(model, sentiment.collate(rows.slice(i, 1), 0), settings, balance)[0]
            for i in range(3)
        ]
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5)
    assert sentiment.weight(rows, settings, balance) == 3.5
    assert outputs["logits"].shape == (3, 3)


def test_class_weights_that_need_no_counts_ask_for_none() -> None:
    assert sentiment.balance({}, settings_for(Path("unused"))) == {"bad": 1, "fine": 1, "good": 1}


def test_class_weights() -> None:
    manifest = {"splits": {"train": {"labels": {"bad": 10, "fine": 30, "good": 60}}}}
    base = Path("unused")
    assert sentiment.balance(manifest, settings_for(base)) == {"bad": 1, "fine": 1, "good": 1}
    balanced = sentiment.balance(manifest, settings_for(base, class_weights="balanced"))
    assert balanced["bad"] == pytest.approx(100 / 30)
    assert sum(balanced[k] * v for k, v in manifest["splits"]["train"]["labels"].items()) == pytest.approx(
        100
    )
    given = sentiment.balance(manifest, settings_for(base, class_weights={"bad": 3}))
    assert given == {"bad": 3, "fine": 1, "good": 1}


def test_metrics_count_every_class() -> None:
    logits = np.eye(3)[[0, 0, 1, 1]]
    metrics = sentiment.metrics({"logits": logits, "labels": np.array([0, 0, 1, 0])})
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)


def test_too_long_for_the_model(tiny_base: Path) -> None:
    settings = settings_for(tiny_base).model_copy(
        update={"model": ModelSettings(base=str(tiny_base), max_length=512)}
    )
    with pytest.raises(ModelError, match=r"model.max_length 512 is above the 128 positions"):
        sentiment.build(tiny_base, settings)


def test_unknown_task() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sentiment'"):
        load_task("sentiments")


def test_a_clients_text_is_normalised_as_the_training_texts_were(tiny_base: Path) -> None:
    tokenizer = sentiment.load_tokenizer(tiny_base, 32)
    raw = ["the  fabric\tis soft\u200b ", "it&#39;s great"]
    rows, _ = sentiment.read(tokenizer, raw)
    expected, _ = sentiment.tokenize(tokenizer, ["the fabric is soft", "it's great"])
    assert [r.tolist() for r in rows] == [r.tolist() for r in expected]
    assert rows[1].tolist() != sentiment.tokenize(tokenizer, raw)[0][1].tolist()


def test_label_smoothing_is_for_training_alone(tiny_base: Path) -> None:
    plain, smooth = settings_for(tiny_base), settings_for(tiny_base, label_smoothing=0.3)
    balance = dict.fromkeys(["bad", "fine", "good"], 1.0)
    model = sentiment.build(tiny_base, plain).eval()
    # Decided scores and one row: over even scores or over each label once, smoothing changes nothing.
    model.classifier.bias.data = torch.tensor([3.0, 0.0, -3.0])
    # As DeepSpeed's engine leaves itself when it evaluates.
    model.training = True
    batch = sentiment.collate(encoded(tiny_base)[:1], 0)
    with torch.no_grad():
        measured, outputs = sentiment.loss(model, batch, smooth, balance)
        expected, _ = sentiment.loss(model, batch, plain, balance)
    assert float(measured) == pytest.approx(float(expected))
    assert set(outputs) == {"logits", "labels"}
    trained, outputs = sentiment.loss(model, batch, smooth, balance)
    assert float(trained.detach()) != pytest.approx(float(expected), rel=0.01)
    assert outputs == {}


def test_a_row_is_asked_and_its_answer_told() -> None:
    row = {"text": "great", "label": 2}
    assert sentiment.request(row, "reviews") == ("/v1/sentiment", {"inputs": ["great"]})
    reply = {"results": [{"label": "fine", "scores": {"fine": 0.75}}], "model": "reviews"}
    line = sentiment.tell(row, reply, ["bad", "fine", "good"])
    assert "→ fine 0.75   (the data says: good)" in line
