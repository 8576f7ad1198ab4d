"""A chat report from made likelihoods and answers: figures, intervals over prompts, pages, the gate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib.artifacts import EvalReport
from lib.errors import RegistryError
from lib.evaluation import chat, chat_report
from lib.evaluation.answering import Answered, grouped, prompt_digest
from lib.evaluation.answering import Prompt as Asking
from lib.evaluation.chat import Asked
from lib.evaluation.classification import Measured, Subject
from lib.evaluation.nearest import Nearest
from lib.likelihood import last_answer
from lib.registry import gate
from lib.settings import EvaluationSettings, PromotionSettings

ROWS, GENERATED = 12, [0, 3, 6, 9]
REFERENCES = ["restart it", "press print", "plug it in", "call us"]


def answered(
    losses: float, answers: list[str], prompts: int = ROWS, rejected: float | None = None
) -> Answered:
    columns = {
        "id": [f"{i:04x}" for i in range(ROWS)],
        "prompt": [f"p{i % prompts}" for i in range(ROWS)],
        "loss": np.linspace(0.5, 1.5, ROWS) * losses,
        "tokens": pa.array(range(1, ROWS + 1), pa.int64()),
        "bytes": pa.array([4 * (i + 1) for i in range(ROWS)], pa.int64()),
    }
    if rejected is not None:
        columns["rejected_loss"] = np.linspace(0.5, 1.5, ROWS) * losses + rejected
    said = pa.table(
        {
            "id": [f"{i:04x}" for i in GENERATED],
            "answer": answers,
            "tokens": pa.array([len(a.split()) for a in answers], pa.int64()),
            "cut": [False, False, False, True],
        }
    )
    return Answered(pa.table(columns), said, "transformers fp32, greedy", 10.0)


def measured(
    prompts: int = ROWS, rejected: tuple[float, float] | None = None, **settings: object
) -> Measured:
    rows = pa.table(
        {
            "id": [f"{i:04x}" for i in range(ROWS)],
            "length": pa.array(range(10, 10 + ROWS), pa.int32()),
            "topic": ["a", "b", None] * 4,
        }
    )
    talk = [[{"role": "user", "content": f"<b>question</b> {i}"}] for i in GENERATED]
    asked = Asked(rows, np.array(GENERATED), talk, REFERENCES, [2, 2, 3, 2])
    before = ["I'm sorry, I can't help with that.", "print", "no", "a a a a a a"]
    return chat.measure(
        Subject("desk", "run1", "chat", "0123456789abcdef", []),
        asked,
        answered(6.0, REFERENCES, prompts, rejected and rejected[0]),
        answered(12.0, before, prompts, rejected and rejected[1]),
        Nearest(["restart it", "x", "y", "z"], 0.1, "looked up"),
        EvaluationSettings(bootstrap=200, **settings),
    )


def test_figures():
    report = measured().report
    tokens = sum(range(1, ROWS + 1))
    losses = float((np.linspace(0.5, 1.5, ROWS) * 6).sum())
    assert report.metrics["perplexity"] == pytest.approx(math.exp(losses / tokens))
    assert report.baselines["base"]["perplexity"] == pytest.approx(math.exp(2 * losses / tokens))
    assert report.metrics["bits_per_byte"] == pytest.approx(losses / math.log(2) / (4 * tokens))
    assert report.metrics["exact_match"] == 1
    assert report.baselines["base"]["refusals"] == 0.25
    assert report.baselines["nearest"]["exact_match"] == 0.25
    assert report.answers.reference["tokens_mean"] == 2.25
    assert report.answers.tokens == tokens
    assert "preference_accuracy" not in report.metrics
    value, low, high = report.differences["base"]
    assert low <= value <= high < 0
    topic = report.slices["topic"]
    assert {name: part["rows"] for name, part in topic.items()} == {"(missing)": 4, "a": 4, "b": 4}
    assert sum(part["answers"] for part in topic.values()) == 4
    part = np.arange(0, ROWS, 3)
    expected = math.exp((np.linspace(0.5, 1.5, ROWS)[part] * 6).sum() / (part + 1).sum())
    assert topic["a"]["perplexity"] == pytest.approx(expected)
    assert [talk["id"] for talk in report.answers.conversations] == ["0000", "0003", "0006", "0009"]


def test_pairs_are_ranked_by_likelihood_and_rewarded_against_the_base():
    # The base finds the chosen answer likelier by 1 nat, the model by 3: a margin of 2 for every pair.
    report = measured(rejected=(3.0, 1.0)).report
    assert report.metrics["preference_accuracy"] == 1
    assert report.metrics["ranking_accuracy"] == report.baselines["base"]["ranking_accuracy"] == 1
    assert "preference_accuracy" not in report.baselines["base"]
    report = measured(rejected=(0.5, 1.0)).report
    assert report.metrics["preference_accuracy"] == 0
    assert report.metrics["ranking_accuracy"] == 1
    report = measured(rejected=(0.5, -1.0)).report
    assert report.baselines["base"]["ranking_accuracy"] == 0
    value, low, high = report.answers.differences["ranking_accuracy"]["base"]
    assert value == low == high == 1


def test_intervals_draw_prompts_and_one_prompt_has_none():
    many, one = measured().report, measured(prompts=1).report
    assert (many.answers.prompts, one.answers.prompts) == (12, 1)
    assert many.intervals
    assert one.intervals == {}
    assert one.answers.intervals == {}
    assert one.metrics == many.metrics
    assert chat.lead(measured(prompts=1), measured(prompts=1), 100) == [0]
    assert chat.lead(measured(), measured(), 100) == [0, 0, 0]
    assert chat.lead(measured(), measured(), 100, "rouge_l") == [0, 0, 0]
    assert chat.lead(measured(), measured(), 0) == [0]


def test_what_a_user_or_a_model_said_is_shown_and_never_run(tmp_path: Path):
    chat_report.write(measured(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<b>question</b>" not in page
    assert "&lt;b&gt;question&lt;/b&gt; 3" in page
    assert 'src="http' not in page
    report = EvalReport.read(str(tmp_path))
    assert report == measured().report
    shown = chat_report.render(report)
    assert "12 test dialogues with 12 different prompts" in shown
    line = next(line for line in shown.splitlines() if line.startswith("perplexity ↓"))
    assert line.split()[-1] == "better"
    assert "better" not in next(line for line in shown.splitlines() if line.startswith("refusals"))


def test_gate_goes_down_for_perplexity_and_past_a_baseline_that_has_none():
    report = measured().report
    conditions = gate(report, None, PromotionSettings())
    assert [c.what for c in conditions] == ["perplexity below baseline base"]
    assert conditions[0].holds
    narrow = gate(report, None, PromotionSettings(min_gain=100.0))
    assert not narrow[0].holds
    assert narrow[0].threshold == pytest.approx(report.baselines["base"]["perplexity"] - 100)
    both = gate(report, report, PromotionSettings(metric="rouge_l"))
    assert [c.what for c in both] == [
        "rouge_l above baseline base",
        "rouge_l above baseline nearest",
        "rouge_l above present champion",
    ]
    assert [c.holds for c in both] == [True, True, False]
    with pytest.raises(RegistryError, match="no metric 'ranking_accuracy' was measured"):
        gate(report, None, PromotionSettings(metric="ranking_accuracy"))


def test_prompts():
    labels = np.array([-100, -100, 5, 6, -100, -100, 7, 8])
    assert last_answer(labels) == 6
    assert last_answer(labels[:5]) == 2
    with pytest.raises(ValueError, match="no token is labelled"):
        last_answer(labels[:2])
    ids = np.arange(8)
    assert prompt_digest(ids, labels) == prompt_digest(np.append(ids[:6], [3, 3]), labels)
    assert prompt_digest(ids, labels) != prompt_digest(ids + 1, labels)
    lengths = [
        [len(p.tokens) for p in group]
        for group in grouped([Asking(str(n), np.zeros(n)) for n in (2, 9, 4)], 2)
    ]
    assert lengths == [[9, 4], [2]]
