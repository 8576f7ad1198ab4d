"""Keys of `serving` (`serve.deploy`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from lib.settings.knowledge import GroundingSettings, named
from lib.settings.sections import Name, Positive, Section


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
    enforce_eager: bool | None = None
    """Skip graph capture and compilation: a quicker start, slower tokens. None: on a CPU, not on GPUs."""
    stream_interval_ms: Annotated[float, Field(ge=0)] = 0
    """How long tokens of a stream are gathered before they are sent; 0 sends each at once."""
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


class EventSettings(Section):
    """What is kept of requests and answers (lib/events.py)."""

    record: bool = True
    """Keep an event of each answer, and take feedback on it."""
    content: bool = True
    """Keep the words too, without personal data; false keeps model, time, tokens and the like alone."""
    max_bytes: Positive = 262_144
    """A request or an answer that is longer is kept without its words."""


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
    max_replicas: Positive = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    max_ongoing_requests: Positive = 64
    max_queued_requests: Annotated[int, Field(ge=-1)] = 256
    """Requests waiting beyond this are answered 503 at once; -1 is no bound."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    tokens_per_batch: Positive = 2048
    """Padded tokens that the engine computes at once."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    """How long a deployment may take until it answers."""
    max_inputs: Positive = 256
    max_chars: Positive = 20_000
    max_body_bytes: Positive = 4_000_000
    access: AccessSettings = AccessSettings()
    events: EventSettings = EventSettings()
    chat: ChatEngineSettings = ChatEngineSettings()
    """The engine of the task `chat`; the keys engine, precision, threads, tokens_per_batch, max_inputs and
    max_chars are those of the other tasks."""
    knowledge: Annotated[GroundingSettings | None, BeforeValidator(named)] = None
    """chat: the index that answers are grounded in, by its name or as a section; None grounds them in nothing."""

    @model_validator(mode="after")
    def _replicas(self) -> ServingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self
