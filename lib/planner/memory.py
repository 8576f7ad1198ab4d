"""Bytes on each GPU and host, by part and by phase: what DeepSpeed 0.19 allocates for our configuration of it.

Read from deepspeed/runtime (zero/stage_1_and_2.py, zero/stage3.py, zero/partitioned_param_coordinator.py,
fp16/unfused_optimizer.py, engine.py) and from `lib.training.zero`: a bf16 or fp16 model whose gradients
accumulate in its own type, torch's AdamW, no overlap but in ZeRO-2 on GPUs. For Ψ parameters on N workers,
bytes for each parameter while the optimiser steps:

    part                         ZeRO-0   ZeRO-1   ZeRO-2   ZeRO-3
    parameters, 16-bit           2        2        2        2/N
    gradients, 16-bit            2        2/N      2/N      2/N      (ZeRO-1 holds all 2 until they are reduced)
    fp32 master weights          4        4/N      4/N      4/N
    Adam's two moments, fp32     8        8/N      8/N      8/N
    gradients in fp32            4        4/N      4/N      4/N      (ZeRO-3: of one group of 1e9 at a time)
    their flattened copy         -        2/N      2/N      2/N

DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_…`) give the same rows but
for the last, and in ZeRO-3 without 16-bit gradients, for which 0.19 keeps a buffer all the time. They know
neither buckets nor activations nor the parameters that ZeRO-3 keeps gathered, which are here.

In fp32 parameters and gradients take 4 bytes; ZeRO-0 then has no copies, ZeRO-1 to 3 still copy their part.

Without a GPU what counts is what the process holds. glibc keeps freed blocks of less than 32 MiB for what comes
next instead of giving them back, so the fp32 model that was loaded stays as `heap`, once its tensors have moved
into the large flat buffers of ZeRO-1 to 3, as far as activations do not fill it again.

Not every part is there at once, so a peak is the largest phase, not the sum of all parts:

    forward      the forward pass has ended: activations and logits
    reduce       the first bucket of gradients is full, or the last
    step         the optimiser: fp32 gradients
    gather       gloo's copy while ZeRO-1 and 2 gather updated parameters (on a CPU)
    validate     a forward pass over larger batches, without gradients
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lib.planner import activations
from lib.planner.architecture import Architecture

Offload = Literal["none", "optimizer", "all"]
Parts = dict[str, int]

GIB = 2**30
PARTS = (
    "parameters",
    "gradients",
    "master",
    "moments",
    "fp32 gradients",
    "activations",
    "logits",
    "gathered",
    "buffers",
    "slack",
    "heap",
    "libraries",
)
# `lib.training.zero.config` asks for buckets of the model's size, and of this many elements at most.
LARGEST_BUCKET = 200_000_000
# DeepSpeed's defaults, which our configuration leaves: elements that ZeRO-0 reduces at once, of one step's group
# in ZeRO-3, gathered ahead of their use, and between two uses of a parameter that is kept meanwhile.
REDUCE_AT_ONCE = 500_000_000
STEP_GROUP = 1_000_000_000
PREFETCH = 50_000_000
REUSE = 1_000_000_000
# The factor by which DeepSpeed's estimators enlarge what is pinned on the host.
PINNED = 1.5
# Of one worker, before it has a model: torch, transformers, DeepSpeed and Ray in its process, and
# a CUDA context with NCCL's buffers on its GPU (an assumption: 0.5 GiB and as much again).
HOST_LIBRARIES = int(0.75 * GIB)
GPU_LIBRARIES = 1 * GIB
# `lib.training.loop` validates in batches of this many times the training batch's tokens.
VALIDATION_BATCH = 4


@dataclass(frozen=True)
class Layout:
    """How a model is trained."""

    zero_stage: int
    workers: int = 1
    workers_per_host: int = 8
    offload: Offload = "none"
    """What lies on the host instead of the GPU: nothing, optimiser states, or parameters too (ZeRO-3 only)."""
    precision: str = "bf16"
    checkpointing: bool = False
    tokens: int = 2048
    """In one micro-batch of one worker."""
    sequence: int = 256
    """Tokens of one sequence, which attention spans."""
    accumulation: int = 1
    gpu: bool = True
    """Trains on GPUs; else the host's memory holds everything."""
    zero_init: bool = False
    """Each rank reads its own part of the model; else each builds the whole model in fp32 first."""
    fused: bool = True
    """Attention keeps no matrix of scores."""
    trainable: float = 1.0
    """Share of the parameters that is trained."""

    @property
    def p(self) -> int:
        """Bytes of a parameter."""
        return 4 if self.precision == "fp32" else 2

    @property
    def on_host(self) -> int:
        """Workers on the fullest host."""
        return min(self.workers, self.workers_per_host)


