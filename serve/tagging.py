"""Entities over HTTP: POST /v1/tagging {"inputs": ["…", …]} → the entities of each text, with their places.

    python -m serve.deploy --config jobs/configs/ner.yaml      # follows the champion

As in serve/sentiment.py, the replica that parses a request also computes it, and the texts of all requests in
flight are batched by length. A text longer than the model reads is computed in overlapping windows.
"""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve as ray_serve

from lib.settings import ServingSettings
from lib.tasks import tagging as task
from lib.words import Reading, Words, cut_words
from serve.replica import EncoderModel, Replica, bind, http_api

EXAMPLE: dict[str, Any] = {
    "results": [
        {
            "entities": [
                {"label": "PER", "text": "Ada Lovelace", "start": 0, "end": 12, "score": 0.99},
                {"label": "LOC", "text": "London", "start": 22, "end": 28, "score": 0.98},
            ]
        }
    ],
    "model": "ner",
    "version": 3,
    "request_id": "4f1c2d5e-8a43-4a55-9a9e-0c4c4f6f2f0a",
}


class Response(BaseModel):
    """Answers in the order of the inputs."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    results: list[task.Answer]
    model: str
    version: int
    request_id: str


class Model(EncoderModel):
    """A loaded model version."""

    def __init__(self, folder: Path, serving: ServingSettings) -> None:
        super().__init__(task.load(folder, serving), serving)

    async def answer(self, inputs: list[str | list[str]]) -> tuple[list[task.Answer], int]:
        # Cutting a text into words is Python, and takes longer than a hop to a thread.
        texts, reading = await asyncio.to_thread(self._read, inputs)
        logits = task.class_logits(self.predictor, reading, await self.batcher.results(reading.rows))
        return task.answers(self.predictor, inputs, texts, logits), sum(map(len, reading.rows))

    def differ(self, one: task.Answer, other: task.Answer) -> tuple[bool, float]:
        """The distance is Jaccard's: the share of all entities found that only one of them found."""
        found = [{(e.label, e.start, e.end) for e in answer.entities} for answer in (one, other)]
        every = found[0] | found[1]
        apart = 1 - len(found[0] & found[1]) / len(every) if every else 0.0
        return apart > 0, apart

    def _read(self, inputs: list[str | list[str]]) -> tuple[list[Words], Reading]:
        texts = [cut_words(text) for text in inputs]
        return texts, task.read(self.predictor, texts)


@ray_serve.deployment(name="Tagging")
@ray_serve.ingress()
class Tagging(Replica[Model]):
    """A replica that finds entities."""

    response = Response

    def __init__(self, serving: ServingSettings) -> None:
        super().__init__(serving, Model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_api(
            self,
            "tagging",
            "Find entities",
            "Entities in texts, by a model that was fine-tuned on your data.",
            limited_request(self.serving),
        )


def limited_request(serving: ServingSettings) -> type[task.Request]:
    """The task's request with the limits of this deployment, so that its documentation shows them."""
    text = Annotated[str, Field(min_length=1, max_length=serving.max_chars)]
    word = Annotated[str, Field(min_length=1, max_length=serving.max_chars)]
    words = Annotated[list[word], Field(min_length=1, max_length=serving.max_chars)]  # type: ignore[valid-type]
    inputs = Annotated[list[text | words], Field(min_length=1, max_length=serving.max_inputs)]  # type: ignore[valid-type]
    return create_model("Request", __base__=task.Request, inputs=(inputs, ...))


def application(args: ServingSettings) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`."""
    return bind(Tagging, args)
