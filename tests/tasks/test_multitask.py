"""One encoder under several tasks' heads: the loss is each part's own, and a part alone answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from lib.errors import ConfigError
from lib.parts import stored
from lib.settings import Settings, load_settings
from lib.tasks import load_task, multitask


def settings_for(base: Path | str = "unused", **data: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "shared",
            "task": "multitask",
            "data": {
                "parts": {
                    "moods": {"task": "sentiment", "source": "a.csv", "labels": ["bad", "good"], "weight": 2},
                    "names": {
                        "task": "tagging",
                        "source": "b.jsonl",
                        "labels": ["PER"],
                        "metric": "entity_f1",
                    },
                },
                **data,
            },
            "model": {"base": str(base), "max_length": 32, "dropout": 0.0},
        }
    )


def rows_for(settings: Settings) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Rows of both parts as their own tasks have them, and both mixed."""
    moods = pa.table({"id": ["a", "b"], "text": ["great fit", "bad"], "label": pa.array([1, 0], pa.int32())})
    names = pa.table(
        {
            "id": ["c"],
            "tokens": [["the", "great", "dress", "was", "a", "fine", "dress"]],
            "tags": pa.array([[0, 1, 2, 0, 0, 0, 0]], pa.list_(pa.int32())),
        }
    )
    own = [
        load_task(settings.data.parts[name].task).encode(rows, settings.model)
        for name, rows in (("moods", moods), ("names", names))
    ]
    mixed = [stored(name, rows) for name, rows in zip(("moods", "names"), own, strict=True)]
    order = pa.array([2, 0, 1])
    return own[0], own[1], pa.concat_tables(mixed, promote_options="default").take(order)


def test_loss_is_the_sum_of_what_each_task_says_alone(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    model = multitask.build(tiny_base, settings).eval()
    moods, names, mixed = rows_for(settings)
    assert multitask.classes(settings.data) == [
        "moods/bad",
        "moods/good",
        "names/O",
        "names/B-PER",
        "names/I-PER",
    ]
    balance = {name: float(i) for i, name in enumerate(multitask.classes(settings.data), 1)}
    with torch.no_grad():
        total, outputs = multitask.loss(model, multitask.collate(mixed, 0), settings, balance)
        expected, weight = 0.0, 0.0
        for name, rows in (("moods", moods), ("names", names)):
            part = settings.part(name)
            task = load_task(part.task)
            own = {k.removeprefix(f"{name}/"): v for k, v in balance.items() if k.startswith(name)}
            alone = model.alone(name, tiny_base, settings).eval()
            expected += float(task.loss(alone, task.collate(rows, 0), part, own)[0])
            weight += task.weight(rows, part, own)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert multitask.weight(mixed, settings, balance) == pytest.approx(weight)
    assert outputs["moods:sentiment:logits"].shape == (2, 2)
    assert outputs["names:tagging:labels"].tolist() == [0, 1, 2, 0, 0, 0, 0]
    measured = multitask.metrics(outputs)
    assert {"moods/macro_f1", "names/entity_f1", "macro_f1", "moods/temperature"} <= set(measured)


def test_a_batch_without_a_part_still_has_gradients_for_its_head(tiny_base: Path) -> None:
    settings = settings_for(tiny_base)
    model = multitask.build(tiny_base, settings)
    balance = dict.fromkeys(multitask.classes(settings.data), 1.0)
    mixed = rows_for(settings)[2].slice(1)  # moods alone
    loss, _ = multitask.loss(model, multitask.collate(mixed, 0), settings, balance)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    of_names = [p.grad for name, p in model.named_parameters() if "part_names" in name]
    assert of_names
    assert all(float(g.abs().sum()) == 0 for g in of_names)


def test_the_encoder_is_there_once(tiny_base: Path) -> None:
    model = multitask.build(tiny_base, settings_for(tiny_base))
    kept = list(model.state_dict())
    assert sum("word_embeddings" in name for name in kept) == 1
    assert model.config.hidden_size == 32


def test_a_row_weighs_the_same_in_each_part_whatever_it_holds() -> None:
    settings = settings_for()
    parts = {
        "moods": {"rows": 100, "labels": {"bad": 20, "good": 80}},
        "names": {"rows": 50, "labels": {"O": 900, "B-PER": 50, "I-PER": 50}},
    }
    balance = multitask.balance({"splits": {"train": {"parts": parts}}}, settings)
    for name, weight in (("moods", 2.0), ("names", 1.0)):
        total = sum(n * balance[f"{name}/{label}"] for label, n in parts[name]["labels"].items())  # type: ignore[attr-defined]
        assert total / parts[name]["rows"] == pytest.approx(weight)  # type: ignore[operator]


def test_a_part_is_a_use_of_its_own() -> None:
    part = settings_for().part("names")
    assert (part.name, part.task, part.promotion.metric) == ("shared-names", "tagging", "entity_f1")
    assert part.data.source == "b.jsonl"
    assert Settings.model_validate(part.model_dump(mode="json")) == part
    whole = settings_for()
    assert Settings.model_validate(whole.model_dump(mode="json")) == whole


def test_mistakes_in_the_configuration(tmp_path: Path) -> None:
    def says(text: str) -> str:
        path = tmp_path / "x.yaml"
        path.write_text(f"name: x\nmodel: {{base: b}}\n{text}")
        with pytest.raises(ConfigError) as caught:
            load_settings(path)
        return str(caught.value)

    part = "{task: sentiment, source: a, labels: [a, b]}"
    assert "multitask needs data.parts" in says("task: multitask\ndata: {source: a, labels: [a, b]}")
    assert "only it takes them" in says(f"task: sentiment\ndata: {{parts: {{a: {part}}}}}")
    assert "source is missing; add it" in says("task: sentiment\ndata: {labels: [a, b]}")
    assert "leave them out here" in says(f"task: multitask\ndata: {{source: a, parts: {{a: {part}}}}}")
    assert "data.parts.a.task" in says("task: multitask\ndata: {parts: {a: {task: chat, source: a}}}")
    assert "data.temperature" in says(f"task: multitask\ndata: {{temperature: 0.5, parts: {{a: {part}}}}}")
