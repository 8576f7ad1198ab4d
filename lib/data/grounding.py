"""Dialogues with the passages of a knowledge base, put before the model as `serve.grounding` puts them when it answers.

For training (`ground`) what is searched for is the last question that the assistant answers. A model is so trained on
what it will see: good passages and bad ones, and what it is told when there are none. For files that are scored
(`tell`) it is the question that the dialogue ends with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.artifacts import IndexRef
from lib.encoders import UNCUT, base_tokenizer
from lib.errors import RequestError
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import Index
from lib.retrieval.prompt import MESSAGE_TOKENS, Prompter, listed, questions_of
from lib.retrieval.search import Hit, search
from lib.settings import GroundingSettings, ServingSettings, Settings
from lib.tasks import UnencodableError

# Questions that are embedded at a time.
AT_ONCE = 512


def identity(settings: Settings, ref: IndexRef) -> dict[str, Any]:
    """What of the knowledge base decides what a grounded dialogue says, for a dataset's fingerprint."""
    assert settings.serving.knowledge is not None
    told = settings.serving.knowledge.model_dump(
        mode="json", exclude={"index", "unknown", "poll_s", "answer_tokens"}
    )
    return {"index": ref.fingerprint, "told": told}


def ground(
    rows: pa.Table, settings: Settings, ref: IndexRef, refused: dict[int, str] | None = None
) -> pa.Table:
    """Rows with `messages` of which the first holds passages, `asked`, the messages as they were, and `passages`, the
    text of those that were put in, empty where nothing was found.

    Raises UnencodableError for a dialogue whose length leaves no room for a passage; or, where `refused` is given, adds
    its row to it, with the reason, and leaves it as it is.
    """
    knowledge = settings.serving.knowledge
    assert knowledge is not None
    dialogues: list[list[dict[str, Any]]] = rows["messages"].to_pylist()
    ends = [max(i for i, turn in enumerate(turns) if turn["role"] == "assistant") for turns in dialogues]
    found = _search([turns[:end] for turns, end in zip(dialogues, ends, strict=True)], settings, ref)
    prompter = Prompter(knowledge, base_tokenizer(settings.model.base, UNCUT), settings.model.max_length)
    told, passages = [], []
    for row, (turns, end, hits) in enumerate(zip(dialogues, ends, found, strict=True)):
        answer = sum(prompter.tokens(turn["content"]) + MESSAGE_TOKENS for turn in turns[end:])
        if hits is None:  # nothing is asked, and nobody would be told anything
            told.append(turns)
            passages.append("")
            continue
        try:
            before, chosen = prompter.told(turns[:end], hits, answer)
        except RequestError as error:
            why = f"{error} (model.max_length is {settings.model.max_length}; raise it or leave the row out)"
            if refused is None:
                raise UnencodableError(row, why) from None
            refused[row] = why
            before, chosen = turns[:end], []
        told.append([*before, *turns[end:]])
        passages.append(listed(chosen))
    place, kind = rows.column_names.index("messages"), rows.schema.field("messages").type
    asked = rows.append_column("asked", rows["messages"]).append_column(
        "passages", pa.array(passages, pa.string())
    )
    return asked.set_column(place, "messages", pa.array(told, kind))


@dataclass(frozen=True)
class Told:
    """A dialogue that ends with a question, as the model is asked it."""

    messages: list[dict[str, Any]]
    sources: list[str]
    """Of the passages, as they are numbered."""
    answer: str | None = None
    """What is answered without the model, where nothing was found."""


def prompter(settings: GroundingSettings, model: Path, context: int) -> Prompter:
    """For the chat model that lies in `model` and reads `context` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    return Prompter(settings, tokenizer, context)


def tell(
    dialogues: list[list[dict[str, Any]]], settings: Settings, ref: IndexRef, prompter: Prompter
) -> list[Told | RequestError]:
    """Each dialogue with its passages, or why its model has no room for one; as it is where the user says nothing."""
    told: list[Told | RequestError] = []
    for turns, hits in zip(dialogues, _search(dialogues, settings, ref), strict=True):
        if hits is None:
            told.append(Told(turns, []))
        elif not hits and prompter.settings.unknown is not None:
            told.append(Told(turns, [], prompter.settings.unknown))
        else:
            try:
                messages, chosen = prompter.told(turns, hits, settings.score.max_tokens)
                told.append(Told(messages, [hit.source for hit in chosen]))
            except RequestError as error:
                told.append(error)
    return told


def _search(
    dialogues: list[list[dict[str, Any]]], settings: Settings, ref: IndexRef
) -> list[list[Hit] | None]:
    """What is found for each dialogue; None where the user says nothing."""
    assert settings.serving.knowledge is not None
    index, embedder = _opened(ref)
    prefix = index.manifest["query_prefix"]
    ways = [questions_of(turns) for turns in dialogues]
    questions = [question for each in ways for question in each]
    parts = [
        embedder.vectors([prefix + question for question in questions[start : start + AT_ONCE]])
        for start in range(0, len(questions), AT_ONCE)
    ]
    vectors = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    found: list[list[Hit] | None] = []
    start = 0
    for each in ways:
        own = vectors[start : start + len(each)]
        found.append(search(index, each, own, settings.serving.knowledge) if each else None)
        start += len(each)
    return found


@lru_cache(maxsize=1)
def _opened(ref: IndexRef) -> tuple[Index, Embedder]:
    """Once in a process, whose tasks have many blocks."""
    index = Index(ref)
    return index, Embedder(index.manifest["base"], ServingSettings(threads=1))