@dataclass(frozen=True)
class Phase:
    """Bytes of one worker while one thing happens."""

    name: str
    device: Parts
    """Where the model computes: on its GPU, or on the host when there is none."""
    host: Parts
    """What an offload keeps on the host."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one layout takes."""

    layout: Layout
    phases: tuple[Phase, ...]
    load: int
    """Of one worker on the host while the model is read, libraries included."""

    @property
    def peak(self) -> Phase:
        """The phase in which the device holds most."""
        return max(self.phases, key=lambda phase: sum(phase.device.values()))

    @property
    def device(self) -> int:
        """Bytes on one GPU at the peak; of one worker where there is none."""
        return sum(self.peak.device.values())

    @property
    def host(self) -> int:
        """Bytes of all workers of one host at their peak, the load included."""
        return max(self.host_running, self.layout.on_host * self.load)

    @property
    def host_running(self) -> int:
        """Bytes of all workers of one host while they train."""
        offloaded = max(sum(phase.host.values()) for phase in self.phases)
        # Without a GPU both are one memory.
        each = offloaded + (HOST_LIBRARIES if self.layout.gpu else self.device)
        return self.layout.on_host * each

    def part(self, name: str) -> int:
        """The most that one part takes of the device in any phase."""
        return max(phase.device.get(name, 0) for phase in self.phases)


def plan(model: Architecture, layout: Layout) -> Memory:
    """The memory of a layout.

    Raises ValueError for parameters offloaded outside ZeRO-3, or states offloaded in ZeRO-0: DeepSpeed
    has no such thing.
    """
    if layout.offload == "all" and layout.zero_stage < 3:
        raise ValueError("parameters are offloaded in ZeRO-3 only")
    if layout.offload != "none" and layout.zero_stage == 0:
        raise ValueError("ZeRO-0 offloads nothing")
    phases = tuple(_phases(model, layout))
    return Memory(layout, phases, load(model, layout))


