"""Keys of `serving` (`serve.deploy`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from lib.settings.knowledge import GroundingSettings, named
from lib.settings.recommend import OfferSettings
from lib.settings.redaction import RedactionSettings
from lib.settings.sections import Name, Positive, Section, Share


class ChatEngineSettings(Section):
    """vLLM, which serves the task `chat`: on the CPU, or on GPUs where `serving.gpus_per_replica` is above 0."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: what the model's own config.json says."""
    max_model_len: Positive | None = None
    """Tokens of a prompt and its answer together; None takes what the model was made for."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one worker for keys and values; None: 1 on a CPU, on a GPU what `gpu_memory` leaves."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory for weights and keys and values together."""
    tensor_parallel: Positive = 1
    """Workers that share one replica's layers; on GPUs each takes gpus_per_replica / tensor_parallel of one."""
    max_num_seqs: Positive = 64
    """Sequences that are computed at once."""
    target_tokens: Positive | None = None
    """Tokens of prompts and answers in flight that one of several replicas is to have; None: it goes by requests."""
    enforce_eager: bool | None = None
    """Skip graph capture and compilation: a quicker start, slower tokens. None: on a CPU, not on GPUs."""
    stream_interval_ms: Annotated[float, Field(ge=0)] = 0
    """How long tokens of a stream are gathered before they are sent; 0 sends each at once."""
    adapters: list[str] = []
    """`NAME@champion` or `NAME@VERSION` of models that were trained with LoRA from the same base as `serving.model`: one
    engine holds the base and serves them all, each under its name, and follows their aliases without a restart."""
    max_adapters: Positive = 4
    """Adapters that are computed with at once."""
    max_adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    options: dict[str, Any] = {}
    """Any other of vLLM's engine arguments, such as `{enable_auto_tool_choice: true, tool_call_parser: hermes}`."""
    environment: dict[str, str] = {}
    """Environment variables of the engine's processes."""


class AccessSettings(Section):
    """Who may ask (`python -m serve.keys`)."""

    required: bool = True
    """Without a key nobody is answered, but for health and documentation; false lets everybody in."""
    keys_for_s: Annotated[float, Field(ge=0)] = 30
    """How long a key is believed before the database is asked again: a revoked one may work that long."""
    stale_for_s: Annotated[float, Field(ge=0)] = 3600
    """How long keys that were seen are believed while the database does not answer."""
    redis: Annotated[str, Field(pattern=r"^rediss?://")] | None = None
    """A Redis server that counts what keys use, such as `redis://host:6379/0`, or `rediss://` for TLS; its password is
    WHORL_REDIS_PASSWORD in the cluster's environment. None: an actor of the cluster counts."""

    @field_validator("redis")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url and urlsplit(url).password:
            raise ValueError(
                "holds a password, and configurations are written down; set WHORL_REDIS_PASSWORD instead"
            )
        return url


class EventSettings(Section):
    """What is kept of requests and answers (lib/events.py)."""

    record: bool = True
    """Keep an event of each answer, and take feedback on it."""
    content: bool = True
    """Keep the words too, without personal data; false keeps model, time, tokens and the like alone."""
    redact: RedactionSettings = RedactionSettings()
    """How personal data is taken out of the words; the section is that of `data.redact`."""
    max_bytes: Positive = 262_144
    """A request or an answer that is longer is kept without its words."""
    feedback_waits_s: Annotated[float, Field(ge=0)] = 2
    """How long feedback waits for its answer, which is in the database a moment after it was sent."""


class CanarySettings(Section):
    """A new version's trial beside the one that answers (serve/probation.py)."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the requests that are put to the new version too."""
    requests: Positive = 200
    """So many are compared before it is judged."""
    max_errors: Share = 0.0
    """Share of requests that it does not answer."""
    max_disagreement: Share = 0.2
    """Share of inputs to which it answers something else."""
    max_drift: Share = 0.2
    """Mean distance of the answers: of scores their total variation, of entities Jaccard's."""
    max_latency_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Its time over that of the version that answers."""


class LogSettings(Section):
    """What a replica's log holds (serve/logs.py)."""

    format: Literal["json", "text"] = "json"
    requests: bool = True
    """A line for each request: id, route, status, time, model, tokens. Never what was said."""


class CurationSettings(Section):
    """Which events and feedback become training rows (`jobs.curate`)."""

    application: Name | None = None
    """Whose events; None: the application of this configuration's name."""
    days: Annotated[float, Field(gt=0)] | None = None
    """Only events of the last so many days."""


class ServingSettings(Section):
    """How the champion answers (`serve.deploy`)."""

    model: str | None = None
    """`NAME@champion`, `NAME@VERSION`; None follows the champion of this configuration's name."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    route_prefix: Annotated[str, Field(pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")] = "/"
    """Path under which the application answers; several applications share one port by it."""
    engine: Literal["auto", "torch", "openvino"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Positive | None = None
    """Threads of one replica's engine; None takes the machine's cores."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: the last replica ends too when nothing is asked for, and the first request after that waits for a new one."""
    max_replicas: Positive = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    """Ongoing and waiting requests of one replica: with more there are soon more replicas, up to `max_replicas`."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    """How long a load must last before there are more replicas, or fewer."""
    look_back_s: Annotated[float, Field(gt=0)] = 15
    """Seconds over which the load is averaged."""
    max_ongoing_requests: Positive = 64
    """Requests that a replica works on at once."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = 256
    """Requests waiting for a replica beyond this are answered 503 at once; -1 is no bound."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    tokens_per_batch: Positive = 2048
    """Padded tokens that the engine computes at once."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    """How long a body may take to arrive (408), and then its answer (504); of a stream, until its first part and
    between two."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 120
    """How long a replica that is replaced, or needed no more, may go on with what it has in hand before it is killed."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    """How long a deployment may take until it answers."""
    max_inputs: Positive = 256
    max_chars: Positive = 20_000
    max_body_bytes: Positive = 4_000_000
    access: AccessSettings = AccessSettings()
    events: EventSettings = EventSettings()
    recommend: OfferSettings = OfferSettings()
    canary: CanarySettings | None = None
    """Try a new version on a copy of some requests before it answers; None: it answers as soon as it is loaded. A
    chat model's engine is replaced without a trial."""
    logs: LogSettings = LogSettings()
    traces: str | None = None
    """Of an OpenTelemetry collector, such as http://collector:4318: a span of each request goes there."""
    chat: ChatEngineSettings = ChatEngineSettings()
    """The engine of the task `chat`; the keys engine, precision, threads, tokens_per_batch, max_inputs and
    max_chars are those of the other tasks."""
    knowledge: Annotated[GroundingSettings | None, BeforeValidator(named)] = None
    """chat: the index that answers are grounded in, by its name or as a section; None grounds them in nothing."""

    @field_validator("traces")
    @classmethod
    def _traces(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = urlsplit(value)
        if url.username or url.password:
            raise ValueError(
                "a password has no place here; set OTEL_EXPORTER_OTLP_HEADERS in the environment"
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{value!r} is no collector's address; give one such as http://collector:4318")
        return value

    @model_validator(mode="after")
    def _replicas(self) -> ServingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self
