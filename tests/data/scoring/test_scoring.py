"""What is asked of a row, what a shard of scores holds, and every mistake's one line; no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import dialogues
from lib import storage as places
from lib.artifacts import TaskFile
from lib.data import blocks
from lib.data.scoring import build as scoring
from lib.data.scoring import vllm
from lib.data.scoring.plan import Planned
from lib.data.scoring.plan import plan as plan_of
from lib.data.stream import redact_block
from lib.errors import ConfigError, DataError
from lib.settings import Settings
from lib.tasks import load_task, scores_files

TASK_DATA: dict[str, dict[str, Any]] = {
    "sentiment": {"heads": {"mood": {"column": "m", "labels": ["bad", "good"]}, "topic": {"column": "t", "labels": ["size", "colour"]}}},
    "tagging": {"labels": ["PER"]},
    "chat": {},
    "preference": {},
}  # fmt: skip


def use(task: str, source: Path | str | None, base: Path | str = "nowhere", **score: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "shop",
            "task": task,
            "data": {"source": "nowhere.csv", **TASK_DATA[task]},
            "model": {"base": str(base), "max_length": 48},
            "serving": {"engine": "torch", "precision": "fp32", "threads": 1},
            "score": {"source": str(source) if source else None, **score},
        }
    )


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def planned(task: str, source: Path, **score: Any) -> Planned:
    return plan_of(use(task, source, **score), "shop@1", "digest")


@contextmanager
def opened(folder: Path) -> Iterator[Path]:
    yield folder


def packed(plan: Planned) -> Iterator[pa.Table]:
    """The blocks that a scorer gets."""
    for block in blocks.read_blocks(plan.reading, 0, (0, len(plan.reading.files))):
        row = blocks.to_row(block)
        yield redact_block(row, list(plan.reading.columns), plan.texts, plan.rules) if plan.rules else row


def shards(settings: Settings, base: Path, out: Path) -> tuple[list[dict[str, Any]], pa.Table]:
    """Counts of each block and the rows of all shards, by a fresh model of the tiny base."""
    task = load_task(settings.task)
    names = task.classes(settings.data)
    heads = {
        name: {"labels": head.label_names, "temperature": 1.0} for name, head in settings.data.heads.items()
    }
    folder = out / "model"
    folder.mkdir()
    info = TaskFile(settings.task, names, 48, str(base), "0123456789abcdef", heads=heads)
    task.save(task.build(base, settings), base, info, folder)
    plan = plan_of(settings, "shop@1", "digest")
    scorer = scoring.Scorer(plan, lambda: opened(folder), places.uri(out / "scores"))
    counts = [json.loads(scorer(row)["counts"][0].as_py()) for row in packed(plan)]
    tables = [pq.read_table(out / "scores" / count["shard"]) for count in counts]
    return counts, pa.concat_tables(tables)


def test_every_head_of_a_row_is_scored_and_bad_rows_say_why(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": text, "order": i} for i, text in enumerate(["great dress", " ", "awful", None, "bad fit"])
    ]
    settings = use(
        "sentiment", write(tmp_path / "a.jsonl", *rows), tiny_base, keep={"order": "order"}, rows_per_shard=3
    )
    counts, table = shards(settings, tiny_base, tmp_path)
    assert [(c["rows"], c["bad_rows"]) for c in counts] == [(3, 1), (2, 1)]
    assert table["row"].to_pylist() == [1, 2, 3, 4, 5]
    assert table["order"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert table["problem"].to_pylist() == [None, "has no text", None, "has no text", None]
    assert [label is None for label in table["label"].to_pylist()] == [False, True, False, True, False]
    for behind, labels in (("", {"bad", "good"}), (":topic", {"size", "colour"})):
        for row in (0, 2, 4):
            scores = table[f"scores{behind}"][row].as_py()
            assert scores.keys() == labels
            assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
            label = table[f"label{behind}"][row].as_py()
            assert label == max(scores, key=scores.get)
            assert table[f"score{behind}"][row].as_py() == scores[label]
    assert {name for c in counts for name in c["tallies"]} == {"label", "label:topic"}
    assert sum(n for c in counts for n in c["tallies"]["label"].values()) == 3


def test_a_shard_of_bad_rows_alone_has_the_same_columns(tiny_base: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "fits"}, {"text": ""})
    counts, table = shards(use("sentiment", source, tiny_base, rows_per_shard=1), tiny_base, tmp_path)
    assert [c["bad_rows"] for c in counts] == [0, 1]
    assert table["label"].null_count == 1


@pytest.mark.parametrize("column", ["tokens", "text"])
def test_words_and_texts_are_tagged(tiny_base: Path, tmp_path: Path, column: str) -> None:
    given: list[Any] = (
        [["the", "dress"], [], ["good", ""]] if column == "tokens" else ["the dress", "", "good !"]
    )
    source = write(tmp_path / "a.jsonl", *({column: value} for value in given))
    (count,), table = shards(use("tagging", source, tiny_base), tiny_base, tmp_path)
    assert count["bad_rows"] == 1
    assert [found is None for found in table["entities"].to_pylist()] == [False, True, False]
    assert table[column].to_pylist() == given
    entities = [entity for found in table["entities"].to_pylist() for entity in found or []]
    assert sum(count["tallies"]["entities"].values()) == len(entities)


def test_dialogues_are_answered_and_too_long_ones_refused(tiny_chat_base: Path, tmp_path: Path) -> None:
    turn = {"role": "user", "content": "is it soft?"}
    answered = [turn, {"role": "assistant", "content": "yes"}]
    rows: list[Any] = [
        [turn],
        answered,
        [{"role": "user", "content": "fit " * 300}],
        [answered[1]],
        "no list",
    ]
    source = write(tmp_path / "a.jsonl", *({"messages": row} for row in rows))
    (count,), table = shards(use("chat", source, tiny_chat_base, max_tokens=5), tiny_chat_base, tmp_path)
    assert count["bad_rows"] == 3
    problems = table["problem"].to_pylist()
    assert problems[:2] == [None, None]
    assert "shorten them" in problems[2]
    assert "asks nothing" in problems[3]
    assert "holds no list of turns" in problems[4]
    first, second = table.slice(0, 2).to_pylist()
    assert first["messages"] == second["messages"] == [turn], "the answer that is there is not read"
    assert first["answer"] == second["answer"]
    assert 0 < first["completion_tokens"] <= 5
    assert count["tallies"]["tokens"]["completion"] == 2 * first["completion_tokens"]


def test_rows_on_their_way_to_vllm_and_back_are_in_their_places(
    storage: Path, tiny_chat_base: Path, tmp_path: Path
) -> None:
    """What happens before and after the engine, which answers here with what it was asked."""
    rows = [{"question": text, "id": i} for i, text in enumerate(["soft?", "", "fit " * 300, "bad fit?"])]
    source = write(tmp_path / "a.jsonl", *rows)
    plan = planned("chat", source, keep={"number": "id"}, engine="vllm")
    assert plan.engine == "vllm"
    (block,) = blocks.read_blocks(plan.reading, 0, (0, 1))
    asked = vllm.ask_block(blocks.to_row(block), plan, str(tiny_chat_base), 256)
    good, bad = vllm.only(asked, good=True), vllm.only(asked, good=False)
    assert [len(good), len(bad)] == [2, 2]
    ends = vllm.ends_of(tiny_chat_base)
    said = [
        vllm.answer_of(
            {**row, "generated_tokens": [*row["tokens"][:3], 2], "generated_text": " yes\n"}
            | {"num_input_tokens": len(row["tokens"])},
            ends,
        )
        for row in good.to_pylist()
    ]
    together = pa.concat_tables([bad, pa.Table.from_pylist(said, bad.schema)])
    counts = json.loads(vllm.write_group(together, plan, places.uri(tmp_path / "out"))["counts"][0].as_py())
    assert (counts["rows"], counts["bad_rows"], counts["files"]) == (4, 2, {"0": 4})
    assert counts["tallies"]["finish_reason"] == {"stop": 2}
    table = pq.read_table(tmp_path / "out" / counts["shard"]).to_pylist()
    assert [(row["row"], row["number"], row["answer"]) for row in table] == [
        (1, "0", "yes"),
        (2, "1", None),
        (3, "2", None),
        (4, "3", "yes"),
    ]
    assert "asks nothing" in table[1]["problem"]
    assert "shorten them" in table[2]["problem"]
    assert table[3]["messages"] == [{"role": "user", "content": "bad fit?"}]
    assert table[3]["completion_tokens"] == 4


def test_the_model_is_asked_what_has_no_personal_data(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "great dress", "who": "ada@example.com"},
        {"text": "bad fit, ask ada@example.com or ada (at) example.com", "who": "1"},
        {"text": "bad fit, ask <EMAIL_1> or <EMAIL_1>", "who": "2"},
    ]
    settings = use(
        "sentiment", write(tmp_path / "a.jsonl", *rows), tiny_base, redact=True, keep={"who": "who"}
    )
    (count,), table = shards(settings, tiny_base, tmp_path)
    assert table["text"].to_pylist() == ["great dress", *["bad fit, ask <EMAIL_1> or <EMAIL_1>"] * 2]
    assert table["who"].to_pylist() == ["ada@example.com", "1", "2"], "what is kept is as it was"
    assert count["redacted"] == {"EMAIL": 1, "rows": 1}
    _, first, second = table["scores:topic"].to_pylist()
    assert first == pytest.approx(second, abs=1e-5), "the model read the address"


def test_personal_data_leaves_dialogues_on_their_way_to_vllm(
    storage: Path, tiny_chat_base: Path, tmp_path: Path
) -> None:
    rows = [{"question": "I am ada@example.com, is it soft?"}, {"question": " "}]
    plan = planned("chat", write(tmp_path / "a.jsonl", *rows), engine="vllm", redact={"kinds": ["EMAIL"]})
    (row,) = packed(plan)
    asked = vllm.ask_block(row, plan, str(tiny_chat_base), 256)
    assert "ada" not in json.dumps(asked.drop_columns(["tokens"]).to_pylist())
    said = [
        vllm.answer_of(
            {**one, "generated_tokens": [2], "generated_text": "yes", "num_input_tokens": 9}, frozenset()
        )
        for one in vllm.only(asked, good=True).to_pylist()
    ]
    bad = vllm.only(asked, good=False)
    together = pa.concat_tables([bad, pa.Table.from_pylist(said, bad.schema)])
    counts = json.loads(vllm.write_group(together, plan, places.uri(tmp_path / "out"))["counts"][0].as_py())
    assert counts["redacted"] == {"EMAIL": 1, "rows": 1}
    table = pq.read_table(tmp_path / "out" / counts["shard"]).to_pylist()
    assert table[0]["messages"] == [{"role": "user", "content": "I am <EMAIL_1>, is it soft?"}]


def test_a_kept_column_does_not_take_an_answers_place(tiny_base: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "fits", "label": "good"})
    with pytest.raises(ConfigError, match=r"score.keep: 'label' is the name of a column of the scores"):
        shards(use("sentiment", source, tiny_base, keep={"label": "label"}), tiny_base, tmp_path)


def test_questions_need_no_answers() -> None:
    data = use("chat", None).data
    for present, wanted in (
        (["question", "system"], {"question", "system"}),
        (["instruction", "input"], {"instruction", "input"}),
        (["conversations"], {"conversations"}),
    ):
        assert set(dialogues.columns(data, present, dialogues.ASKED)) == wanted
    with pytest.raises(DataError, match="are those of no form"):
        dialogues.columns(data, ["question"])
    assert dialogues.question({"question": "soft?", "system": "be short"}) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "soft?"},
    ]


def test_the_same_input_and_model_have_the_same_name(storage: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "fits", "order": 1})
    first = planned("sentiment", source)
    assert planned("sentiment", source, workers=3, bad_rows=0.5).fingerprint == first.fingerprint
    others = [
        planned("sentiment", source, limit=5),
        planned("sentiment", source, keep={"order": "order"}),
        planned("sentiment", source, redact=True),
        planned("sentiment", source, redact={"kinds": ["EMAIL"]}),
        plan_of(use("sentiment", source), "shop@2", "digest"),
        plan_of(use("sentiment", source), "shop@1", "another"),
    ]
    write(source, {"text": "fit", "order": 1})
    others.append(planned("sentiment", source))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 8


def test_an_output_that_is_taken_is_told(storage: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "fits"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not lose me")
    with pytest.raises(ConfigError, match=r"score.output: .*mine holds files already"):
        planned("sentiment", source, output=str(tmp_path / "mine")).manifest()
    with places.publish(str(tmp_path / "other")) as folder:
        places.write_json(str(folder / "_manifest.json"), {"fingerprint": "ffff"})
    with pytest.raises(ConfigError, match=r"another input or model \(ffff\); give another folder"):
        planned("sentiment", source, output=str(tmp_path / "other")).manifest()
    assert planned("sentiment", source).manifest() is None


def test_mistakes_that_need_no_reading(storage: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "fits"})
    assert scores_files() == ["chat", "sentiment", "tagging"]
    with pytest.raises(ConfigError, match=r"score.source is missing; give --score.source URI"):
        plan_of(use("sentiment", None), "shop@1", "digest")
    with pytest.raises(ConfigError, match=r"score.source: .*b.jsonl does not exist; did you mean 'a.jsonl'"):
        planned("sentiment", tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"no column 'orders' \(score.keep.order\)"):
        planned("sentiment", source, keep={"order": "orders"})
    with pytest.raises(ConfigError, match=r"score.keep: 'text' is the name of a column"):
        planned("sentiment", source, keep={"text": "text"})
    with pytest.raises(ValueError, match="'row' is the name of a column"):
        use("sentiment", source, keep={"row": "text"})
    with pytest.raises(DataError, match=r"no column 'tokens' \(data.columns.tokens\)"):
        planned("tagging", write(tmp_path / "c.jsonl", {"words": "fits"}))
    assert planned("preference", write(tmp_path / "d.jsonl", {"question": "soft?"})).task == "chat"
