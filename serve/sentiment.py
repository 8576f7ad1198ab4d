"""Sentiment over HTTP: POST /v1/sentiment {"inputs": ["…", …]} → a label and scores for each.

    POST /v1/opinions and what comes of it, with `monitoring`: serve/opinions.py

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
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, create_model
from ray import serve as ray_serve

from lib import heads
from lib.opinions.judging import check
from lib.settings import MonitoringSettings, ServingSettings
from lib.tasks import sentiment as task
from serve.opinions import Watching, take_opinions
from serve.replica import EncoderModel, Replica, bind, http_api

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


class Arguments(ServingSettings):
    """The configuration's `serving`, and `monitoring` beside it."""

    monitoring: MonitoringSettings | None = None


class Model(EncoderModel):
    """A loaded model version."""

    def __init__(self, folder: Path, serving: Arguments) -> None:
        predictor = task.load(folder, serving)
        if serving.monitoring is not None:
            check(heads.of_model(predictor.info)[0].labels, serving.monitoring)
        super().__init__(predictor, serving)

    async def answer(self, texts: list[str]) -> tuple[list[task.Answer], int]:
        if sum(map(len, texts)) > CHARS_IN_LOOP:
            rows, truncated = await asyncio.to_thread(task.read, self.predictor.tokenizer, texts)
        else:
            rows, truncated = task.read(self.predictor.tokenizer, texts)
        logits = np.stack(await self.batcher.results(rows))
        return task.answers(self.predictor, logits, truncated), sum(map(len, rows))

    def differ(self, one: task.Answer, other: task.Answer) -> tuple[bool, float]:
        """The distance is the total variation of the scores: half the sum of their differences."""
        names = one.scores.keys() | other.scores.keys()
        apart = sum(abs(one.scores.get(name, 0.0) - other.scores.get(name, 0.0)) for name in names) / 2
        return one.label != other.label, apart


@ray_serve.deployment(name="Sentiment")
@ray_serve.ingress()
class Sentiment(Replica[Model]):
    """A replica that classifies texts."""

    response = Response

    def __init__(self, serving: Arguments) -> None:
        self.monitoring, self.name = serving.monitoring, ray_serve.get_replica_context().app_name
        if serving.monitoring is not None:
            self.watching = Watching(self.name, serving.monitoring)
        super().__init__(serving, lambda folder, _: Model(folder, serving))

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = http_api(
            self,
            "sentiment",
            "Classify texts",
            "Sentiment of texts, by a model that was fine-tuned on your data.",
            limited_request(self.serving),
        )
        if self.monitoring is not None:
            take_opinions(app, self, self.monitoring, self.name)
        return app


def limited_request(serving: ServingSettings) -> type[task.Request]:
    """The task's request with the limits of this deployment, so that its documentation shows them."""
    text = Annotated[str, Field(min_length=1, max_length=serving.max_chars)]
    inputs = Annotated[list[text], Field(min_length=1, max_length=serving.max_inputs)]  # type: ignore[valid-type]
    return create_model("Request", __base__=task.Request, inputs=(inputs, ...))


def application(args: Arguments) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`, and `monitoring`."""
    return bind(Sentiment, args)
