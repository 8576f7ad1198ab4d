"""The chat task: what is learned of rows, the sum that the loss is, and a model directory's round trip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.artifacts import TaskFile
from lib.errors import ConfigError, ModelError, RequestError
from lib.labels import MISSING
from lib.settings import ServingSettings, Settings
from lib.tasks import UnencodableError, chat, deciding_metric, packs

TALKS = [("the dress fits?", "great"), ("is the fabric soft", "love it a lot"), ("good size", "bad")]


def settings_for(base: Path | str, length: int = 64, **training: object) -> Settings:
    return Settings.model_validate(
        {
            "name": "x",
            "task": "chat",
            "data": {"source": "x.jsonl"},
            "model": {"base": str(base), "max_length": length},
            "training": training,
        }
    )


def encoded(base: Path) -> pa.Table:
    pairs = {
        name: pa.array([t[i] for t in TALKS], pa.string()) for i, name in enumerate(["question", "answer"])
    }
    prepared = chat.prepare(pairs, settings_for(base).data)
    return chat.encode(prepared.rows, settings_for(base).model)


def test_prepare_tells_what_is_usable() -> None:
    lists = [
        [{"role": "user", "content": "The Dress?"}, {"role": "assistant", "content": "great"}],
        [{"role": "user", "content": "the  dress?"}, {"role": "assistant", "content": "bad"}],
        [{"role": "assistant", "content": ""}],
        None,
    ]
    source = {"messages": pa.array([None if v is None else json.dumps(v) for v in lists], pa.string())}
    prepared = chat.prepare(source, settings_for("x").data)
    assert prepared.labels.tolist() == [0, 0, MISSING, MISSING]
    assert prepared.empty.tolist() == [False, False, False, True]
    assert list(prepared.malformed) == [2]
    # Other answers, so no duplicates; the same question, so one split.
    assert prepared.texts[0] != prepared.texts[1]
    assert prepared.groups is not None
    assert prepared.groups[0] == prepared.groups[1]


def test_what_the_template_refuses_names_its_row(tiny_chat_base: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never no') }}{% endif %}x"
    )
    settings = settings_for(tiny_chat_base)
    model = settings.model.model_copy(update={"chat_template": str(template)})
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "x"}] for q in ("no", "yes")]
    with pytest.raises(UnencodableError, match="never no") as caught:
        chat.encode(pa.table({"messages": pa.array(turns, chat.MESSAGES)}), model)
    assert caught.value.row == 0


def test_loss_is_a_sum_over_the_assistants_tokens(tiny_chat_base: Path) -> None:
    settings = settings_for(tiny_chat_base)
    model = chat.build(tiny_chat_base, settings).eval()
    rows = encoded(tiny_chat_base)
    with torch.no_grad():
        whole, outputs = chat.loss(model, chat.collate(rows, 0), settings, {})
        parts = [chat.loss(model, chat.collate(rows.slice(i, 1), 0), settings, {}) for i in range(3)]
    weight = chat.weight(rows, settings, {})
    assert float(whole) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-5)
    assert weight == sum(label != -100 for row in rows["labels"].to_pylist() for label in row) > 6
    merged = {key: np.concatenate([part[key] for _, part in parts]) for key in outputs}
    expected = float(np.exp(float(whole) / weight))
    assert chat.metrics(merged)["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert chat.loss(model, chat.collate(rows, 0), settings, {})[1] == {}


def test_what_is_exported_is_what_was_trained(tiny_chat_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = settings_for(tiny_chat_base)
    model = chat.build(tiny_chat_base, settings).eval()
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    rows = encoded(tiny_chat_base)
    with torch.no_grad():
        loss, _ = chat.loss(model, chat.collate(rows, 0), settings, {})
    info = TaskFile("chat", [], 64, str(tiny_chat_base), "0")
    chat.save(model, tiny_chat_base, info, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    ids = torch.tensor([rows["input_ids"][0].as_py()])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
        again, _ = chat.loss(chat.build(tmp_path, settings).eval(), chat.collate(rows, 0), settings, {})
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert "whorl" not in (tmp_path / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert TaskFile.read(tmp_path, "chat") == info


def test_a_model_answers_as_openai_does(tiny_chat_base: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_chat_base)
    chat.save(
        chat.build(tiny_chat_base, settings),
        tiny_chat_base,
        TaskFile("chat", [], 64, str(tiny_chat_base), "0"),
        tmp_path,
    )
    predictor = chat.load(tmp_path, ServingSettings(precision="fp32", threads=1))
    asked = [[{"role": "user", "content": q}] for q, _ in TALKS]
    together = predictor.answers(asked, 12)
    alone = [predictor.answers([turns], 12)[0] for turns in asked]
    assert together == alone
    row = {"messages": [*asked[0], {"role": "assistant", "content": "great"}]}
    path, body = chat.request(row, "mine@1")
    assert path == "/v1/chat/completions"
    assert body["messages"] == asked[0]
    reply = chat.predict(predictor, chat.Request.model_validate(body | {"max_tokens": 5}))
    choice = reply.choices[0]
    assert (reply.model, reply.usage.completion_tokens <= 5) == ("mine@1", True)
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.content.strip() == choice.message.content
    told = chat.tell(row, reply.model_dump(), [])
    assert told.startswith("the dress fits?\n")
    assert told.endswith("(the data says: great)")
    drawn = [predictor.answers(asked, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(RequestError, match="tokens and the model reads 256; shorten them"):
        predictor.answers([[{"role": "user", "content": "good " * 400}]], 5)


def test_only_a_chat_model_is_loaded(tiny_chat_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no task\.json"):
        chat.load(tiny_chat_base, ServingSettings())


def test_defaults_follow_the_task(tiny_chat_base: Path) -> None:
    assert deciding_metric(settings_for(tiny_chat_base)) == "loss"
    assert packs(settings_for(tiny_chat_base))
    assert not packs(settings_for(tiny_chat_base, packing=False))
    reviews = {"source": "x.csv", "labels": ["a", "b"]}
    other = {"name": "x", "task": "sentiment", "data": reviews, "model": {"base": "x"}}
    sentiment = Settings.model_validate(other)
    assert (deciding_metric(sentiment), packs(sentiment)) == ("macro_f1", False)
    with pytest.raises(ConfigError, match=r"training\.packing: the task sentiment has nothing to pack"):
        packs(Settings.model_validate({**other, "training": {"packing": True}}))
    with pytest.raises(ConfigError, match=r"data\.undersample: a dialogue has no label"):
        chat.columns(settings_for("x").data.model_copy(update={"undersample": {"a": 0.5}}))
