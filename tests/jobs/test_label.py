"""`python -m jobs.label`: from texts without labels to a source that `jobs.preprocess` reads, with people in between."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.label import label
from jobs.preprocess import preprocess
from lib.command import run
from tests.endpoints import Labeller
from tests.tiny import WORDS

pytestmark = pytest.mark.usefixtures("storage")

GOOD, BAD = ["great", "lovely", "soft"], ["awful", "torn", "poor"]
RULES = [
    {"name": "praise", "label": "good", "keywords": GOOD, "accuracy": 0.9},
    {"name": "blame", "label": "bad", "keywords": BAD, "accuracy": 0.9},
    {"name": "money", "label": "bad", "pattern": r"(?i)\brefund(ed)?\b", "accuracy": 0.7},
]


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Texts that praise, that blame, that do both, and that do neither, with an address in every tenth."""
    rng = random.Random(0)
    found = []
    for i in range(count):
        words = [f"The dress number {i} is"]
        words += [rng.choice(GOOD)] if i % 4 in (0, 2) else []
        words += [rng.choice(BAD)] if i % 4 in (1, 2) else []
        text = " ".join(words) + (f", write to person{i}@example.com" if i % 10 == 0 else "")
        found.append({"text": text, "shop": "one" if i % 3 else "two"})
    return found


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(value) for value in values))
    return str(path)


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    values: dict[str, Any] = {
        "name": "shop",
        "task": "sentiment",
        "data": {"source": str(tmp_path / "source.jsonl"), "labels": ["bad", "good"], "slices": {"shop": "shop"}},
        "model": {"base": str(tiny_base), "max_length": 32},
        "label": {"rules": RULES, "tasks": 10, "rows_per_shard": 17},
    }  # fmt: skip
    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def done(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, Path]:
    """What a run prints, and the folder that it has published."""
    code = run(label, ["--config", str(config), *words])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out, Path(re.findall(r"written to   (\S+)", said.out)[0])


