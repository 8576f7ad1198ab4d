"""Sentiment over HTTP: POST /v1/sentiment {"inputs": ["…", …]} → a label and scores for each.

    python -m serve.deploy --config jobs/configs/reviews.yaml      # follows the champion
    serve deploy serve/config.yaml                                 # the same, by Ray Serve's own command

One deployment: the replica that parses the request also computes it, so there is no second hop. Texts of
all requests in flight are batched by length (serve/batching.py).
"""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from lib.settings import ServingSettings
from lib.tasks import sentiment as task
from serve.batching import LengthBatcher
from serve.http import create_app, request_id
from serve.replica import Replica, bind

# Above this many characters in a request, tokenising takes longer than a hop to a thread.
CHARS_IN_LOOP = 20_000

EXAMPLE: dict[str, Any] = {
    "results": [
        {
            "label": "positive",
            "scores": {"negative": 0.01, "neutral": 0.05, "positive": 0.94},
            "truncated": False,
        }
    ],
    "model": "reviews",
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


class Model:
    """A loaded model version with the engine thread that computes it."""

    def __init__(self, folder: Path, serving: ServingSettings) -> None:
        self.predictor = task.load(folder, serving)
        encoder = self.predictor.encoder
        self.name = encoder.name
        self.batcher = LengthBatcher(encoder.logits, serving.tokens_per_batch, encoder.padding_per_batch)

    async def answer(self, texts: list[str]) -> list[task.Answer]:
        if sum(map(len, texts)) > CHARS_IN_LOOP:
            rows, truncated = await asyncio.to_thread(task.read, self.predictor.tokenizer, texts)
        else:
            rows, truncated = task.read(self.predictor.tokenizer, texts)
        return task.answers(self.predictor, np.stack(await self.batcher.results(rows)), truncated)

    def close(self) -> None:
        self.batcher.close()


@ray_serve.deployment(name="Sentiment", logging_config=LoggingConfig(enable_access_log=False))
@ray_serve.ingress()
class Sentiment(Replica[Model]):
    """A replica that classifies texts."""

    def __init__(self, serving: ServingSettings) -> None:
        super().__init__(serving, lambda folder: Model(folder, serving))

    async def classify(self, inputs: list[str], identity: str) -> Response:
        with self.models.using() as loaded:
            results = await loaded.model.answer(inputs)
        return Response(
            results=results, model=loaded.ref.name, version=loaded.ref.version, request_id=identity
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_api(self)


def http_api(replica: Sentiment) -> FastAPI:
    """The HTTP side of a replica."""
    serving = replica.serving
    app = create_app(
        "Whorl sentiment",
        "Sentiment of texts, by a model that was fine-tuned on your data.",
        replica,
        serving.max_body_bytes,
    )
    Limited = limited_request(serving)  # noqa: N806 - a class

    @app.post("/v1/sentiment", tags=["sentiment"], summary="Classify texts")
    async def classify(request: Request, body: Limited) -> Response:  # type: ignore[valid-type]
        return await replica.classify(body.inputs, request_id(request))  # type: ignore[attr-defined]

    return app


def limited_request(serving: ServingSettings) -> type[task.Request]:
    """The task's request with the limits of this deployment, so that its documentation shows them."""
    text = Annotated[str, Field(min_length=1, max_length=serving.max_chars)]
    inputs = Annotated[list[text], Field(min_length=1, max_length=serving.max_inputs)]  # type: ignore[valid-type]
    return create_model("Request", __base__=task.Request, inputs=(inputs, ...))


def application(args: ServingSettings) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`."""
    return bind(Sentiment, args)
