"""Chat over HTTP, as OpenAI's API has it: a registered causal model on vLLM, by Ray Serve's own LLM support.

    python -m serve.deploy --config jobs/configs/support_chat.yaml      # serves the champion

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="support", messages=[{"role": "user", "content": "…"}], stream=True)

Two deployments. `Chat`, the ingress, checks a request and turns every mistake into OpenAI's form of an error;
`Engine` holds one version's vLLM and its processes. With `serving.knowledge` the ingress grounds a conversation in an
index first, and answers bear `citations`: the whole answer, or the part of a stream that ends it. Another champion is
another argument of both, so that `serve.deploy` replaces them, replica by replica: with one, nobody is answered until
the new engine has started. When it does not start, what ran before is deployed again.
"""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from ray import serve as ray_serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    ModelCard,
    ModelList,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress.ingress import _sanitize_chat_completion_request
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.exceptions import GenerationError, VLLMClientError
from vllm.sampling_params import SamplingParams

from lib import registry
from lib.artifacts import ModelRef, TaskFile, check_model_directory
from lib.errors import ConfigError, ResourceError
from lib.registry import parse_reference
from lib.settings import ServingSettings
from lib.settings.sections import Positive
from lib.vllm_engine import engine_arguments, engine_name, environment, on_gpu, worker_bundle
from serve import logs
from serve.access import guard
from serve.adapters import BASE, Adapters, Names, adapter_arguments, base_of
from serve.admission import admit
from serve.chat_forms import check, engine_error, formed, narrowed_by, refused, unanswerable
from serve.grounding import Grounding
from serve.http import STARTING, Ready, UnknownError, create_app, request_id
from serve.observing import observe
from serve.recording import record
from serve.scaling import TOKENS, UNBOUNDED, ingresses, size
from serve.usage import Usage

logger = logging.getLogger("ray.serve")


class Arguments(ServingSettings):
    """What `serve deploy` reads from a file: the configuration's `serving`, and the version."""

    version: Positive | None = None
    """Of the model that `model` names; None resolves its alias when the application is built."""


class FullError(ResourceError):
    code = "overloaded"


class StartingError(ResourceError):
    code = STARTING


