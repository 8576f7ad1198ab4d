"""A model of several heads, scored and measured in this process: each head on the rows that have its label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import heads
from lib import storage as places
from lib.artifacts import DatasetRef, TaskFile
from lib.errors import DataError
from lib.evaluation import behaviours, scoring
from lib.evaluation import report as files
from lib.evaluation.classification import Subject, lead
from lib.evaluation.several import measure_heads
from lib.evaluation.text import render, reports
from lib.heads import laid_out
from lib.settings import ServingSettings, Settings
from lib.tasks import sentiment

NAMED = {"mood": ["bad", "good"], "topic": ["fit", "size", "fabric"]}
ROWS = 60


class Here:
    """A pool of one actor that is no actor."""

    def __init__(self, scorer: scoring.Scorer) -> None:
        methods = {name: SimpleNamespace(remote=getattr(scorer, name)) for name in ("answer", "logits")}
        self.actor = SimpleNamespace(**methods)

    def map(self, call: Callable[[Any, Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
        return (call(self.actor, part) for part in parts)

    map_unordered = map


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[tuple[Any, ...]]:
    """A dataset of two heads whose rows lack labels, a model of both, and the settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WHORL_STORAGE", str(tmp_path_factory.mktemp("several")))
        columns = {"mood": "mood", "topic": "about"}
        settings = Settings.model_validate(
            {
                "name": "twofold",
                "task": "sentiment",
                "data": {
                    "source": "unused.csv",
                    "heads": {name: {"column": columns[name], "labels": NAMED[name]} for name in NAMED},
                },
                "model": {"base": str(tiny_base), "max_length": 32},
                "evaluation": {
                    "bootstrap": 50,
                    "behaviours": [{"name": "case", "kind": "invariance", "change": "upper_case"}],
                },
            }
        )
        ref = DatasetRef("twofold", "0123456789abcdef")
        random = np.random.default_rng(0)
        with places.publish(ref.uri) as folder:
            for split in ("train", "validation", "test"):
                table = pa.table(
                    {
                        "id": [f"{split}{i:04d}" for i in range(ROWS)],
                        "text": [
                            " ".join(random.choice(["great", "bad", "dress", "soft"], 6)) for _ in range(ROWS)
                        ],
                        "label": pa.array(random.integers(-1, 2, ROWS), pa.int32()),
                        "label:topic": pa.array(random.integers(-1, 3, ROWS), pa.int32()),
                        "shop": random.choice(["north", "south"], ROWS).tolist(),
                    }
                )
                (folder / split).mkdir()
                pq.write_table(sentiment.encode(table, settings.model), folder / split / "part-00000.parquet")
            manifest = {"labels": settings.data.class_names, "heads": NAMED}
            places.write_json(str(folder / "manifest.json"), manifest)
        model = tmp_path_factory.mktemp("model")
        info = TaskFile(
            "sentiment",
            settings.data.class_names,
            32,
            str(tiny_base),
            ref.fingerprint,
            heads={name: {"labels": labels, "temperature": 0.5} for name, labels in NAMED.items()},
        )
        sentiment.save(sentiment.build(tiny_base, settings), tiny_base, info, model)
        serving = ServingSettings(engine="torch", precision="fp32", threads=1)
        pool = Here(scoring.Scorer("sentiment", str(model), serving))
        yield settings, ref, model, info, pool


@pytest.fixture(scope="module")
def measured(made: tuple[Any, ...]) -> Any:
    settings, ref, model, _info, pool = made
    scored = scoring.score(str(model), ref, "test", settings, pool)
    shards = {split: ref.shards(split) for split in ("train", "validation", "test")}
    fitted = scoring.fit_baselines("sentiment", shards, heads.of_manifest(ref.manifest()), 1000)
    subject = Subject("twofold", "1234", "sentiment", ref.fingerprint, [])
    return scored, measure_heads(subject, NAMED, scored, fitted, settings.evaluation)