def load(model: Architecture, layout: Layout) -> int:
    """Bytes of one worker on the host while the model is built.

    Whole: every rank holds it in fp32, as `lib.training.loop` builds it. With zero.Init a rank holds the
    largest module in fp32 (DeepSpeed's estimator says so too), and, without a GPU or with offloaded
    parameters, its own part. Where the host is the device the module is there twice: gathered, and as it is put together.
    """
    if not (layout.zero_init and layout.zero_stage == 3):
        return 4 * model.parameters + HOST_LIBRARIES
    own = 0 if layout.gpu and layout.offload != "all" else layout.p * -(-model.parameters // layout.workers)
    return (4 if layout.gpu else 8) * model.largest + own + HOST_LIBRARIES


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements that the phases share."""

    trained: int
    own: int
    """Trained parameters whose optimiser state this worker keeps."""
    bucket: int
    full: float
    """Share of the gradients that is there when the first bucket is full."""


def sizes(model: Architecture, layout: Layout) -> Sizes:
    trained = math.ceil(model.parameters * layout.trainable)
    own = trained if layout.zero_stage == 0 else -(-trained // layout.workers)
    bucket = min(-(-model.parameters // 1024) * 1024, LARGEST_BUCKET)
    return Sizes(trained, own, bucket, min(1.0, bucket / trained))


def states(model: Architecture, layout: Layout) -> tuple[Parts, Parts]:
    """Parameters, master weights and moments: what a worker keeps all the time on its device and on the host."""
    p, size = layout.p, sizes(model, layout)
    parameters = p * (-(-model.parameters // layout.workers) if layout.zero_stage == 3 else model.parameters)
    copied = p < 4 or layout.zero_stage > 0
    optimizer = {"master": 4 * size.own if copied else 0, "moments": 8 * size.own}
    device, host = {"parameters": parameters}, dict[str, int]()
    if layout.offload == "none":
        device |= optimizer
    else:
        # The gradients that the CPU's Adam reads, in fp32, and those that accumulate in the model's type.
        host |= optimizer | {"fp32 gradients": 4 * size.own, "gradients": p * size.own}
        if layout.zero_stage < 3:  # updated parameters on their way back, and one gradient on its way in
            host["buffers"] = p * (size.own + model.largest)
    if layout.offload == "all":
        host["parameters"] = device.pop("parameters")
    if host and layout.gpu:  # nothing is pinned without one
        host["slack"] = int((PINNED - 1) * sum(host.values()))
    if layout.zero_stage == 3 and layout.offload == "none":
        device["gradients"] = p * size.own
    device["libraries"] = GPU_LIBRARIES if layout.gpu else HOST_LIBRARIES
    return device, host


def _phases(model: Architecture, layout: Layout) -> Iterator[Phase]:
    device, host = states(model, layout)
    p, size, stage = layout.p, sizes(model, layout), layout.zero_stage

    def phase(name: str, **parts: int) -> Phase:
        names = {part.replace("_", " "): value for part, value in parts.items() if value}
        if not layout.gpu and stage > 0:
            names["heap"] = max(0, 4 * model.small - names.get("activations", 0))
        return Phase(name, {part: device.get(part, 0) + names.get(part, 0) for part in PARTS}, host)

    kept = activations.forward(
        model,
        layout.tokens,
        layout.sequence,
        p,
        checkpointing=layout.checkpointing,
        fused=layout.fused,
        mask=1 if layout.gpu else p,
    )
    # Gradients of earlier micro-batches wait for the step.
    waiting = 0
    if layout.accumulation > 1 and stage < 3 and (layout.offload == "none" or stage < 2):
        waiting = p * (size.own if stage == 2 else size.trained)
    buckets = _buckets(layout, size)
    # A GPU reserves a bucket as a whole when backward begins; on a host its pages come as they fill.
    reserved = p * size.bucket if stage == 3 or (stage > 0 and layout.gpu) else 0
    reserved *= 2 if _overlaps(layout) else 1
    yield phase(
        "forward",
        gradients=waiting,
        activations=kept,
        logits=activations.logits(model, layout.tokens, p),
        gathered=_gathered(model, layout),
        buffers=reserved,
    )
    if stage < 2:
        reduced, at = p * size.trained, 1.0
    else:
        # When all gradients fit into one bucket none has reached its partition yet.
        several = layout.offload == "none" and stage == 2 and size.trained > size.bucket
        reduced, at = p * size.own if several else 0, size.full
    yield phase(
        "reduce",
        gradients=max(reduced, waiting) if stage < 2 else reduced + waiting,
        activations=int(kept * (1 - at)),
        gathered=_gathered(model, layout, 1 - at),
        buffers=buckets,
    )
    yield phase("step", **_step(model, layout, size))
    if not layout.gpu and stage in (1, 2) and layout.workers > 1:
        yield phase("gather", buffers=p * size.trained)
    yield phase(
        "validate",
        activations=activations.inference(model, VALIDATION_BATCH * layout.tokens, p),
        gathered=_gathered(model, layout),
        buffers=p * size.bucket if stage == 3 else 0,
    )


def _buckets(layout: Layout, size: Sizes) -> int:
    """Bytes of the buffers that gradients are reduced in."""
    p, stage = layout.p, layout.zero_stage
    if stage == 0:  # a flattened copy
        return p * min(size.trained, REDUCE_AT_ONCE)
    if stage == 1:  # gradients move into the bucket; beside it stands the copy that is sent
        return p * size.bucket
    # The bucket and the copy that is sent; a second bucket fills meanwhile where both overlap.
    return (3 if _overlaps(layout) else 2) * p * size.bucket


def _overlaps(layout: Layout) -> bool:
    """Whether gradients are reduced while backward goes on, as `lib.training.zero.config` has it."""
    return layout.gpu and layout.zero_stage == 2


def _gathered(model: Architecture, layout: Layout, depth: float = 1.0) -> int:
    """Bytes of the parameters that ZeRO-3 holds whole, after a share `depth` of the forward pass.

    A parameter is kept from its forward to its backward use when fewer than REUSE parameters lie between
    them: the last REUSE / 2 of the model. The largest module and what is gathered ahead come on top. A gather
    fills a flat buffer from which parameters are then copied; gloo has one more of its own.
    """
    if layout.zero_stage < 3:
        return 0
    whole = min(int(min(model.parameters * depth, REUSE / 2) + model.largest + PREFETCH), model.parameters)
    flat = min(max(model.largest, PREFETCH), model.parameters)
    return layout.p * (whole + flat * (1 if layout.gpu else 2))


def _step(model: Architecture, layout: Layout, size: Sizes) -> Parts:
    """What the optimiser's step adds, of the device."""
    p, stage = layout.p, layout.zero_stage
    bucket = p * size.bucket if stage == 3 else 0
    if layout.offload != "none":
        return {"buffers": bucket + p * model.largest}
    if stage == 0:
        return {"gradients": p * size.trained, "fp32_gradients": 4 * size.trained if p < 4 else 0}
    group = min(size.own, STEP_GROUP) if stage == 3 else size.own
    # The flattened copy; in fp32 it is what the optimiser reads.
    parts = {"fp32_gradients": 4 * group, "buffers": bucket + (p * group if p < 4 else 0)}
    return parts if stage == 3 else parts | {"gradients": p * size.own}
