"""Dialogues with passages: what training sees is what serving says, and the dataset is another when the index is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from lib import storage as files
from lib.data.grounding import ground
from lib.data.plan import plan
from lib.errors import RegistryError
from lib.retrieval.index import current
from lib.settings import Settings
from lib.tasks import UnencodableError, chat
from tests.serve.conftest import publish_index

PASSAGES = {"Sizes": "the size fits a dress", "Fabric": "the fabric is soft", "Color": "a great color"}


def turns(*said: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(said)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def configured(tiny_chat_base: Path, source: str = "talks.jsonl", **given: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "talks",
            "task": "chat",
            "data": {"source": source, "grounded": True, **given.pop("data", {})},
            "model": {"base": str(tiny_chat_base), "max_length": given.pop("max_length", 2000)},
            # A random encoder finds everything alike; the threshold is what decides.
            "serving": {"knowledge": {"index": "shop", "threshold": 0.999}},
        }
    )


def table(*dialogues: list[dict[str, str]]) -> pa.Table:
    return pa.table(
        {"id": [str(i) for i in range(len(dialogues))], "messages": pa.array(dialogues, chat.MESSAGES)}
    )


@pytest.fixture
def published(storage: Path, tiny_base: Path) -> None:
    publish_index(tiny_base, PASSAGES, "a")


@pytest.mark.usefixtures("published")
def test_a_dialogue_is_told_what_an_application_would_tell_it(tiny_chat_base: Path) -> None:
    from serve.grounding import Grounding, Knowledge

    settings = configured(tiny_chat_base)
    dialogues = [
        turns("the fabric is soft", "yes"),
        turns("hello", "good day", "a great color", "it is", system="be kind"),
        turns("xyzzy", "I do not know"),
        turns(" ", "what is it?"),
    ]
    rows = ground(table(*dialogues), settings, current("shop"))
    assert settings.serving.knowledge is not None
    knowledge = Knowledge(settings.serving.knowledge)
    try:
        tokenizer = Tokenizer.from_file(str(tiny_chat_base / "tokenizer.json"))
        served = Grounding(knowledge, settings.serving.knowledge, tokenizer, 2000)
        for asked, told in zip(dialogues, rows["messages"].to_pylist(), strict=True):
            expected = asyncio.run(served.ground(asked[:-1], None)).messages
            assert told == [*expected, asked[-1]]
    finally:
        knowledge.close()
    assert rows["asked"].to_pylist() == dialogues
    assert rows["passages"].to_pylist() == [
        "[1] Fabric\nthe fabric is soft",
        "[1] Color\na great color",
        "",
        "",
    ]
    row = rows.slice(0, 1).to_pylist()[0]
    assert chat.request(row, "talks")[1]["messages"] == dialogues[0][:-1]  # the application finds them itself
    assert rows.schema.field("messages").type == chat.MESSAGES
    assert ground(table().slice(0, 0), settings, current("shop")).num_rows == 0


@pytest.mark.usefixtures("published")
def test_a_dialogue_without_room_for_a_passage_is_named(tiny_chat_base: Path) -> None:
    settings = configured(tiny_chat_base, max_length=64)
    fine, long = turns("xyzzy", "no"), turns("the fabric is soft", "soft " * 60)
    with pytest.raises(
        UnencodableError, match=r"of 64 tokens for passages .* raise it or leave the row out"
    ) as error:
        ground(table(fine, long), settings, current("shop"))
    assert error.value.row == 1


@pytest.mark.usefixtures("published")
def test_another_index_or_other_instructions_are_another_dataset(
    tiny_chat_base: Path, tiny_base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "talks.jsonl"
    source.write_text(json.dumps({"messages": turns("hello", "good day")}))
    settings = configured(tiny_chat_base, str(source))
    first = plan(settings)
    assert first.knowledge == current("shop")
    plain = plan(settings.model_copy(update={"data": settings.data.model_copy(update={"grounded": False})}))
    words = settings.model_dump(mode="json")
    words["serving"]["knowledge"]["instructions"] = "read"
    told = plan(Settings.model_validate(words))
    words["serving"]["knowledge"] |= {"instructions": settings.serving.knowledge.instructions, "poll_s": 1}  # type: ignore[union-attr]
    assert plan(Settings.model_validate(words)).ref == first.ref
    publish_index(tiny_base, PASSAGES, "b")
    second = plan(settings)
    assert len({one.ref.fingerprint for one in (first, plain, told, second)}) == 4


def test_without_an_index_it_ends_in_a_line(storage: Path, tiny_chat_base: Path, tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": turns("hello", "good day")}))
    with pytest.raises(RegistryError, match="no index shop; make it with"):
        plan(configured(tiny_chat_base, str(tmp_path / "talks.jsonl")))


@pytest.mark.ray
@pytest.mark.usefixtures("published", "ray_cluster")
def test_a_dataset_holds_grounded_dialogues(tiny_chat_base: Path, tmp_path: Path) -> None:
    from lib.data.build import build

    lines = [turns(f"the fabric is soft {i}", f"yes {i}") for i in range(100)]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    settings = configured(tiny_chat_base, str(tmp_path / "talks.jsonl"))
    words = settings.model_dump(mode="json")
    words["serving"]["knowledge"]["threshold"] = -1
    planned = plan(Settings.model_validate(words))
    manifest = build(planned, lambda _: None)
    assert manifest["knowledge"] == str(current("shop"))
    rows = [row for split in ("train", "validation", "test") for shard in planned.ref.shards(split)
            for row in pq.read_table(files.filesystem(shard)[1], filesystem=files.filesystem(shard)[0]).to_pylist()]  # fmt: skip
    assert len(rows) == 100
    for row in rows:
        assert row["messages"][0]["role"] == "system"
        assert row["passages"] in row["messages"][0]["content"]
        assert row["messages"][1:] == row["asked"]
        assert row["length"] > 40  # of words in the passages