def test_each_head_is_measured_on_the_rows_that_have_its_label(made: Any, measured: Any) -> None:
    _, ref, _, _, pool = made
    scored, whole = measured
    rows = scoring.read_rows(ref.shards("test"))
    (logits,) = scoring.answer_rows(pool, [rows])
    for column, outputs, one in (
        ("label", logits[:, :2], whole),
        ("label:topic", logits[:, 2:], whole.others["topic"]),
    ):
        chosen = rows[column].to_numpy() >= 0
        assert one.predictions["id"].to_pylist() == rows["id"].filter(pa.array(chosen)).to_pylist()
        assert one.predictions["label"].to_pylist() == rows[column].to_numpy()[chosen].tolist()
        assert one.predictions["predicted"].to_pylist() == outputs[chosen].argmax(-1).tolist()
        expected = scoring.softmax(outputs[chosen].astype(np.float64) / 0.5)
        np.testing.assert_allclose(
            np.array(one.predictions["probabilities"].to_pylist()), expected, atol=1e-6
        )
        assert one.report.rows == chosen.sum() < ROWS
    assert scored.others["topic"].temperature == 0.5


def test_any_heads_metric_can_decide(measured: Any) -> None:
    _, whole = measured
    report, topic = whole.report, whole.others["topic"].report
    assert report.metrics["topic/macro_f1"] == topic.metrics["macro_f1"]
    assert report.metrics["mood/accuracy"] == report.metrics["accuracy"]
    assert report.baselines["majority"]["topic/macro_f1"] == topic.baselines["majority"]["macro_f1"]
    assert whole.of("topic/macro_f1") is whole.others["topic"]
    assert whole.of("macro_f1") is whole.of("mood/macro_f1") is whole
    assert lead(whole.of("topic/macro_f1"), whole.others["topic"], 20).macro_f1 == 0
    assert set(topic.slices) == {"shop", "length"}


def test_the_error_before_the_temperature_is_told(measured: Any) -> None:
    scored, whole = measured
    topic = whole.others["topic"].report
    assert set(topic.uncalibrated) == {"calibration_error", "log_loss", "brier"}
    assert topic.uncalibrated["log_loss"] != topic.metrics["log_loss"]
    assert (scored.uncalibrated.argmax(-1) == scored.probabilities.argmax(-1)).all()
    assert "temperature 0.50, fitted on the validation split" in render(whole.report)


def test_written_and_read_again(measured: Any, tmp_path: Path) -> None:
    _, whole = measured
    files.write(whole, tmp_path)
    again = files.read(str(tmp_path))
    assert again.report == whole.report
    assert again.others["topic"].report == whole.others["topic"].report
    assert again.others["topic"].predictions.equals(whole.others["topic"].predictions)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "<h1>topic</h1>" in page
    text = render(whole.report)
    assert "━━ mood" in text
    assert "━━ topic" in text
    assert "topic/macro" not in text  # each head has its own table
    assert [one.head for one in reports(whole.report)] == ["mood", "topic"]


def test_behaviours_ask_the_same_model(made: Any) -> None:
    settings, ref, _, info, pool = made
    cases = behaviours.prepare(settings.evaluation.behaviours, ref, info)
    (found,) = behaviours.measure(cases, pool, info)
    assert (found["name"], found["failures"]) == ("case", 0)  # the tokeniser has lower case alone
    assert found["cases"] == ROWS


def test_heads_that_only_one_side_has() -> None:
    wanted = laid_out([("mood", ["bad", "good"], 1.0), ("topic", ["fit", "size"], 1.0)])
    own = laid_out([("topic", ["size", "fit"], 1.0)])
    assert [one and one.name for _, one in scoring.matched(wanted, own)] == [None, "topic"]
    alone = laid_out([("", ["good", "bad"], 1.0)])
    assert [one and one.name for _, one in scoring.matched(wanted, alone)] == ["", None]
    assert [one and one.name for _, one in scoring.matched(alone, wanted)] == ["mood"]
    rows = pa.table({"id": ["a"], "label": [1], "label:topic": [-1]})
    unknown = scoring._head(rows, np.zeros((1, 2)), wanted[0], None, "torch", 1.0)
    assert unknown.probabilities.tolist() == [[0.5, 0.5]]
    with pytest.raises(DataError, match="no row of the split has a label of the head topic"):
        scoring._head(rows, np.zeros((1, 2)), wanted[1], own[0], "torch", 1.0)
