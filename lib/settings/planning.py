"""Keys of `plan` (`jobs.plan`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from lib.settings.sections import Listed, Positive, Section


class PlanSettings(Section):
    """What `jobs.plan` weighs up, and what it assumes. One value may stand where a list is asked for."""

    architecture: str | None = None
    """A model by name, such as `llama-7b`; None takes the shape of `model.base`."""
    head: Literal["auto", "vocabulary", "classes"] = "auto"
    """What the model ends in; auto: the vocabulary for the task `chat` and for a named decoder, else classes."""
    accelerator: Listed[str] = ["this", "t4", "l4", "a10g", "a100-40", "a100-80", "h100", "h200"]
    """Names of accelerators; `this` is the present machine."""
    workers: Listed[Positive] = [1, 2, 4, 8]
    zero_stage: Listed[Literal[0, 1, 2, 3]] = [0, 1, 2, 3]
    offload: Listed[Literal["none", "optimizer", "all"]] = ["none", "optimizer", "all"]
    """What lies in the host's memory: nothing, optimiser states, or in ZeRO-3 parameters too."""
    workers_per_host: Positive = 8
    host_memory_gib: Annotated[float, Field(gt=0)] = 1024
    """Memory of a host that has accelerators."""
    zero_init: bool | None = None
    """In ZeRO-3 each rank reads its own part of the model instead of building all of it; None: as in `training`."""
    sequence: Positive | None = None
    """Tokens in a sequence; None takes `model.max_length`."""
    tokens: Positive | None = None
    """Training tokens in one epoch; None takes those of the dataset."""
    trainable: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the parameters that is trained, where neither `training.adapter` nor `training.layers` says so."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Model FLOPs utilisation: the share of the peak that training reaches."""
    network_gb_s: Annotated[float, Field(gt=0)] = 50
    """Gigabytes a second between two hosts."""
    storage_gb_s: Annotated[float, Field(gt=0)] = 1
    """Gigabytes a second that all workers together write to storage."""
    price: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Accelerator → price of one for an hour."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Recommend only what ends by then."""
    measure: bool = False
    """Measure this machine's matrix products and memory for some seconds, so that its times can be told."""
    emit: Literal["tables", "k8s"] = "tables"
    """What is printed: the tables, or a RayJob and a RayService in the layout that is recommended for one accelerator."""
