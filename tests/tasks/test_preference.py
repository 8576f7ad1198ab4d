"""The task preference: its data forms, what carries loss, and the loss against hand-computed and TRL's formula."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.dialogues import MalformedError
from lib.encoders import IGNORED
from lib.errors import ConfigError
from lib.settings import PreferenceSettings, Settings
from lib.tasks import judged, load_task, preference

ROWS = [
    ("the dress fits?", "love the great fit", "bad"),
    ("is the fabric soft?", "soft", "the color was awful and poor"),
    ("good size?", "fine size", "okay"),
]


@pytest.fixture
def settings(tiny_chat_base: Path) -> Settings:
    return Settings.model_validate(
        {
            "name": "pairs",
            "task": "preference",
            "data": {"source": "unused.jsonl"},
            "model": {"base": str(tiny_chat_base), "max_length": 96},
        }
    )


def prepared(settings: Settings, **columns: list) -> preference.Prepared:
    texts = {
        name: pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())
        for name, values in columns.items()
    }
    return preference.prepare(texts, settings.data)


def encoded(settings: Settings) -> pa.Table:
    prompts, chosen, rejected = map(list, zip(*ROWS, strict=True))
    found = prepared(settings, prompt=prompts, chosen=chosen, rejected=rejected)
    return preference.encode(found.rows, settings.model)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_texts_messages_and_whole_dialogues_are_one(settings):
    ask, good, bad = said("user", "why?"), said("assistant", "because"), said("assistant", "no")
    earlier = [said("user", "hello"), said("assistant", "hi")]
    rows = {
        "prompt": ["why?", [ask], "why?", None, [*earlier, ask]],
        "chosen": ["because", [good], [ask, good], [ask, good], [good]],
        "rejected": ["no", [bad], [ask, bad], [ask, bad], [bad]],
    }
    found = prepared(settings, **rows)
    assert not found.malformed
    both = zip(found.rows["messages"].to_pylist(), found.rows["rejected_messages"].to_pylist(), strict=True)
    assert list(both) == [([ask, good], [ask, bad])] * 4 + [([*earlier, ask, good], [*earlier, ask, bad])]
    assert found.labels.tolist() == [0] * 5
    assert len(set(found.groups.to_pylist()[:4])) == 1
    implicit = prepared(settings, chosen=[[ask, good]], rejected=[[ask, bad]])
    assert implicit.rows["messages"].to_pylist() == [[ask, good]]


def test_rows_that_teach_nothing_and_rows_of_a_wrong_form(settings):
    found = prepared(
        settings,
        prompt=["a", None, "b", "c"],
        chosen=["x", None, "y", "[1, 2] is a list"],
        rejected=["x", "", "", "z"],
    )
    assert found.labels[0] < 0  # equal answers
    assert found.empty.tolist() == [False, True, False, False]
    assert found.malformed == {2: "has no rejected answer; give both, or leave the row out"}
    assert found.rows["messages"].to_pylist()[3][-1]["content"] == "[1, 2] is a list"
    with pytest.raises(MalformedError, match=r"has no prompt; name its column under data\.columns\.prompt"):
        preference.pair({"chosen": "x", "rejected": "y"})
    ask, other = [said("user", "a"), said("assistant", "x")], [said("user", "b"), said("assistant", "y")]
    with pytest.raises(MalformedError, match="differ before the last turn"):
        preference.pair({"chosen": json.dumps(ask), "rejected": json.dumps(other)})


def test_columns(settings):
    assert set(preference.columns(settings.data)) == {"prompt", "chosen", "rejected"}
    assert set(preference.columns(settings.data, ["chosen", "rejected", "score"])) == {"chosen", "rejected"}
    sampled = settings.data.model_copy(update={"undersample": {"x": 0.5}})
    with pytest.raises(ConfigError, match=r"data\.undersample"):
        preference.columns(sampled)
    assert judged("preference") == judged("chat") == "answers"
    assert judged("sentiment") == "classes"


def test_only_the_last_answer_carries_loss(settings):
    turns = [said("user", "a"), said("assistant", "good"), said("user", "b")]
    rows = prepared(settings, prompt=[turns], chosen=["love"], rejected=["awful size"]).rows
    row = preference.encode(rows, settings.model).to_pylist()[0]
    tokenizer = AutoTokenizer.from_pretrained(settings.model.base)
    for ids, labels, answer in (
        ("input_ids", "labels", "love"),
        ("rejected_input_ids", "rejected_labels", "awful size"),
    ):
        spoken = [i for i in row[labels] if i != IGNORED]
        assert tokenizer.decode(spoken) == f"{answer}<|im_end|>"
        assert tokenizer.decode(row[ids]).count("<|im_end|>") == 4
    assert row["length"] == len(row["input_ids"]) + len(row["rejected_input_ids"])
    assert row["truncated"] is False


def test_a_long_dialogue_loses_the_same_turns_on_both_sides(settings):
    turns = [said("user", "dress " * 20), said("assistant", "good"), said("user", "b")]
    rows = prepared(settings, prompt=[turns], chosen=["love"], rejected=["awful " * 15]).rows
    row = preference.encode(rows, settings.model.model_copy(update={"max_length": 60})).to_pylist()[0]
    assert row["truncated"] is True
    tokenizer = AutoTokenizer.from_pretrained(settings.model.base)
    begins = [tokenizer.decode(row[name]) for name in ("input_ids", "rejected_input_ids")]
    assert all(text.startswith("<|im_start|>user\nb<|im_end|>") for text in begins)


def plain_log_probabilities(settings: Settings, rows: pa.Table) -> np.ndarray:
    """[2, B] by plain transformers, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(settings.model.base).eval()
    found = []
    for ids, labels in preference.FEATURES.values():
        for row in rows.to_pylist():
            tokens = torch.tensor([row[ids]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits.log_softmax(-1)
            steps = [(t, label) for t, label in enumerate(row[labels]) if label != IGNORED]
            found.append(sum(float(logits[0, t - 1, label]) for t, label in steps))
    return np.array(found).reshape(2, -1)


def test_log_probabilities_and_loss_are_those_computed_by_hand(settings):
    rows = encoded(settings)
    expected = plain_log_probabilities(settings, rows)
    reference = expected + np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])
    for name, column in zip(preference.REFERENCES.values(), reference.astype(np.float32), strict=True):
        rows = rows.append_column(name, pa.array(column))
    model = preference.build(Path(settings.model.base), settings).eval()
    batch = preference.collate(rows, 0)
    with torch.no_grad():
        ours, tokens = preference.log_probabilities(model, batch)
        loss, outputs = preference.loss(model, batch, settings, {})
    assert ours.numpy() == pytest.approx(expected, abs=1e-3)
    assert tokens[0].tolist() == [sum(x != IGNORED for x in row) for row in rows["labels"].to_pylist()]
    margin = (expected - reference)[0] - (expected - reference)[1]
    assert margin == pytest.approx([-1.0, 3.0, 2.5])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-0.1 * margin)).sum(), abs=1e-3)
    measured = preference.metrics(outputs)
    assert measured["preference_accuracy"] == pytest.approx(2 / 3)
    assert measured["margin"] == pytest.approx(0.1 * margin.mean(), abs=1e-4)
    assert preference.weight(rows, settings, {}) == 3
    assert load_task("preference").classes(settings.data) == []