class Engine(LLMServer):
    """A replica: one version's vLLM engine."""

    # Ray Serve awaits a replica's `__init__`.
    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, serving: ServingSettings, ref: ModelRef | None
    ) -> None:
        refs = [ref] if ref else await asyncio.to_thread(served_refs, serving)
        # The engine's workers read the files while it starts, all of them on this replica's machine or on a
        # file system that their machines share.
        with ExitStack() as files:
            folder = await asyncio.to_thread(files.enter_context, registry.open_version(refs[0]))
            check_model_directory(folder)
            TaskFile.read(folder, "chat")
            base = await asyncio.to_thread(base_of, refs) if serving.chat.adapters else None
            await super().__init__(engine_config(serving, refs[0], folder, base))
            self._adapters = Adapters(self.engine) if serving.chat.adapters else None
            if self._adapters is not None:
                for one in refs:
                    await self._adapters.ensure(str(one))
            await self._warm_up()
        logger.info("serving %s", ", ".join(map(str, refs)))

    async def _warm_up(self) -> None:
        """Draw a token: vLLM compiles what draws one when it first does, and on a CPU somebody would wait for that."""
        drawn = SamplingParams(max_tokens=1, temperature=1.0)
        async for _ in self.engine._engine_client.generate({"prompt_token_ids": [0]}, drawn, "warm-up"):
            pass

    async def _run_request(self, request: Any, **rest: Any) -> Any:
        if self._adapters is not None:
            await self._adapters.ensure(request.model)
        return await super()._run_request(request, **rest)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serve.scaling.ByTokens` goes by; Ray Serve asks for it."""
        states = list(self.engine._engine_client.output_processor.request_states.values())
        written = (state.detokenizer.num_output_tokens() for state in states if state.detokenizer)
        return {TOKENS: float(sum(state.prompt_len for state in states) + sum(written))}

    async def __del__(self) -> None:
        # Ray Serve's own leaves the engine's processes to the interpreter's end, which a killed one has not.
        await super().__del__()
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()


# A part of a stream, as OpenAPI 3.2 has server-sent events: `data` is JSON, and [DONE] at the end.
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}


@ray_serve.ingress()
class Chat(OpenAiIngress):
    """The ingress: OpenAI's routes in front of the engine's replicas."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle],
        model_cards: dict[str, ModelCard],
        serving: ServingSettings,
        ref: ModelRef | None,
        names: list[str],
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._serving = serving
        self._ref = ref
        """None where adapters are served, whose versions change."""
        self._adapters = None if ref else Names(references(serving), served_refs(serving))
        self._names = self._adapters.all() if self._adapters else names
        """What a request may call the model; the first is the one that answers bear."""
        knowledge, length = serving.knowledge, serving.chat.max_model_len
        self._grounding = Grounding.of(knowledge, self._first(), length) if knowledge else None
        (handle,) = llm_deployments.values()
        self._engines = handle.options()  # which lets it learn of replicas before the first request comes

    def ready(self) -> Ready:
        # This deployment is up long before the engine. Where none may be up, one is started for who asks.
        if self._serving.min_replicas and not self._engines.running_replicas_populated():
            raise StartingError("the engine is starting")
        ref = self._first()
        return Ready(model=ref.name, version=ref.version, engine=engine_name(self._serving))

    def _first(self) -> ModelRef:
        """The version that a request without a model gets."""
        found = self._adapters.find(None) if self._adapters else self._ref
        assert found is not None
        return found

    async def models(self) -> ModelList:
        (card,) = self._model_cards.values()
        return ModelList(data=[card.model_copy(update={"id": name}) for name in self._names])

    async def model_data(self, model: str) -> ModelCard:
        card: ModelCard = self._model_cards[await self._get_model_id(model)]
        return card.model_copy(update={"id": model})

    async def _get_model_id(self, model: str | None) -> str:
        """The deployment's name, of which there is one."""
        self._meant(model)
        (name,) = self._model_cards
        return str(name)

    def _meant(self, model: str | None) -> tuple[str, str]:
        """What the engine calls the model that a request names, and which version that is."""
        if self._adapters is not None:
            found = self._adapters.find(model)
            if found is not None:
                return str(found), str(found)
            if model == BASE:
                return BASE, BASE
        elif self._ref is not None and (model is None or model in self._names):
            return self._ref.name, str(self._ref)
        raise UnknownError(
            f"no model {model!r} here (there are: {', '.join(self._names)})",
            param="model",
            code="model_not_found",
        )

    async def chat(
        self,
        body: Annotated[ChatCompletionRequest, formed(ChatCompletionRequest)],
        request: Request,
    ) -> Response:
        check(body)
        if self._grounding is not None:
            body.model, request.state.model = self._meant(body.model)
            body = _sanitize_chat_completion_request(body)
            limit = body.max_completion_tokens or body.max_tokens
            grounded = await self._grounding.ground(body.messages, limit)
            if grounded.answer is not None:
                return said(grounded.answer, body)
            body.messages, request.state.citations = grounded.messages, grounded.citations
        response: Response = await super().chat(body, request)
        return response

    async def completions(
        self, body: Annotated[CompletionRequest, formed(CompletionRequest)], request: Request
    ) -> Response:
        check(body)
        response: Response = await super().completions(body, request)
        return response

    async def _get_response(
        self, *, body: Any, raw_request: Request | None = None, **rest: Any
    ) -> AsyncIterator[Any]:
        body.model, version = self._meant(body.model)
        options = getattr(body, "stream_options", None)
        usage = Usage(
            asked=bool(options and options.include_usage),
            each=bool(options and options.include_usage and options.continuous_usage_stats),
        )
        if body.stream:
            # What a key is charged for, also when its client breaks off.
            body.stream_options = StreamOptions(include_usage=True, continuous_usage_stats=True)
        state = raw_request.state if raw_request is not None else SimpleNamespace()
        state.model = version
        try:
            async for part in super()._get_response(body=body, raw_request=raw_request, **rest):
                parts = part if isinstance(part, list) else [part]
                citations = getattr(state, "citations", None)
                shown = [
                    with_citations(seen, citations)
                    for one in parts
                    if (seen := usage.passed(one)) is not None
                ]
                state.tokens = usage.tokens
                if shown:
                    yield shown if isinstance(part, list) else shown[0]
        except GenerationError as error:
            if param := narrowed_by(body):
                raise unanswerable(param) from error
            raise
        except BackPressureError as error:
            # Ray Serve has a handler of its own for these two, which answers in plain text.
            raise FullError("too many requests are waiting; try again") from error
        except DeploymentUnavailableError as error:
            raise FullError("no engine is up; try again") from error

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(
            "Whorl chat",
            "OpenAI's chat and completions, by a model that was fine-tuned on your data.",
            self,
        )
        app.add_exception_handler(OpenAIHTTPException, engine_error)
        app.add_exception_handler(VLLMClientError, refused)
        stream = {"text/event-stream": {"schema": EVENT}}
        ask: dict[str, Any] = {
            "tags": ["chat"],
            "dependencies": [Depends(request_id)],
            "responses": {200: {"description": "The answer, or with `stream` its parts", "content": stream}},
        }
        app.post("/v1/chat/completions", summary="Continue a conversation", **ask)(self.chat)
        app.post("/v1/completions", summary="Continue a text", **ask)(self.completions)
        app.get("/v1/models", tags=["models"], summary="Names of the model")(self.models)
        app.get("/v1/models/{model:path}", tags=["models"], summary="One of them")(self.model_data)
        # Places are the engine's, of all its replicas; Ray Serve tells when there is none.
        admit(app, self._serving)
        record(app, self._serving.events)
        guard(app, self._serving.access)
        observe(app, self, self._serving)
        return app


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


def references(serving: ServingSettings) -> list[str]:
    """What is served as adapters, the first being `serving.model`."""
    assert serving.model is not None
    return list(dict.fromkeys([serving.model, *serving.chat.adapters]))


def served_refs(serving: ServingSettings) -> list[ModelRef]:
    """What these references mean now. Raises ConfigError, RegistryError."""
    return [registry.resolve(*parse_reference(reference)) for reference in references(serving)]


def engine_config(
    serving: ServingSettings, ref: ModelRef, folder: Path | None = None, base: Path | None = None
) -> LLMConfig:
    """Ray Serve's configuration of the engine; without a folder, what the deployment alone needs.

    With `base` its weights are the base's, to which adapters are added, and the rest is the version's in `folder`.

    Raises ConfigError for GPUs that cannot be divided among the workers.
    """
    return LLMConfig(
        model_loading_config={
            "model_id": BASE if serving.chat.adapters else ref.name,
            "model_source": str(base or folder or ref.name),
        },
        accelerator_config={"kind": "gpu" if on_gpu(serving) else "cpu"},
        placement_group_config={"bundle_per_worker": worker_bundle(serving)},
        engine_kwargs=adapter_arguments(serving.chat, folder) | engine_arguments(serving),
        experimental_configs={"stream_batching_interval_ms": serving.chat.stream_interval_ms},
        runtime_env={"env_vars": environment(serving)},
        deployment_config={
            **size(serving, serving.chat.target_tokens),
            "max_ongoing_requests": serving.max_ongoing_requests,
            "max_queued_requests": serving.max_queued_requests,
            # The first worker's bundle holds the replica too.
            "ray_actor_options": {"num_cpus": 0},
            "logging_config": logs.config(serving.logs).model_dump(),
        },
    )


def application(args: Arguments) -> ray_serve.Application:
    """Builder for `serve deploy`: `args` in the file are the keys of the configuration's `serving`, `model` at least."""
    if args.model is None:
        raise ConfigError("args.model is missing, such as support@champion")
    name, version = parse_reference(args.model)
    ref = ModelRef(name, args.version) if args.version else registry.resolve(name, version)
    serving = ServingSettings.model_validate(args.model_dump(exclude={"version"}))
    config = engine_config(serving, ref)
    # Adapters' versions are no arguments: another one must not start the engine anew.
    fixed = None if serving.chat.adapters else ref
    card = ModelCard(
        id=ref.name,
        object="model",
        owned_by="whorl",
        permission=[],
        metadata={"version": fixed and fixed.version, "max_model_len": serving.chat.max_model_len},
    )
    engine = build_llm_deployment(
        config, deployment_cls=Engine, bind_kwargs={"serving": serving, "ref": fixed}
    )
    names = list(dict.fromkeys([ref.name, args.model, str(ref)]))
    # What is too much is said where it waits for the engine; the ingress itself holds nobody back.
    ingress = ray_serve.deployment(
        Chat,
        name="Chat",
        num_replicas=ingresses(serving),
        graceful_shutdown_timeout_s=serving.drain_timeout_s,
        max_ongoing_requests=UNBOUNDED,
        logging_config=logs.config(serving.logs),
    )
    return ingress.bind({ref.name: engine}, {ref.name: card}, serving, fixed, names)
