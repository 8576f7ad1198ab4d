"""A stored history is put through the detector; mistakes in it are one line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.monitor import monitor, read, score
from lib.errors import ConfigError, DataError, RegistryError
from lib.opinions import store
from lib.settings import Settings
from tests.opinions.test_watch import RULES, history
from tests.serve.conftest import publish_version

DOCUMENTS = history(6, (80,))


def use(source: Path | None = None, **rules: Any) -> Settings:
    monitoring = RULES.model_dump(mode="json") | {"replay": {"source": source and str(source)} | rules}
    data = {"source": "nowhere.csv", "labels": ["negative", "positive"]}
    model = {"base": "nowhere"}
    return Settings.model_validate(
        {"name": "shop", "task": "sentiment", "data": data, "model": model, "monitoring": monitoring}
    )


def written(path: Path, **changes: Any) -> Path:
    """The history as JSON Lines; `changes` are made in its third row."""
    rows = []
    for o in DOCUMENTS:
        when = datetime.fromtimestamp(o.time, UTC).isoformat()
        row = {
            "time": when,
            "source": o.source,
            "entity": o.entity,
            "topic": o.topic,
            "label": o.label,
            "id": o.id,
        }
        rows.append(row)
    rows[2] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_and_the_database_give_the_same_alerts(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor(use(written(tmp_path / "history.jsonl")))
    said = capsys.readouterr().out
    assert "1,440 documents, 1 topics and entities" in said
    assert "12 of 20" in said
    assert "acme / cars" in said
    assert "1 alerts, 1.40 a week" in said
    store.add("shop", DOCUMENTS, "negative")
    monitor(use())
    kept = capsys.readouterr().out
    assert kept.partition(" s\n")[2] == said.partition(" s\n")[2]


def test_planted_surges_are_a_table(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant = {"surges": 2, "size": 0.7, "hours": 6}
    monitor(use(written(tmp_path / "history.jsonl"), plant=plant))
    said = capsys.readouterr().out.splitlines()
    assert said[-5].split() == ["found", "median", "delay", "false", "alarms", "a", "week"]
    # What is in the history is a false alarm here.
    assert said[-4].split()[:3] == ["z", "and", "CUSUM"]
    assert "2 of 2" in said[-4]
    assert said[-4].endswith("1.40")
    assert said[-1].startswith("share above 0.")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"time": "yesterday"},
            "history.jsonl row 3: 'yesterday' is no time; write it as 2026-03-01T09:00:00Z",
        ),
        ({"time": "2026-03-01T09:00:00"}, "row 3: '2026-03-01T09:00:00' has no offset from UTC"),
        ({"time": -5}, "row 3: '-5' is no number of seconds or milliseconds since 1970"),
        ({"time": None}, "row 3: None is no time"),
        ({"entity": " "}, "row 3: entity is empty"),
        ({"source": "x" * 201}, "row 3: source is longer than 200 characters"),
        ({"label": ""}, "row 3: neither text nor label"),
        ({"score": 3}, "row 3: score '3' is no probability from 0 to 1"),
    ],
)
def test_a_row_that_cannot_be_is_one_line(storage: Path, tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        monitor(use(written(tmp_path / "history.jsonl", **changes)))
    assert says in str(caught.value)


def test_a_history_that_cannot_be_is_one_line(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no opinions on shop; they come by POST /v1/opinions"):
        monitor(use())
    with pytest.raises(ConfigError, match=r"monitoring\.replay\.source: .*nothing.jsonl does not exist"):
        monitor(use(tmp_path / "nothing.jsonl"))
    source = tmp_path / "a.csv"
    source.write_text("time,source,entity\n0,a,b\n")
    with pytest.raises(DataError, match=r"has no column 'label' \(monitoring.replay.columns.label"):
        monitor(use(source))
    source.write_text("time,source,entity,label\n0,a,b,bad\n")
    with pytest.raises(DataError, match="no document has the label 'negative'"):
        monitor(use(source))
    source.write_text("time,source,entity,text\n0,a,b,bad\n")
    with pytest.raises(RegistryError, match="shop"):
        monitor(use(source))
    with pytest.raises(ConfigError, match="monitoring is missing"):
        monitor(use().model_copy(update={"monitoring": None}))


def test_documents_without_a_label_are_put_to_the_model(
    storage: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.artifacts import ModelRef
    from lib.storage import local_copy
    from lib.tasks import sentiment

    publish_version(tiny_base, 1)
    texts = ["great fabric", "awful", "the dress is okay", "size was bad", "poor fit", "love the color"] * 8
    source = tmp_path / "texts.csv"
    rows = [f"{number * 60},web,acme,{text}" for number, text in enumerate(texts)]
    source.write_text("\n".join(["time,source,entity,text", *rows]) + "\n")
    settings = use(source)
    settings = settings.model_copy(
        update={"serving": settings.serving.model_copy(update={"model": "reviews@1"})}
    )
    with local_copy(ModelRef("reviews", 1).uri) as folder:
        predictor = sentiment.load(folder, settings.serving)
        expected = sentiment.predict(predictor, sentiment.Request(inputs=texts)).results
    assert settings.monitoring is not None
    opinions = score(read(settings, settings.monitoring), settings, settings.monitoring)
    assert [o.label for o in opinions] == [answer.label for answer in expected]
    assert [o.score for o in opinions] == pytest.approx([answer.scores["negative"] for answer in expected])
    assert {o.topic for o in opinions} == {""}
    assert "48 documents have no label; reviews@1 is asked" in capsys.readouterr().out
