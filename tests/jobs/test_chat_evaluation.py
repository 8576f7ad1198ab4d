"""`jobs.evaluate` and `jobs.promote` for chat: figures against plain transformers, pages, judge, the gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.evaluate import evaluate
from jobs.promote import promote
from lib import registry
from lib.artifacts import ModelRef
from lib.encoders import IGNORED
from lib.errors import ConfigError, DataError, ModelError
from lib.evaluation import before_after, chat
from lib.evaluation import report as files
from lib.likelihood import last_answer
from lib.settings import Settings, override
from tests.chatting import GOOD, MARKUP, make_dataset, make_run, use
from tests.evaluation.test_judge import KEY, Server


def local(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("WHORL_JUDGE_KEY", KEY)
    with Server().up() as running:
        yield running


@pytest.fixture
def settings(database: Path, tiny_chat_base: Path) -> Settings:
    return use(tiny_chat_base)


def alone(folder: Path, tokenizer: Path, rows: list[dict], most: int) -> tuple[float, int, list[str]]:
    """Summed loss, answer tokens and greedy answers of plain transformers, one dialogue at a time."""
    model, words = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(tokenizer),
    )
    loss, tokens, answers = 0.0, 0, []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), np.array(row["labels"])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
            for t in np.flatnonzero(labels != IGNORED):
                loss -= float(logits[t - 1, labels[t]])
                tokens += 1
            prompt = ids[:, : last_answer(labels)]
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(words.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return loss, tokens, answers


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
def test_before_and_after(settings: Settings, ray_cluster: None, server: Server, capsys) -> None:
    judge = {"url": server.url, "model": "umpire", "pairs": 6}
    asked = override(
        settings,
        {"evaluation.workers": 2, "evaluation.answers.judge": judge, "evaluation.answers.dialogues": 20},
        "test",
    )
    dataset = make_dataset(asked)
    run = make_run(asked, dataset, steps=120)
    evaluate(asked)
    report, predictions = (measured := files.read(run.ref.evaluation_uri)).report, measured.predictions

    rows = (
        pa.concat_tables([pq.read_table(local(s)) for s in dataset.shards("test")]).sort_by("id").to_pylist()
    )
    own = local(run.ref.model_uri)
    for folder, figures, prefix in (
        (own, report.metrics, ""),
        (Path(settings.model.base), report.baselines["base"], "base_"),
    ):
        loss, tokens, answers = alone(folder, own, rows, most=12)
        assert figures["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
        assert report.answers.tokens == tokens
        ours = predictions[f"{prefix}answer"].to_pylist()
        assert sum(answer is not None for answer in ours) == report.answers.generated == 20
        assert [a for a in ours if a is not None] == [
            a for a, o in zip(answers, ours, strict=True) if o is not None
        ]
    assert report.metrics["perplexity"] < 2 < report.baselines["base"]["perplexity"]
    assert report.metrics["rouge_l"] > 0.5 > report.baselines["base"]["rouge_l"]
    assert report.metrics["cut"] == 0
    assert report.baselines["base"]["cut"] > 0
    # Topics decide the answer, and the nearest question mostly has the same.
    assert report.baselines["nearest"]["exact_match"] > 0.5
    assert "perplexity" not in report.baselines["nearest"]
    assert report.deciding == "perplexity"
    value, low, high = report.differences["base"]
    assert low <= value <= high < 0
    assert set(report.slices) == {"topic", "length"}
    assert sum(part["rows"] for part in report.slices["topic"].values()) == 24
    assert sum(part["answers"] for part in report.slices["topic"].values()) == 20
    assert set(report.slices["topic"]) == set(GOOD)
    assert report.answers.prompts == len(
        {tuple(row["input_ids"][: last_answer(np.array(row["labels"]))]) for row in rows}
    )
    assert report.answers.judge["pairs"] == 6
    assert len(server.seen) == 1 + 2 * 6
    assert KEY not in local(run.ref.evaluation_uri).joinpath("report.json").read_text()

    page = local(run.ref.evaluation_uri).joinpath("report.html").read_text()
    assert MARKUP not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('class="talk"') == 20
    logged = run.client.get_run(run.ref.id).data.metrics
    assert logged["test/perplexity"] == pytest.approx(report.metrics["perplexity"])
    assert logged["test/base/rouge_l"] == pytest.approx(report.baselines["base"]["rouge_l"])
    out = capsys.readouterr().out
    assert "umpire prefers the model to its base in" in out
    assert "perplexity ↓" in out

    promote(settings)
    assert registry.champion("desk") == ModelRef("desk", 1)
    assert "perplexity below baseline base" in capsys.readouterr().out

    # A run that learned nothing is neither below its base nor below the champion.
    lazy = make_run(settings, dataset, steps=0)
    evaluate(settings)
    promote(settings)
    assert registry.champion("desk") == ModelRef("desk", 1)
    out = capsys.readouterr().out
    assert "perplexity below present champion" in out
    assert "desk@1 stays champion" in out
    worse = files.read(lazy.ref.evaluation_uri)
    value, low, high = chat.lead(worse, measured, 200)
    assert value == pytest.approx(worse.report.metrics["perplexity"] - report.metrics["perplexity"])
    assert 0 < low <= value <= high
    assert worse.report.metrics["perplexity"] == pytest.approx(worse.report.baselines["base"]["perplexity"])
    assert worse.report.differences["base"] == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(ValueError, match="on different rows"):
        chat.lead(worse, measured, 200, "rouge_l")  # other dialogues were generated


def test_metric_that_cannot_decide(settings: Settings) -> None:
    with pytest.raises(
        ConfigError, match=r"promotion.metric: 'perplexty' cannot decide; did you mean 'perplexity'"
    ):
        before_after.deciding(override(settings, {"promotion.metric": "perplexty"}, "test"))
    with pytest.raises(ConfigError, match="'macro_f1' cannot decide"):
        promote(override(settings, {"promotion.metric": "macro_f1"}, "test"))


def test_a_pattern_that_is_none_is_one_line(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"refusals: '\(sorry' is not a regular expression"):
        override(settings, {"evaluation.answers.refusals": ["(sorry"]}, "test")


def test_model_of_another_vocabulary(settings: Settings, tmp_path: Path) -> None:
    dataset = make_dataset(settings)
    run = make_run(settings, dataset, steps=0)
    tokenizer = AutoTokenizer.from_pretrained(settings.model.base)
    tokenizer.add_tokens(["whorl"])
    tokenizer.save_pretrained(local(run.ref.model_uri))
    with pytest.raises(ModelError, match="has another vocabulary than"):
        before_after.check_vocabulary(run.ref.model_uri, dataset)


def test_split_without_an_answer(settings: Settings) -> None:
    dataset = make_dataset(settings, rows=4)
    for shard in dataset.shards("test"):
        rows = pq.read_table(local(shard))
        silent = pa.array([[IGNORED] * len(row) for row in rows["labels"].to_pylist()], rows["labels"].type)
        pq.write_table(rows.set_column(rows.column_names.index("labels"), "labels", silent), local(shard))
    with pytest.raises(DataError, match="has no dialogue with an answer"):
        before_after.read_test(dataset, 4, [])


def test_behaviours_are_refused_before_training(settings: Settings) -> None:
    from jobs.finetune import finetune

    wanted = [{"name": "typos", "kind": "invariance", "change": "typos"}]
    settings = Settings.model_validate(
        {**settings.model_dump(mode="json"), "evaluation": {"behaviours": wanted}}
    )
    with pytest.raises(
        ConfigError, match=r"evaluation\.behaviours: chat chooses no label .*; leave them out"
    ):
        finetune(settings)
