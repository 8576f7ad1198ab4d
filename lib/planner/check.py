"""What this machine can never hold is refused before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lib.errors import ResourceError
from lib.planner import hardware, layouts, memory
from lib.planner.architecture import Architecture
from lib.planner.hardware import Accelerator
from lib.planner.memory import GIB, Layout, Memory
from lib.settings import Settings

# Parts by the name that a user knows them by.
SHOWN = {
    "parameters": "parameters",
    "gradients": "gradients",
    "master": "fp32 weights",
    "moments": "optimiser moments",
    "fp32 gradients": "fp32 gradients",
    "activations": "activations",
    "logits": "logits",
    "gathered": "gathered parameters",
    "buffers": "buffers",
    "heap": "heap of the loaded model",
    "libraries": "libraries",
}


def check(settings: Settings, machine: Accelerator | None = None) -> Memory:
    """The memory of the layout that `jobs.finetune` would train in; `machine` is this one unless given.

    Compared is all the machine has, not what is free at the moment: refused is only what can never run.
    Raises ResourceError, in one line, when it takes more; ModelError for a base model that cannot be read.
    """
    machine = machine or hardware.this_machine(on_gpu=settings.training.gpus_per_worker > 0)
    model = layouts.base_shape(settings)
    used = memory.plan(model, layouts.layout(model, settings, gpu=machine.gpu))
    if _needed(used) > machine.memory:
        raise ResourceError(_refusal(model, used, machine))
    return used


def _needed(used: Memory) -> int:
    return used.device if used.layout.gpu else used.host


def _refusal(model: Architecture, used: Memory, machine: Accelerator) -> str:
    layout, needed = used.layout, _needed(used)
    largest = sorted(used.peak.device.items(), key=lambda part: -part[1])[:3]
    why = ", ".join(f"{SHOWN[name]} {size / GIB:.1f}" for name, size in largest)
    if not layout.gpu and needed > used.host_running and not (layout.zero_init and layout.zero_stage == 3):
        why = f"each builds the whole model in fp32: {used.load / GIB:.1f}"
    elif not layout.gpu:
        why = f"each {used.device / GIB:,.1f}: {why}"
    where = "on each GPU" if layout.gpu else f"for {layout.workers} workers on this machine"
    mends = [f"{key} {value}" for key, value in _mends(model, layout, machine)]
    return (
        f"training would take {needed / GIB:,.1f} GiB {where} ({why}) of {machine.memory / GIB:,.1f} GiB; "
        + (
            f"{' or '.join(mends)} would fit"
            if mends
            else "no training.zero_stage, workers or batch fits: take a smaller base model"
        )
        + ", training.ignore_plan true tries it all the same"
    )


def _mends(model: Architecture, layout: Layout, machine: Accelerator) -> Iterator[tuple[str, int | str]]:
    """Of each key that could be changed alone, the nearest value that fits."""

    def fits(**changed: Any) -> bool:
        return _needed(memory.plan(model, replace(layout, **changed))) <= machine.memory

    for stage in range(layout.zero_stage + 1, 4):
        if fits(zero_stage=stage):
            yield "training.zero_stage", stage
            break
    if not layout.gpu:  # another GPU takes nothing away from this one
        for workers in range(layout.workers - 1, 0, -1):
            if fits(workers=workers, workers_per_host=workers):
                yield "training.workers", workers
                break
    if not layout.checkpointing and fits(checkpointing=True):
        yield "training.gradient_checkpointing", "true"
    tokens = layout.tokens // 2
    while tokens >= layout.sequence:
        if fits(tokens=tokens):
            yield "training.tokens_per_batch", tokens
            break
        tokens //= 2
