"""A tagger: a model directory that finds entities in texts. The task `tagging` trains and judges what this serves.

Shapes: T pieces of a window, W words in all texts together, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lib import encoders, entities
from lib.artifacts import TaskFile, check_model_directory
from lib.encoders import load_tokenizer
from lib.entities import OUTSIDE
from lib.settings import ServingSettings
from lib.words import Reading, Words, cut_words, tokenize_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lib.engines import TokenEncoder


class Request(BaseModel):
    """Texts whose entities are wanted, each as it is or already cut into words."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"inputs": ["Ada Lovelace lived in London.", ["Peter", "Blackburn"]]}]
        },
    )
    inputs: Annotated[
        list[
            Annotated[str, Field(min_length=1)]
            | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        ],
        Field(min_length=1),
    ]


class Entity(BaseModel):
    label: str
    text: str
    start: int
    """First character of the text, or first word where words were given."""
    end: int
    """Behind the last one."""
    score: float
    """Mean probability of its words' classes."""


class Answer(BaseModel):
    entities: list[Entity]


class Response(BaseModel):
    results: list[Answer]


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """Without truncation: windows are cut from the pieces, so that nothing is lost."""
    tokenizer.no_truncation()
    return tokenizer


@dataclass
class Predictor:
    """A model directory, loaded: tokeniser, engine, classes."""

    info: TaskFile
    tokenizer: Tokenizer
    encoder: TokenEncoder


def load(folder: Path, serving: ServingSettings) -> Predictor:
    """Raises ModelError when the directory is not a tagging model or its weights are not safetensors."""
    from lib.engines import load_token_encoder

    check_model_directory(folder)
    info = TaskFile.read(folder, "tagging")
    encoder = load_token_encoder(folder, serving)
    encoders.check_classes(folder, encoder.classes, info)
    return Predictor(info, whole(load_tokenizer(folder, info.max_length)), encoder)


def class_logits(predictor: Predictor, reading: Reading, logits: Sequence[np.ndarray]) -> np.ndarray:
    """Logits float32 [W, C] of all words in order, from those of every window's pieces ([T, C] each).

    A word without a piece of its own is outside.
    """
    offsets = np.cumsum([0, *reading.words])
    found = np.zeros((int(offsets[-1]), predictor.encoder.classes), np.float32)
    found[:, predictor.info.labels.index(OUTSIDE)] = 1e-3
    for places, window in zip(reading.places, logits, strict=True):
        if places:
            sentences, words, pieces = np.array(places).T
            found[offsets[sentences] + words] = window[pieces]
    return found


def read(predictor: Predictor, texts: Sequence[Words]) -> Reading:
    """The windows that the model has to compute for texts."""
    return read_sentences(predictor, [found for found, _ in texts])


def read_sentences(predictor: Predictor, sentences: list[list[str]]) -> Reading:
    """The same for sentences that are words already."""
    info = predictor.info
    return tokenize_words(predictor.tokenizer, info.max_length, sentences, info.case_markers)


def predict(predictor: Predictor, request: Request) -> Response:
    texts = [cut_words(text) for text in request.inputs]
    reading = read(predictor, texts)
    logits = class_logits(predictor, reading, predictor.encoder.logits(reading.rows))
    return Response(results=answers(predictor, request.inputs, texts, logits))


def answers(
    predictor: Predictor,
    inputs: Sequence[str | list[str]],
    texts: Sequence[Words],
    logits: np.ndarray,
) -> list[Answer]:
    """Logits [W, C] of all texts' words as entities with their places."""
    probabilities = encoders.softmax(logits / predictor.info.temperature)
    best = probabilities.argmax(-1)
    results, start = [], 0
    for given, (words, places) in zip(inputs, texts, strict=True):
        span = slice(start, start + len(words))
        tags = [predictor.info.labels[i] for i in best[span]]
        sure = probabilities[span].max(-1)
        found = []
        for kind, first, end in entities.spans(tags):
            begins, ends = places[first][0], places[end - 1][1]
            text = " ".join(given[begins:ends]) if isinstance(given, list) else given[begins:ends]
            score = float(sure[first:end].mean())
            found.append(Entity(label=kind, text=text, start=begins, end=ends, score=score))
        results.append(Answer(entities=found))
        start = span.stop
    return results
