"""What every application that follows a registered model shares: the replica's life, and its size by `serving`."""

# Without `from __future__ import annotations`: Ray Serve reads the annotations of what inherits this.

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from ray import serve as ray_serve

from lib.artifacts import ModelRef
from lib.settings import ServingSettings
from serve import logs, metrics
from serve.access import guard
from serve.admission import Places, admit
from serve.batching import LengthBatcher
from serve.following import Following
from serve.http import Ready, create_app, request_id
from serve.observing import observe
from serve.probation import Probation
from serve.recording import record
from serve.scaling import UNBOUNDED, size


class EncoderModel(ABC):
    """A loaded model version with the engine thread that computes it."""

    def __init__(self, predictor: Any, serving: ServingSettings) -> None:
        self.predictor = predictor
        encoder = predictor.encoder
        self.name: str = encoder.name
        """Engine and precision."""
        self.batcher = LengthBatcher(
            encoder.logits, serving.tokens_per_batch, encoder.padding_per_batch, metrics.current().batch
        )

    @abstractmethod
    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int]:
        """An answer for each input, in their order, and how many tokens the model read."""

    @abstractmethod
    def differ(self, one: Any, other: Any) -> tuple[bool, float]:
        """Whether two answers to one input disagree, and how far they lie apart, from 0 to 1."""

    def close(self) -> None:
        self.batcher.close()


M = TypeVar("M", bound=EncoderModel)


class Replica(Generic[M]):
    """One model version at a time, swapped while it serves."""

    response: ClassVar[type[BaseModel]]

    def __init__(self, serving: ServingSettings, load: Callable[[Path, ServingSettings], M]) -> None:
        self.serving = serving
        self.models: Following[M] = Following(lambda folder: load(folder, serving))
        self.trial: Probation[M] | None = None
        if serving.canary is not None:
            name = ray_serve.get_replica_context().app_name
            self.trial = Probation(name, serving.canary, lambda folder: load(folder, serving), self.models)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        before = user_config.get("instead_of")
        if self.trial is not None and before is not None:
            await self.trial.follow(user_config["model"], before)
            return
        if self.trial is not None:
            self.trial.stop()
        await self.models.follow(user_config["model"])

    def ready(self) -> Ready:
        loaded = self.models.current
        return Ready(
            model=loaded.ref.name,
            version=loaded.ref.version,
            engine=loaded.model.name,
            failed=self.models.failed,
            trial=self.trial.told if self.trial else None,
        )

    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int, ModelRef]:
        """An answer for each input, the tokens that were read for them, and the version that gave them."""
        with self.models.using() as loaded:
            began = time.perf_counter()
            results, tokens = await loaded.model.answer(inputs)
            if self.trial is not None:
                self.trial.mirror(inputs, results, time.perf_counter() - began)
        return results, tokens, loaded.ref

    async def respond(self, inputs: list[Any], identity: str) -> tuple[BaseModel, int, str]:
        """The answer, the tokens that were read for it, and the version that gave it."""
        results, tokens, ref = await self.answer(inputs)
        response = self.response(results=results, model=ref.name, version=ref.version, request_id=identity)
        return response, tokens, str(ref)


def http_api(
    replica: Replica[Any], task: str, summary: str, description: str, request_model: type[BaseModel]
) -> FastAPI:
    """The HTTP side of a replica: POST /v1/TASK beside what every application has."""
    app = create_app(f"Whorl {task}", description, replica)

    @app.post(f"/v1/{task}", tags=[task], summary=summary, response_model=replica.response)
    async def answer(request: Request, body: request_model) -> Any:  # type: ignore[valid-type]
        inputs: list[Any] = body.inputs  # type: ignore[attr-defined]
        state, identity = request.state, request_id(request)
        response, state.tokens, state.model = await replica.respond(inputs, identity)
        return response

    serving = replica.serving
    admit(app, serving, Places(serving.max_ongoing_requests, serving.max_queued_requests))
    record(app, serving.events)
    guard(app, serving.access)
    observe(app, replica, serving)
    return app


def bind(deployment: Any, serving: ServingSettings) -> ray_serve.Application:
    """The deployment as an application of the size that `serving` asks for."""
    return deployment.options(
        **size(serving),
        # Whom a replica has no place for it tells itself (serve/admission.py): Ray Serve would, in plain text.
        max_ongoing_requests=UNBOUNDED,
        logging_config=logs.config(serving.logs),
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
    ).bind(serving)
