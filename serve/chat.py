"""Chat over HTTP, as OpenAI's API has it: a registered causal model on vLLM, by Ray Serve's own LLM support.

    python -m serve.deploy --config jobs/configs/support_chat.yaml      # serves the champion

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="support", messages=[{"role": "user", "content": "…"}], stream=True)

Two deployments. `Chat`, the ingress, checks a request and turns every mistake into OpenAI's form of an error;
`Engine` holds one version's vLLM and its processes. With `serving.knowledge` the ingress grounds a conversation in an
index first, and answers bear `citations`: the whole answer, or the part of a stream that ends it. Another champion is another argument of both, so that
`serve.deploy` replaces them, replica by replica: with one, nobody is answered until the new engine has started.
"""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from fastapi import Depends, FastAPI, Request
from ray import serve as ray_serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ModelCard,
    ModelList,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress.ingress import _sanitize_chat_completion_request
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.generate.base.protocol import StreamOptions

from lib import registry, tracking
from lib.artifacts import ModelRef, TaskFile, check_model_directory
from lib.errors import ConfigError, RequestError
from lib.settings import ServingSettings
from lib.settings.sections import Positive
from serve.access import guard
from serve.following import parse_reference
from serve.grounding import Grounding
from serve.http import Ready, create_app, error_response, request_id
from serve.recording import record
from serve.replica import size

logger = logging.getLogger("ray.serve")

CPU_KV_CACHE_GIB = 1.0
UNBOUNDED = 1_000_000
QUIET = {"enable_access_log": False}


class Arguments(ServingSettings):
    """What `serve deploy` reads from a file: the configuration's `serving`, and the version."""

    version: Positive | None = None
    """Of the model that `model` names; None resolves its alias when the application is built."""


class UnknownModelError(RequestError):
    http_status = 404


class Engine(LLMServer):
    """A replica: one version's vLLM engine."""

    # Ray Serve awaits a replica's `__init__`.
    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, serving: ServingSettings, ref: ModelRef
    ) -> None:
        # The engine's workers read the files while it starts, all of them on this replica's machine or on a
        # file system that their machines share.
        with ExitStack() as files:
            folder = await asyncio.to_thread(files.enter_context, registry.open_version(ref))
            check_model_directory(folder)
            TaskFile.read(folder, "chat")
            await super().__init__(engine_config(serving, ref, folder))
        logger.info("serving %s", ref)

    async def __del__(self) -> None:
        # Ray Serve's own leaves the engine's processes to the interpreter's end, which a killed one has not.
        await super().__del__()
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()


