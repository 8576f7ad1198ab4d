"""Grounding without an engine: what is searched, what the model is told within its context, a new version taken up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lib import storage as files
from lib.artifacts import IndexRef
from lib.errors import RegistryError, RequestError
from lib.retrieval.index import make_current
from lib.retrieval.prompt import questions_of, with_system
from lib.settings import GroundingSettings
from serve.grounding import Grounding, Knowledge
from tests.serve.conftest import publish_index

PASSAGES = {
    "Sizes": "the size fits a dress",
    "Fabric": "the fabric is soft",
    "Color": "a great color",
}
SYSTEM = {"role": "system", "content": "be kind"}


def user(said: Any) -> dict[str, Any]:
    return {"role": "user", "content": said}


@pytest.fixture
def tokenizer(tiny_chat_base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_chat_base / "tokenizer.json"))


@pytest.fixture
def knowledge(storage: Path, tiny_base: Path) -> Iterator[Knowledge]:
    publish_index(tiny_base, PASSAGES, "a")
    opened = Knowledge(settings())
    yield opened
    opened.close()


def settings(**given: Any) -> GroundingSettings:
    # A random encoder finds everything alike; the threshold is what decides.
    return GroundingSettings.model_validate({"index": "shop", "threshold": 0.999, "poll_s": 0.05, **given})


def ground(grounding: Grounding, *messages: dict[str, Any], tokens: int | None = None) -> Any:
    return asyncio.run(grounding.ground(list(messages), tokens))


def test_passages_go_into_the_system_message_and_are_cited(
    knowledge: Knowledge, tokenizer: Tokenizer
) -> None:
    given = settings()
    grounding = Grounding(knowledge, given, tokenizer, 1000)
    asked = user([{"type": "text", "text": "the fabric is soft"}, {"type": "image_url", "image_url": {}}])
    found = ground(grounding, SYSTEM, asked)
    system, last = found.messages
    assert last == asked
    assert system["content"] == f"be kind\n\n{given.instructions}\n\n[1] Fabric\nthe fabric is soft"
    (citation,) = found.citations
    assert citation.pop("cosine") == pytest.approx(1, abs=1e-3)
    assert citation == {
        "number": 1,
        "title": "Fabric",
        "headings": [],
        "text": "the fabric is soft",
        "source": "Fabric.md",
        "place": "paragraph 1",
    }
    assert "/srv/" not in json.dumps(found.citations)  # where files lie is nobody's business
    assert found.answer is None


def test_nothing_relevant_is_told_to_the_model_or_answered(
    knowledge: Knowledge, tokenizer: Tokenizer
) -> None:
    told = ground(Grounding(knowledge, settings(), tokenizer, 1000), user("xyzzy"))
    assert told.messages[0] == {"role": "system", "content": settings().nothing_found}
    assert (told.citations, told.answer) == ([], None)
    answered = ground(Grounding(knowledge, settings(unknown="No idea."), tokenizer, 1000), user("xyzzy"))
    assert answered.answer == "No idea."


def test_who_says_nothing_is_not_grounded(knowledge: Knowledge, tokenizer: Tokenizer) -> None:
    grounding = Grounding(knowledge, settings(unknown="No idea."), tokenizer, 1000)
    for messages in ([], [SYSTEM], [user("  ")]):
        found = ground(grounding, *messages)
        assert (found.messages, found.citations, found.answer) == (messages, [], None)


def test_passages_keep_to_the_context(tiny_base: Path, knowledge: Knowledge, tokenizer: Tokenizer) -> None:
    everything = {"threshold": -1.0, "instructions": "read", "answer_tokens": 20}
    asked = user("the fabric is soft")

    def number(context: int, tokens: int | None = None, **given: Any) -> int:
        wide = Knowledge(settings(**everything))
        try:
            grounding = Grounding(wide, settings(**everything, **given), tokenizer, context)
            found = ground(grounding, asked, tokens=tokens)
        finally:
            wide.close()
        prompt = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in found.messages)
        used = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        assert used + (tokens or 20) <= context
        return len(found.citations)

    assert number(1000) == 3
    assert number(1000, passage_tokens=40) < 3
    sizes = [number(context) for context in range(84, 160, 4)]
    assert sizes == sorted(sizes)
    assert {1, 2, 3} <= set(sizes)
    assert number(156, tokens=100) < number(156, tokens=20)
    with pytest.raises(RequestError, match=r"leaves [0-9] of 48 tokens for passages") as refused:
        number(48)
    assert refused.value.code == "context_length_exceeded"


def test_a_new_version_is_taken_up_and_a_broken_one_is_not(
    tiny_base: Path, knowledge: Knowledge, tokenizer: Tokenizer
) -> None:
    grounding = Grounding(knowledge, settings(), tokenizer, 1000)
    assert ground(grounding, user("love the shirt")).citations == []
    ref = publish_index(tiny_base, {"Shirts": "love the shirt"}, "b")
    wait_until(lambda: knowledge.version == ref)
    assert ground(grounding, user("love the shirt")).citations[0]["title"] == "Shirts"
    broken = IndexRef("shop", "c")
    with files.publish(broken.uri) as folder:
        files.write_json(str(folder / "manifest.json"), ref.manifest())
    make_current(broken, keep=3)
    time.sleep(0.3)
    assert knowledge.version == ref
    assert ground(grounding, user("love the shirt")).citations[0]["title"] == "Shirts"
    mended = publish_index(tiny_base, PASSAGES, "d")
    wait_until(lambda: knowledge.version == mended)


def wait_until(holds: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.usefixtures("storage")
def test_without_an_index_nothing_is_served() -> None:
    with pytest.raises(RegistryError, match=r"no index shop; make it with python -m jobs\.index"):
        Knowledge(settings())


def test_the_question_is_the_last_turn_and_that_with_those_before() -> None:
    talk = [
        SYSTEM,
        user("do you ship to Norway?"),
        {"role": "assistant", "content": "Yes."},
        user("how long?"),
    ]
    assert questions_of(talk) == ["how long?", "how long?\ndo you ship to Norway?"]
    assert questions_of(talk[:2]) == ["do you ship to Norway?"]


def test_a_system_message_is_kept() -> None:
    parts = {"role": "developer", "content": [{"type": "text", "text": "be kind"}]}
    assert with_system([parts, user("x")], "more")[0] == {"role": "developer", "content": "be kind\n\nmore"}
    assert [m["role"] for m in with_system([user("x")], "more")] == ["system", "user"]