def trl(policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """TRL's DPOTrainer.dpo_loss for loss_type `sigmoid` (version 0.11), transcribed."""
    logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return (
        -torch.nn.functional.logsigmoid(beta * logits) * (1 - smoothing)
        - torch.nn.functional.logsigmoid(-beta * logits) * smoothing
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_trls(smoothing):
    random = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(2, 50, generator=random) * 10 - 40 for _ in range(2))
    tokens = torch.randint(1, 30, (2, 50), generator=random).float()
    plain = PreferenceSettings(beta=0.3, label_smoothing=smoothing)
    ours, rewards = preference.dpo(policy, reference, tokens, plain)
    assert torch.allclose(ours, trl(policy, reference, 0.3, smoothing), atol=1e-5)
    assert torch.allclose(rewards, 0.3 * (policy - reference))
    per_token = plain.model_copy(update={"length_normalised": True})
    shorter, _ = preference.dpo(policy, reference, tokens, per_token)
    assert torch.allclose(shorter, trl(policy / tokens, reference / tokens, 0.3, smoothing), atol=1e-5)
    with_sft, _ = preference.dpo(policy, reference, tokens, plain.model_copy(update={"sft": 2.0}))
    assert torch.allclose(with_sft - ours, -2 * policy[0] / tokens[0], atol=1e-4)


def test_a_model_that_is_its_reference_has_loss_log_2():
    same = torch.randn(2, 8)
    losses, rewards = preference.dpo(same, same.clone(), torch.ones(2, 8), PreferenceSettings())
    assert losses.numpy() == pytest.approx(np.log(2))
    assert rewards.abs().max() == 0
