"""Events and feedback become a source that `jobs.preprocess` reads."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.curate import curate
from jobs.preprocess import preprocess
from lib import events
from lib.data.plan import plan
from lib.errors import ConfigError, DataError
from lib.events import Feedback
from lib.settings import Settings

LABELS = ["negative", "positive"]


def use(base: Path | str, task: str = "sentiment", **sections: Any) -> Settings:
    data = {"source": "nowhere.csv"} | ({"labels": LABELS} if task in ("sentiment", "tagging") else {})
    values = {"name": "shop", "task": task, "data": data, "model": {"base": str(base), "max_length": 32}}
    return Settings.model_validate(values | sections)


def happened(
    number: int, request: Any, answer: Any, application: str = "shop", ago: float = 0.0, **said: Any
) -> None:
    name = f"r{number}"
    values = {
        "id": name, "application": application, "model": f"{application}@1", "time": time.time() - ago + number / 1000,
        "route": "/v1", "status": 200, "milliseconds": 1.0, "tokens": 3, "key": None,
        "request": json.dumps(request), "answer": json.dumps(answer),
    }  # fmt: skip
    events.write([values])
    if said:
        events.say(Feedback(name, **said), application)


def labelled(*labels: str) -> dict[str, Any]:
    return {"results": [{"label": label} for label in labels]}


def curated(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[dict[str, Any]]]:
    said = capsys.readouterr().out
    path = said.split("written to   ")[1].split()[0]
    return path, [json.loads(line) for line in Path(path.removeprefix("file://")).read_text().splitlines()]


@pytest.mark.ray
def test_labels_and_confirmed_answers_are_a_source_that_is_read(
    storage: Path, tiny_base: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        label = LABELS[number % 2]
        happened(number, {"inputs": [f"the dress {number}"]}, labelled(label), rating=1)
    happened(40, {"inputs": ["was awful"]}, labelled("positive"), rating=-1, label="negative")
    happened(41, {"inputs": ["nothing said"]}, labelled("positive"))
    happened(42, {"inputs": ["only bad"]}, labelled("positive"), rating=-1)
    happened(43, {"inputs": ["one", "two"]}, labelled("positive", "negative"), label="negative")
    happened(44, None, None, label="negative")
    happened(45, {"inputs": ["elsewhere"]}, labelled("positive"), application="other", rating=1)
    curate(use(tiny_base))
    path, rows = curated(capsys)
    assert len(rows) == 41
    assert rows[0] == {"text": "the dress 0", "label": "negative"}
    assert rows[-1] == {"text": "was awful", "label": "negative"}
    curate(use(tiny_base))
    assert curated(capsys)[0] == path, "the same rows are the same file"

    read = use(tiny_base, data={"source": path, "labels": LABELS})
    preprocess(read)
    splits = plan(read).ref.manifest()["splits"]
    assert sum(split["rows"] for split in splits.values()) == 41


def test_old_events_are_left_out(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    happened(1, {"inputs": ["old"]}, labelled("positive"), ago=10 * 86_400, rating=1)
    happened(2, {"inputs": ["new"]}, labelled("positive"), rating=1)
    curate(use("nowhere", curation={"days": 7}))
    assert [row["text"] for row in curated(capsys)[1]] == ["new"]


QUESTION = [{"role": "user", "content": "is it soft?"}]


def said(content: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}


def test_a_dialogue_gets_the_answer_that_it_should_have_had(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    happened(1, {"messages": QUESTION, "model": "shop"}, said("no"), correction="yes")
    happened(2, {"messages": QUESTION}, said("very"), rating=1)
    happened(3, {"messages": QUESTION}, said("hm"), rating=-1)
    happened(4, {"prompt": "it is"}, {"choices": [{"index": 0, "text": " soft"}]}, rating=0.5)
    curate(use("nowhere", "chat"))
    rows = curated(capsys)[1]
    assert [row["messages"][-1]["content"] for row in rows] == ["yes", "very", " soft"]
    assert rows[0]["messages"][:-1] == QUESTION
    assert rows[2]["messages"][0] == {"role": "user", "content": "it is"}


def test_pairs_are_made_of_a_chat_applications_events(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    happened(1, {"messages": QUESTION}, said("no"), "support", preferred="yes")
    happened(2, {"messages": QUESTION}, said("yes"), "support", preferred="yes")
    happened(3, {"messages": QUESTION}, said("fine"), "support", rating=1)
    curate(use("nowhere", "preference", curation={"application": "support"}))
    assert curated(capsys)[1] == [{"prompt": QUESTION, "chosen": "yes", "rejected": "no"}]


def test_what_teaches_nothing_is_one_line(storage: Path) -> None:
    with pytest.raises(
        DataError, match="no feedback on shop teaches anything; it comes by POST /v1/feedback"
    ):
        curate(use("nowhere"))
    with pytest.raises(
        ConfigError, match=r"task tagging learns nothing from feedback \(those that do: chat, "
    ):
        curate(use("nowhere", "tagging"))


def test_what_users_did_is_one_more_file_of_the_source(
    database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lib.recommender import store
    from lib.recommender.store import Interaction

    data = {
        "source": "nowhere.csv",
        "columns": {"user": "who", "item": "sku", "time": "at", "value": "stars", "event": "did"},
        "items": {"source": "nowhere.csv"},
        "interactions": {"least_value": 4},
    }
    settings = use("nowhere", "recommend", data=data)
    with pytest.raises(DataError, match=r"nobody did anything that shop was told; .* POST /v1/interactions"):
        curate(settings)
    now = int(time.time())
    store.add("shop", [Interaction("u", "b", "buy", now), Interaction("u", "a", "view", now - 90_000)])
    store.add("other", [Interaction("u", "z", "buy", now)])
    curate(settings)
    path, rows = curated(capsys)
    assert rows == [
        {"who": "u", "sku": "a", "at": now - 90_000, "did": "view", "stars": 4.0},
        {"who": "u", "sku": "b", "at": now, "did": "buy", "stars": 4.0},
    ]
    curate(use("nowhere", "recommend", data=data, curation={"days": 1}))
    again, latest = curated(capsys)
    assert latest == rows[1:]
    assert again != path