def failed(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(label, ["--config", str(config), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    folder = Path(os.environ["WHORL_STORAGE"]) / "labelled" / "shop"
    assert not folder.exists() or not any(folder.iterdir())
    return error


def labelled(folder: Path) -> list[dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted((folder / "rows").glob("*.parquet"))]
    return pa.concat_tables(parts).to_pylist() if parts else []


def tasks_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "tasks.json"
    return json.loads(path.read_text()) if path.exists() else []


def annotated(task: dict[str, Any], number: int, **said: str) -> dict[str, Any]:
    """A task as Label Studio exports it once people, `p1` and so on, have chosen."""
    annotations = [
        {
            "id": number * 10 + place,
            "completed_by": int(who[1:]),
            "was_cancelled": False,
            "result": [
                {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": [chosen]}}
            ],
        }
        for place, (who, chosen) in enumerate(said.items())
    ]
    return {"id": number, **task, "annotations": annotations}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rules_label_and_people_are_asked_about_the_rest(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "source.jsonl", [*rows(), {"text": "", "shop": "one"}, {"text": None, "shop": None}])
    said, folder = done(config, capsys)
    found = labelled(folder)
    assert Counter((row["label"], row["labelled_by"], row["confidence"]) for row in found) == {
        ("good", "rules", 0.9): 15,
        ("bad", "rules", 0.9): 15,
    }
    assert {row["shop"] for row in found} == {"one", "two"}
    assert sum("<EMAIL_1>" in row["text"] for row in found) == 3
    assert not any("example.com" in row["text"] for row in found)
    assert "rows read    62; 30 labelled, 2 empty; for people: 15 not sure, 15 nothing known" in said
    assert re.search(r"praise +good +48.4% +24.2% +24.2% +0.90 +-", said)

    tasks = tasks_of(folder)
    assert len(tasks) == 10
    # The least sure first: what nothing is known of, by its id.
    assert {task["data"]["why"] for task in tasks} == {"nothing known"}
    assert [task["data"]["row_id"] for task in tasks] == sorted(task["data"]["row_id"] for task in tasks)
    assert not any("predictions" in task or "example.com" in task["data"]["text"] for task in tasks)
    more, whole = done(config, capsys, "--label.tasks", "100")
    assert "30 tasks" in more
    predicted = [task for task in tasks_of(whole) if "predictions" in task]
    assert len(predicted) == 15
    assert {task["predictions"][0]["score"] for task in predicted} == {0.5}
    assert tasks_of(whole)[:10] == tasks
    assert 'choice="single"' in (folder / "labelling.xml").read_text()

    report = json.loads((folder / "report.json").read_text())
    assert report["heads"]["label"]["by"] == {"rules": 30}
    assert report["labelled"] == 30
    again, same = done(config, capsys)
    assert "skipped" in again
    assert same == folder
    # What preprocess is told to read is read.
    words = shlex.split(said.split("--config … ")[1].splitlines()[0])
    assert run(preprocess, ["--config", str(config), *words]) == 0
    assert "rows read    30; dropped" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_labels_do_not_depend_on_blocks(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "source.jsonl", [*rows(), *rows(9)])
    words = ["--label.accuracies", "agreement", "--label.sample", "50", "--label.threshold", "0.6"]
    first, second = (
        done(config, capsys, *words, "--label.rows_per_shard", size)[1] for size in ("7", "5000")
    )
    assert first != second
    assert labelled(first) == labelled(second)
    assert tasks_of(first) == tasks_of(second)
    # Two rows of one text are one task.
    ids = [task["data"]["row_id"] for task in tasks_of(first)]
    assert len(ids) == len(set(ids)) == 10
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for name in ("rows", "labelled", "unsure", "heads"):
        assert reports[0][name] == reports[1][name]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_people_say_goes_before_rules_and_the_source(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [{**row, "label": "good" if i < 8 else None} for i, row in enumerate(rows())]
    write(tmp_path / "source.jsonl", source)
    said, folder = done(config, capsys, "--label.tasks", "100")
    assert "by rules 26, source 8" in said
    # Of the eight rows with a label, four have a rule that is right half of the time.
    assert "of 8 rows with a label the machine would label 4, 2 of them right" in said
    tasks = tasks_of(folder)
    assert len(tasks) == 26
    sure = {"data": {"text": source[0]["text"].replace("person0@example.com", "<EMAIL_1>")}}
    exported = [
        annotated(tasks[0], 1, p1="good", p2="good", p3="bad"),
        annotated(tasks[1], 2, p1="bad", p2="bad"),
        annotated(tasks[2], 3, p1="bad", p2="good"),
        annotated(sure, 4, p1="bad"),
        annotated({"data": {"text": "elsewhere", "row_id": "f" * 16}}, 5, p1="bad"),
    ]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    words = ["--label.tasks", "100", "--label.annotations", str(tmp_path / "export.json")]
    said, after = done(config, capsys, *words)
    assert after != folder
    texts = {row["text"]: row for row in labelled(after)}
    decided = [texts[task["data"]["text"]] for task in (*tasks[:2], sure)]
    assert [(row["label"], row["confidence"], row["labelled_by"]) for row in decided] == [
        ("good", 0.6667, "people"),
        ("bad", 1.0, "people"),
        ("bad", 1.0, "people"),
    ]
    left = tasks_of(after)
    assert len(left) == 24
    assert left[0]["data"] == {**tasks[2]["data"], "why": "people disagree"}
    assert "people       label: 5 rows by 3 annotators, 3 by several; kappa" in said
    assert "1 of the annotated rows are not in the source" in said
    report = json.loads((after / "report.json").read_text())["people"]
    assert report["agreement"]["label"]["alpha"] is not None
    assert report["not_in_the_source"] == 1


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_each_head_is_labelled_by_itself(
    config: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(config.read_text())
    values["data"] |= {
        "heads": {
            "mood": {"column": "mood", "labels": {"-": "bad", "+": "good"}},
            "topic": {"column": "subject", "labels": ["size", "price"]},
        }
    }
    del values["data"]["labels"]
    values["label"]["rules"] = [
        {"name": "praise", "label": "mood/good", "keywords": GOOD},
        {"name": "size", "label": "topic/size", "keywords": ["small", "large"]},
        {"name": "price", "label": "topic/price", "pattern": r"\$\d"},
    ]
    config.write_text(yaml.safe_dump(values))
    words = ["great", "great, but small", "small", "costs $4", "unknown", "$3 and large"]
    write(
        tmp_path / "source.jsonl",
        [{"text": t, "shop": "x", "mood": "-" if "$4" in t else None} for t in words],
    )
    said, folder = done(config, capsys)
    found = {row["text"]: (row["mood"], row["topic"]) for row in labelled(folder)}
    assert found == {
        "great": ("good", None),
        "great, but small": ("good", "size"),
        "small": (None, "size"),
        "costs $4": ("bad", "price"),
    }
    gold = next(row for row in labelled(folder) if row["mood"] == "bad")
    assert (gold["mood_labelled_by"], gold["topic_labelled_by"]) == ("source", "rules")
    assert {task["data"]["text"] for task in tasks_of(folder)} == {
        "great",
        "small",
        "unknown",
        "$3 and large",
    }
    words = shlex.split(said.split("--config … ")[1].splitlines()[0])
    assert (
        run(
            preprocess,
            ["--config", str(config), *words, "--data.split", "{train: 1, validation: 0, test: 0}"],
        )
        == 0
    )
    assert "rows read    4; dropped: none" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rows_of_a_database_and_of_templates_are_labelled_beside_a_test_source_of_its_own(
    config: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = sqlite3.connect(tmp_path / "mail.db")
    database.execute("CREATE TABLE mail (title TEXT, body TEXT, sender TEXT, shop TEXT)")
    mails = [
        (f"Number {i}", row["text"], f"user{i % 7}@example.com", row["shop"]) for i, row in enumerate(rows())
    ]
    database.executemany("INSERT INTO mail VALUES (?, ?, ?, ?)", mails)
    database.commit()
    (tmp_path / "test.csv").write_text(
        "said,stars,shop\n" + "".join(f"test {w},{1 + i % 2},x\n" for i, w in enumerate(WORDS))
    )
    values = yaml.safe_load(config.read_text())
    values["data"] |= {
        "source": f"sqlite:///{tmp_path / 'mail.db'}",
        "query": "SELECT * FROM mail ORDER BY rowid",
        "templates": {"whole": "{title}: {body}"},
        "columns": {"text": "whole"},
        "split": {"train": 0.5, "validation": 0.5, "test": 0},
        "test_source": {
            "uri": str(tmp_path / "test.csv"),
            "columns": {"text": "said", "label": "stars"},
            "labels": {"1": "bad", "2": "good"},
        },
    }
    config.write_text(yaml.safe_dump(values))
    said, folder = done(config, capsys)
    found = labelled(folder)
    assert len(found) == 30
    assert all(re.match(r"Number \d+: The dress", row["text"]) for row in found)
    assert not any(
        "example.com" in path.read_text("latin-1") for path in storage.rglob("*") if path.is_file()
    )
    words = shlex.split(said.split("--config … ")[1].splitlines()[0])
    assert run(preprocess, ["--config", str(config), *words]) == 0, capsys.readouterr().err
    assert "rows read    50; dropped: none" in capsys.readouterr().out
    # Whose a mail is decides its split afterwards, too, and nobody reads it.
    owned = ["--data.split.group", "sender", "--data.test_source", "null"]
    said, folder = done(config, capsys, *owned)
    senders = {row["sender"] for row in labelled(folder)}
    assert len(senders) == 7
    assert all(re.fullmatch("[0-9a-f]{16}", sender) for sender in senders)
    words = shlex.split(said.split("--config … ")[1].splitlines()[0])
    assert run(preprocess, ["--config", str(config), *owned, *words]) == 0, capsys.readouterr().err


MOODS = {
    "anger": ["I want my money back, this is a scandal", "How dare you, nobody answers and I am furious",
              "Your service is a disgrace and I will complain"],
    "thanks": ["Thank you so much, you were very kind", "I am grateful for your quick help",
               "Many thanks to your friendly team"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_encoder_labels_by_descriptions_and_rules_may_disagree(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [
        {"text": text, "shop": "x", "label": None, "mood": mood}
        for mood, texts in MOODS.items()
        for text in texts
    ]
    source.append(
        {
            "text": "Thank you for nothing, I am grateful that this disgrace is over",
            "shop": "x",
            "label": None,
        }
    )
    write(tmp_path / "source.jsonl", source)
    values = yaml.safe_load(config.read_text())
    values["data"]["labels"] = ["anger", "thanks"]
    values["label"] = {
        "embedding": {"model": "sample://minilm-l6"},
        "descriptions": {"anger": "an angry complaint", "thanks": ["a customer says thank you", "gratitude"]},
        "rules": [{"name": "disgrace", "label": "anger", "keywords": ["disgrace"], "accuracy": 0.9}],
        "threshold": 0.5,
    }
    config.write_text(yaml.safe_dump(values))
    _, folder = done(config, capsys)
    found = {row["text"]: row for row in labelled(folder)}
    truth = {text: mood for mood, texts in MOODS.items() for text in texts}
    assert {text: row["label"] for text, row in found.items()} == truth
    assert found[MOODS["anger"][2]]["labelled_by"] == "rules+embedding"
    (task,) = tasks_of(folder)
    assert task["data"]["why"] == "disagreement"
    assert task["data"]["text"].startswith("Thank you for nothing")
    sure = [row["confidence"] for row in found.values() if row["labelled_by"] == "embedding"]
    assert max(sure) < 0.999
    # With rows that have a label, how sure it may be is measured.
    many = [{"text": f"{text} {i}", "shop": "x", "label": truth[text]} for text in truth for i in range(6)]
    write(tmp_path / "source.jsonl", [*source, *many])
    said, folder = done(config, capsys)
    temperature = json.loads((folder / "report.json").read_text())["heads"]["label"]["temperatures"][
        "embedding"
    ]
    assert 0.25 <= temperature < 1
    assert re.search(r"of 36 rows with a label the machine would label 3\d, 3\d of them right", said)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_chat_model_is_asked_about_each_text(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "source.jsonl", rows(20))
    values = yaml.safe_load(config.read_text())
    monkeypatch.setenv("WHORL_CHAT_KEY", "sesame")
    with Labeller("sesame", {"B": GOOD, "A": BAD}).up() as server:
        values["label"] = {
            "chat": {"url": server.url, "model": "clerk"},
            "descriptions": {"bad": "it is no good"},
        }
        config.write_text(yaml.safe_dump(values))
        said, folder = done(config, capsys)
        found = labelled(folder)
        # The server tells the likelier letter with 0.9; of both kinds of words with 0.5, and nothing of neither.
        assert Counter((row["label"], row["confidence"], row["labelled_by"]) for row in found) == {
            ("good", 0.9, "chat"): 5,
            ("bad", 0.9, "chat"): 5,
        }
        assert {task["data"]["why"] for task in tasks_of(folder)} == {"not sure", "nothing known"}
        assert server.seen[0]["messages"][0]["content"].endswith("word ready.")
        del server.seen[0]
        assert len(server.seen) == 20
        assert all("A. bad: it is no good\nB. good" in body["messages"][0]["content"] for body in server.seen)
        assert not any("example.com" in body["messages"][1]["content"] for body in server.seen)
        server.tells_logprobs = False
        _, other = done(config, capsys, "--label.chat.logprobs", "false")
        assert {(row["label"], row["confidence"]) for row in labelled(other)} == {
            ("good", 0.95),
            ("bad", 0.95),
        }
        assert "sesame" not in said + (folder / "report.json").read_text()
        # One that fails on the way is told in a line too, and leaves nothing.
        server.fails_after = len(server.seen) + 5
        server.tells_logprobs = True
        before = set(folder.parent.iterdir())
        assert run(label, ["--config", str(config), "--label.tasks", "3"]) == 2
        told = capsys.readouterr().err
        assert re.fullmatch(
            r"error: label\.chat: http\S+ does not answer as 'clerk' \(status 404\); .*\n", told
        )
        assert set(folder.parent.iterdir()) == before
        monkeypatch.setenv("WHORL_CHAT_KEY", "wrong")
        assert run(label, ["--config", str(config), "--label.tasks", "4"]) == 2
        told = capsys.readouterr().err
        assert "(status 401); check url, model and the key in WHORL_CHAT_KEY" in told
        assert "wrong" not in told


def test_mistakes_that_need_no_reading(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.label.connect", lambda: pytest.fail("Ray was started"))
    write(tmp_path / "source.jsonl", rows(3))
    rule = {"name": "x", "label": "good", "pattern": "(a"}
    for words, told in (
        (["--label.rules", json.dumps([rule])], "label.rules: the pattern of 'x' is no regular expression of RE2 ("),
        (["--label.rules", json.dumps([{**rule, "label": "god"}])], "votes for 'god', which is no label; did you mean 'good'?"),
        (["--label.rules", json.dumps([rule, rule])], "label: rules: 'x' is there twice"),
        (["--label.rules", json.dumps([{"name": "x", "label": "good"}])], "rule 'x' needs keywords or a pattern, one of both"),
        (["--label.descriptions", "{goood: x}"], "label.descriptions: no label 'goood'; did you mean 'good'?"),
        (["--label.annotations", str(tmp_path / "no.json")], "label.annotations: no JSON file at"),
        (["--label.chat", "{url: 'http://127.0.0.1:1/v1', model: m}"], "label.chat: the environment variable WHORL_CHAT_KEY is empty"),
        (["--label.embedding.model", "sample://minlm"], "no sample model 'sample://minlm'; did you mean"),
        (["--data.columns.text", "texts"], "has no column 'texts' (data.columns.text); did you mean 'text'?"),
        (["--data.slices", "{confidence: shop}"], "data.slices.confidence: 'confidence' is the name of a column of labelled rows"),
        (["--task", "chat", "--data.labels", "null", "--label", "{}"], "jobs.label labels texts for the task sentiment, not for chat"),
    ):  # fmt: skip
        assert told in failed(config, capsys, *words), told


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_mistakes_that_reading_shows(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.jsonl"
    write(source, [{**row, "label": "n/a" if i == 20 else None} for i, row in enumerate(rows())])
    told = failed(config, capsys)
    assert f"data.labels: 1 rows hold a label outside the mapping ('n/a'); first: {source} row 21" in told
    source.write_text("\n".join([*(json.dumps(row) for row in rows(40)), "{broken"]))
    assert f"{source} line 41 is not valid JSON" in failed(config, capsys)
    write(source, [{"text": " ", "shop": "x"}])
    assert "holds no text: 1 rows, all of them empty" in failed(config, capsys)
    write(source, rows(5))
    (tmp_path / "e.json").write_text(json.dumps([annotated({"data": {"text": "x"}}, 31, p1="goood")]))
    told = failed(config, capsys, "--label.annotations", str(tmp_path / "e.json"))
    assert "e.json task 31: no label 'goood' of 'label'; did you mean 'good'?" in told
