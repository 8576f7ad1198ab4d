"""Sentiment with several heads: rows that lack a label, the loss of each head, one pass, a directory's round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.artifacts import TaskFile
from lib.data.plan import plan
from lib.encoders import softmax
from lib.errors import ConfigError, DataError
from lib.labels import MISSING, UNKNOWN
from lib.settings import ServingSettings, Settings
from lib.tasks import sentiment
from tests.tiny import WORDS

HEADS: dict[str, Any] = {
    "sentiment": {"column": "stars", "labels": {1: "bad", 2: "good"}},
    "topic": {"column": "about", "labels": ["fit", "size", "fabric"], "weight": 0.5},
}
CLASSES = ["sentiment/bad", "sentiment/good", "topic/fit", "topic/size", "topic/fabric"]


def settings_for(base: Path | str = "unused", heads: dict[str, Any] = HEADS, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "x",
            "task": "sentiment",
            "data": {"source": "x.csv", "heads": heads},
            "model": {"base": str(base), "max_length": 32},
            "training": training,
        }
    )


def prepared(settings: Settings) -> Any:
    source = {
        "text": pa.array(["great fit", "bad size", "soft", "fine", "okay", ""]),
        "heads.sentiment.column": pa.array(["2", "1", None, "", "1", "1"]),
        "heads.topic.column": pa.array(["fit", "", "fabric", None, "colour", "fit"]),
    }
    return sentiment.prepare(source, settings.data)


def rows_for(base: Path) -> pa.Table:
    settings = settings_for(base)
    ready = prepared(settings)
    usable = (ready.labels >= 0) & ~ready.empty
    return sentiment.encode(ready.rows.filter(pa.array(usable)), settings.model)


def test_a_row_is_kept_when_any_head_has_a_label() -> None:
    ready = prepared(settings_for())
    assert ready.rows["label"].to_pylist() == [1, 0, MISSING, MISSING, 0, 0]
    assert ready.rows["label:topic"].to_pylist() == [0, MISSING, 2, MISSING, UNKNOWN, 0]
    assert ready.labels[3] == MISSING
    assert ready.labels[4] == UNKNOWN
    assert (ready.labels[:3] >= 0).all()
    assert len(set(ready.labels[:3].tolist())) == 3
    assert ready.values[4].as_py() == "topic: colour"
    assert ready.empty.tolist() == [False] * 5 + [True]


def test_columns_and_classes_are_named_by_the_heads() -> None:
    data = settings_for().data
    assert sentiment.columns(data) == {
        "text": "text",
        "heads.sentiment.column": "stars",
        "heads.topic.column": "about",
    }
    assert sentiment.classes(data) == CLASSES


def test_counts_are_of_each_head(tiny_base: Path) -> None:
    counts = sentiment.counts(rows_for(tiny_base), CLASSES)
    assert counts == dict(zip(CLASSES, [1, 1, 1, 0, 1], strict=True))


def test_loss_is_the_weighted_sum_of_what_each_head_learns(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    balance = sentiment.balance({}, settings)
    assert balance == dict(zip(CLASSES, [1, 1, 0.5, 0.5, 0.5], strict=True))
    model, rows = sentiment.build(tiny_base, settings).eval(), rows_for(tiny_base)
    batch = sentiment.collate(rows, 0)
    with torch.no_grad():
        total, outputs = sentiment.loss(model, batch, settings, balance)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        of_sentiment = torch.nn.functional.cross_entropy(
            logits[[0, 1], :2], torch.tensor([1, 0]), reduction="sum"
        )
        of_topic = torch.nn.functional.cross_entropy(
            logits[[0, 2], 2:], torch.tensor([0, 2]), reduction="sum"
        )
    assert float(total) == pytest.approx(float(of_sentiment + 0.5 * of_topic), rel=1e-5)
    assert sentiment.weight(rows, settings, balance) == 3.0
    assert outputs["sentiment/logits"].shape == (3, 2)
    assert outputs["topic/labels"].tolist() == [0, -100, 2]


def test_a_head_without_a_label_gets_no_gradient(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    model = sentiment.build(tiny_base, settings)
    batch = sentiment.collate(rows_for(tiny_base).slice(1, 1), 0)  # "bad size" has no topic
    loss, _ = sentiment.loss(model, batch, settings, sentiment.balance({}, settings))
    loss.backward()
    gradient = model.classifier.weight.grad
    assert gradient[:2].abs().sum() > 0
    assert gradient[2:].abs().sum() == 0


def test_class_weights_are_each_heads_own() -> None:
    manifest = {"splits": {"train": {"labels": dict(zip(CLASSES, [10, 30, 10, 10, 40], strict=True))}}}
    balanced = sentiment.balance(manifest, settings_for(class_weights="balanced"))
    assert balanced["sentiment/bad"] == pytest.approx(40 / 20)
    assert balanced["topic/fit"] == pytest.approx(0.5 * 60 / 30)
    topic = {**HEADS["topic"], "class_weights": {"size": 3}}
    own = sentiment.balance(manifest, settings_for(heads=HEADS | {"topic": topic}))
    assert [own[name] for name in CLASSES] == [1, 1, 0.5, 1.5, 0.5]


def test_metrics_are_of_each_head_and_their_mean() -> None:
    found = sentiment.metrics(
        {
            "sentiment/logits": np.eye(2)[[0, 1, 1, 1]],
            "sentiment/labels": np.array([0, 1, 0, -100]),
            "topic/logits": np.eye(3)[[0, 1, 2, 2]],
            "topic/labels": np.array([0, 1, 2, 0]),
        }
    )
    assert found["sentiment/accuracy"] == pytest.approx(2 / 3)
    assert found["topic/accuracy"] == pytest.approx(3 / 4)
    assert found["accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert {"sentiment/macro_f1", "topic/temperature", "macro_f1"} <= set(found)
    nothing = {"topic/logits": np.eye(3), "topic/labels": np.full(3, -100)}
    assert "topic/accuracy" not in sentiment.metrics(
        nothing | {"sentiment/logits": np.eye(2), "sentiment/labels": np.array([0, 1])}
    )


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_directory_answers_for_all_heads_in_one_pass(tiny_base: Path, tmp_path: Path, engine: str) -> None:
    settings = settings_for(tiny_base)
    model = sentiment.build(tiny_base, settings).eval()
    info = TaskFile(
        "sentiment",
        CLASSES,
        32,
        str(tiny_base),
        "0" * 16,
        heads={
            "sentiment": {"labels": ["bad", "good"], "temperature": 2.0},
            "topic": {"labels": ["fit", "size", "fabric"], "temperature": 1.0},
        },
    )
    sentiment.save(model, tiny_base, info, tmp_path)
    predictor = sentiment.load(tmp_path, ServingSettings(engine=engine, precision="fp32", threads=1))  # type: ignore[arg-type]
    passes = []
    forward = predictor.encoder._forward
    predictor.encoder._forward = lambda *batch: (passes.append(1), forward(*batch))[1]
    texts = [" ".join(WORDS[:5]), "great fabric"]
    answers = sentiment.predict(predictor, sentiment.Request(inputs=texts[:1])).results
    assert len(passes) == 1
    answers += sentiment.predict(predictor, sentiment.Request(inputs=texts[1:])).results
    rows, _ = sentiment.read(predictor.tokenizer, texts)
    logits = predictor.encoder.logits(rows)
    for answer, row in zip(answers, logits, strict=True):
        assert list(answer.heads) == ["topic"]
        assert list(answer.scores.values()) == pytest.approx(softmax(row[:2] / 2.0).tolist(), abs=1e-4)
        topic = answer.heads["topic"]
        assert list(topic.scores.values()) == pytest.approx(softmax(row[2:]).tolist(), abs=1e-4)
        assert topic.label == ["fit", "size", "fabric"][int(row[2:].argmax())]
    told = sentiment.tell(
        {"text": texts[0], "label": 1, "label:topic": -1}, {"results": [answers[0].model_dump()]}, CLASSES
    )
    assert told.endswith("(the data says: good, ?)")


def test_a_directory_of_before_has_a_temperature_of_one(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(
        '{"task": "sentiment", "labels": ["a", "b"], "max_length": 8, "base": "b", "dataset": "d", "format": 1}'
    )
    info = TaskFile.read(tmp_path)
    assert info.temperature == 1.0
    assert info.heads == {}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"labels": ["a", "b"], "heads": HEADS}, "give labels or heads, not both"),
        ({"heads": HEADS, "undersample": {"bad": 0.5}}, "a row of several heads has no single label"),
        ({"heads": {"Topic!": HEADS["topic"]}}, "heads"),
        ({"heads": {"topic": {"column": "x", "labels": []}}}, "at least one label"),
        (
            {"heads": {"topic": {**HEADS["topic"], "class_weights": {"fabrik": 2}}}},
            "data.heads.topic.class_weights: no label 'fabrik'; did you mean 'fabric'",
        ),
    ],
)
def test_mistakes_in_the_configuration(data: dict[str, Any], says: str) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=says):
        Settings.model_validate(
            {"name": "x", "task": "sentiment", "data": {"source": "x", **data}, "model": {"base": "b"}}
        )


def test_a_head_of_one_label_and_no_labels_at_all() -> None:
    one = settings_for(heads={"topic": {"column": "about", "labels": ["fit"]}})
    with pytest.raises(ConfigError, match=r"data\.heads\.topic\.labels: at least two"):
        sentiment.columns(one.data)
    with pytest.raises(ConfigError, match=r"data\.labels: at least two"):
        sentiment.columns(settings_for(heads={}).data)


def test_a_column_that_is_not_there_is_named_by_its_key(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,stars,abuot\ngreat,2,fit\n")
    settings = settings_for(tiny_base)
    data = settings.data.model_copy(update={"source": str(tmp_path / "x.csv")})
    with pytest.raises(
        DataError, match=r"no column 'about' \(data\.heads\.topic\.column\); did you mean 'abuot'"
    ):
        plan(settings.model_copy(update={"data": data}))
    (tmp_path / "x.csv").write_text("text,stars,about\ngreat,2,fit\n")
    first = plan(settings.model_copy(update={"data": data})).ref
    heavier = {
        **settings.data.heads,
        "topic": settings.data.heads["topic"].model_copy(update={"weight": 9.0}),
    }
    again = data.model_copy(update={"heads": heavier})
    assert plan(settings.model_copy(update={"data": again})).ref == first  # no row is another
    fewer = {name: settings.data.heads[name] for name in ("sentiment",)}
    other = data.model_copy(update={"heads": fewer})
    assert plan(settings.model_copy(update={"data": other})).ref != first