@ray_serve.ingress()
class Chat(OpenAiIngress):
    """The ingress: OpenAI's routes in front of the engine's replicas."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle],
        model_cards: dict[str, ModelCard],
        serving: ServingSettings,
        ref: ModelRef,
        names: list[str],
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._serving = serving
        self._ref = ref
        self._names = names
        """What a request may call the model; the first is the one that answers bear."""
        knowledge, length = serving.knowledge, serving.chat.max_model_len
        self._grounding = Grounding.of(knowledge, ref, length) if knowledge else None

    def ready(self) -> Ready:
        # Ray Serve calls the application running when the engine is, and this deployment with it.
        return Ready(model=self._ref.name, version=self._ref.version, engine=engine_name(self._serving))

    async def models(self) -> ModelList:
        (card,) = self._model_cards.values()
        return ModelList(data=[card.model_copy(update={"id": name}) for name in self._names])

    async def model_data(self, model: str) -> ModelCard:
        card: ModelCard = self._model_cards[await self._get_model_id(model)]
        return card.model_copy(update={"id": model})

    async def _get_model_id(self, model: str | None) -> str:
        if model is not None and model not in self._names:
            raise UnknownModelError(
                f"no model {model!r} here (there are: {', '.join(self._names)})",
                param="model",
                code="model_not_found",
            )
        return self._names[0]

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        if self._grounding is not None:
            body.model = await self._get_model_id(body.model)
            body = _sanitize_chat_completion_request(body)
            limit = body.max_completion_tokens or body.max_tokens
            grounded = await self._grounding.ground(body.messages, limit)
            if grounded.answer is not None:
                request.state.model = str(self._ref)
                return said(grounded.answer, body)
            body.messages, request.state.citations = grounded.messages, grounded.citations
        response: Response = await super().chat(body, request)
        return response

    async def _get_response(
        self, *, body: Any, raw_request: Request | None = None, **rest: Any
    ) -> AsyncIterator[Any]:
        # The engine knows one name only.
        body.model = await self._get_model_id(body.model)
        options = getattr(body, "stream_options", None)
        # It is what a key's tokens are counted by; whoever did not ask for it is not told.
        is_ours = bool(body.stream) and not (options and options.include_usage)
        if is_ours:
            body.stream_options = StreamOptions(include_usage=True)
        state = raw_request.state if raw_request is not None else SimpleNamespace()
        state.model = str(self._ref)
        async for part in super()._get_response(body=body, raw_request=raw_request, **rest):
            shown = []
            for one in part if isinstance(part, list) else [part]:
                tokens, is_alone = usage_of(one)
                state.tokens = tokens or getattr(state, "tokens", 0)
                if not (is_ours and is_alone):
                    shown.append(with_citations(one, getattr(state, "citations", None)))
            if shown:
                yield shown if isinstance(part, list) else shown[0]

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(
            "Whorl chat",
            "OpenAI's chat and completions, by a model that was fine-tuned on your data.",
            self,
            self._serving.max_body_bytes,
        )
        app.add_exception_handler(OpenAIHTTPException, _engine_error)
        app.add_exception_handler(BackPressureError, _full)
        ask: dict[str, Any] = {"tags": ["chat"], "dependencies": [Depends(request_id)]}
        app.post("/v1/chat/completions", summary="Continue a conversation", **ask)(self.chat)
        app.post("/v1/completions", summary="Continue a text", **ask)(self.completions)
        app.get("/v1/models", tags=["models"], summary="Names of the model")(self.models)
        app.get("/v1/models/{model:path}", tags=["models"], summary="One of them")(self.model_data)
        record(app, self._serving.events)
        guard(app, self._serving.access)
        return app


def usage_of(part: Any) -> tuple[int, bool]:
    """Tokens of a prompt and its answer that a part of an answer tells (0: it tells none), and whether it tells
    nothing else. A part is one of vLLM's models or, in a stream, the text of a server-sent event."""
    if isinstance(part, str):
        if not part.startswith("data: {") or '"usage":{' not in part.replace('"usage": {', '"usage":{'):
            return 0, False
        found = json.loads(part.removeprefix("data: "))
        return int(found["usage"]["total_tokens"]), not found.get("choices")
    usage = getattr(part, "usage", None)
    return (int(usage.total_tokens), not part.choices) if usage else (0, False)


def with_citations(part: Any, citations: list[dict[str, Any]] | None) -> Any:
    """A part of an answer with `citations`, where it is the whole of it or what ends one of a stream's choices."""
    if citations is None:
        return part
    if not isinstance(part, str):
        if isinstance(part, ChatCompletionResponse):
            part.citations = citations
        return part
    if not part.startswith("data: {"):
        return part
    found = json.loads(part.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in found.get("choices", [])):
        return part
    return f"data: {json.dumps(found | {'citations': citations})}\n\n"


def said(answer: str, body: ChatCompletionRequest) -> Response:
    """An answer that no engine gave, in the form that was asked for."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    message = {"role": "assistant", "content": answer}
    if not body.stream:
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        whole = {"object": "chat.completion", "choices": [choice], "usage": usage, "citations": []}
        return JSONResponse(head | whole)
    head |= {"object": "chat.completion.chunk"}
    choices = [{"index": 0, "delta": message, "finish_reason": None}]
    ends = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    parts = [head | {"choices": choices}, head | {"choices": ends, "citations": []}]
    if body.stream_options and body.stream_options.include_usage:
        parts.append(head | {"choices": [], "usage": usage})
    events = [*(f"data: {json.dumps(part)}\n\n" for part in parts), "data: [DONE]\n\n"]
    return StreamingResponse(iter(events), media_type="text/event-stream")


async def _engine_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpenAIHTTPException)
    status = HTTPStatus(error.status_code)
    return error_response(status, error.message, code=status.name.lower())


async def _full(request: Request, error: Exception) -> JSONResponse:
    return error_response(503, "too many requests are waiting; try again", code="overloaded")


def on_gpu(serving: ServingSettings) -> bool:
    return serving.gpus_per_replica > 0


def engine_name(serving: ServingSettings) -> str:
    return f"vllm {serving.chat.dtype} on {'GPU' if on_gpu(serving) else 'CPU'}"


def engine_config(serving: ServingSettings, ref: ModelRef, folder: Path | None = None) -> LLMConfig:
    """Ray Serve's configuration of the engine; without a folder, what the deployment alone needs.

    Raises ConfigError for GPUs that cannot be divided among the workers.
    """
    chat, gpu = serving.chat, on_gpu(serving)
    bundle: dict[str, float] = {"CPU": serving.cpus_per_replica / chat.tensor_parallel}
    engine: dict[str, Any] = {
        "dtype": chat.dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "max_num_seqs": chat.max_num_seqs,
        "tensor_parallel_size": chat.tensor_parallel,
        "enforce_eager": not gpu if chat.enforce_eager is None else chat.enforce_eager,
    }
    if chat.max_model_len is not None:
        engine["max_model_len"] = chat.max_model_len
    kv_cache_gib = chat.kv_cache_gib or (None if gpu else CPU_KV_CACHE_GIB)
    if kv_cache_gib is not None:
        engine["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if gpu:
        bundle["GPU"] = serving.gpus_per_replica / chat.tensor_parallel
        if bundle["GPU"] > 1:
            raise ConfigError(
                f"serving.gpus_per_replica {serving.gpus_per_replica:g} for {chat.tensor_parallel} worker(s): "
                f"each can use one GPU at most; set serving.chat.tensor_parallel {serving.gpus_per_replica:g}"
            )
        engine["gpu_memory_utilization"] = chat.gpu_memory
    return LLMConfig(
        model_loading_config={"model_id": ref.name, "model_source": str(folder or ref.name)},
        accelerator_config={"kind": "gpu" if gpu else "cpu"},
        placement_group_config={"bundle_per_worker": bundle},
        engine_kwargs=engine | chat.options,
        experimental_configs={"stream_batching_interval_ms": chat.stream_interval_ms},
        runtime_env={"env_vars": _environment(serving)},
        deployment_config={
            **size(serving),
            "max_ongoing_requests": serving.max_ongoing_requests,
            "max_queued_requests": serving.max_queued_requests,
            # The first worker's bundle holds the replica too.
            "ray_actor_options": {"num_cpus": 0},
            "logging_config": QUIET,
        },
    )


def _environment(serving: ServingSettings) -> dict[str, str]:
    given = ray.get_runtime_context().runtime_env.get("env_vars", {}) if ray.is_initialized() else {}
    found = {
        **tracking.places(),
        **given,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if serving.threads is not None and not on_gpu(serving):
        # Else vLLM binds threads to all cores but one, which it leaves to its scheduler.
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(serving.threads)}
    return found | serving.chat.environment


def application(args: Arguments) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`, `model` at least."""
    if args.model is None:
        raise ConfigError("args.model is missing, such as support@champion")
    name, version = parse_reference(args.model)
    ref = ModelRef(name, args.version) if args.version else registry.resolve(name, version)
    serving = ServingSettings.model_validate(args.model_dump(exclude={"version"}))
    config = engine_config(serving, ref)
    card = ModelCard(
        id=ref.name,
        object="model",
        owned_by="whorl",
        permission=[],
        metadata={"version": ref.version, "max_model_len": serving.chat.max_model_len},
    )
    engine = build_llm_deployment(config, deployment_cls=Engine, bind_kwargs={"serving": serving, "ref": ref})
    names = list(dict.fromkeys([ref.name, args.model, str(ref)]))
    # What is too much is said where it waits for the engine; the ingress itself holds nobody back.
    ingress = ray_serve.deployment(
        Chat, name="Chat", num_replicas=1, max_ongoing_requests=UNBOUNDED, logging_config=QUIET
    )
    return ingress.bind({ref.name: engine}, {ref.name: card}, serving, ref, names)
