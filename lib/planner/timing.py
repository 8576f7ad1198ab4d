"""How long a step and a run take: a roofline (Williams et al. 2009) with stated assumptions.

Compute is the larger of operations over a stated share of the peak (MFU: model FLOPs utilisation, Chowdhery
et al. 2022; Korthikanti et al. 2022 reach 0.42 to 0.56 on A100s) and bytes over the memory's bandwidth.
Operations of a token (Kaplan et al. 2020): 2·N forward, 2·N for the gradients of activations, 2·N for those
of the trained parameters, 2·N more with recomputation; attention adds 4·layers·width·s forward, half of it
when it sees the past only. N leaves out what is only looked up.

Communication of a worker in one step, ring algorithms, Ψ parameters of p bytes on N workers, each term
times (N − 1) / N: all-reduce 2·p·Ψ, all-gather p·Ψ, reduce-scatter p·Ψ. Rajbhandari et al. 2020 count 2·Ψ
for ZeRO-0 to 2 and 3·Ψ for ZeRO-3. DeepSpeed 0.19 sends more in ZeRO-1 and 2: with
`use_multi_rank_bucket_allreduce`, its default, gradients are all-reduced (2·Ψ) before each worker keeps its
part, and the gather of updated parameters makes it 3·Ψ; and less in ZeRO-3 when parameters stay gathered
between their two uses. ZeRO-2 and 3 reduce after each micro-batch, ZeRO-0 and 1 once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lib.planner import activations, memory
from lib.planner.architecture import Architecture
from lib.planner.hardware import Accelerator
from lib.planner.memory import Layout

# AdamW reads and writes master weights and two moments and reads an fp32 gradient; the parameters are written back.
ADAM_BYTES = 2 * 4 + 2 * 8 + 4
# Of a host's memory, for Adam on the CPU: 8 channels of DDR4-3200 at half their 205 GB/s.
HOST_BANDWIDTH = 100e9


@dataclass(frozen=True)
class Rates:
    """What a run is judged by beside its accelerator."""

    mfu: float
    network: float
    """Bytes a second between two hosts."""
    storage: float
    """Bytes a second into the storage root, of all workers together."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step."""

    compute: float
    communication: float
    update: float
    offload: float
    total: float
    tokens: int
    """Of all workers."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def flops(model: Architecture, layout: Layout, tokens: int) -> float:
    """Operations of training on `tokens` tokens: forward, backward, and forward again with checkpointing."""
    passes = 2 + layout.trainable + (1 if layout.checkpointing else 0)
    matrices = 2 * model.multiplied * passes
    # The two products of attention have no weights, so their backward pass is always twice the forward.
    scores = 4 * model.layers * model.heads * model.head_width * layout.sequence / (2 if model.causal else 1)
    return tokens * (matrices + scores * (3 + (1 if layout.checkpointing else 0)))


def volume(model: Architecture, layout: Layout) -> dict[str, float]:
    """Bytes that one worker sends in one optimiser step: `reduce` gradients, `gather` parameters."""
    ring = (layout.workers - 1) / layout.workers
    p, trained = layout.p, math.ceil(model.parameters * layout.trainable)
    match layout.zero_stage:
        case 0:
            sent = {"reduce": 2 * p * trained, "gather": 0}
        case 1:
            sent = {"reduce": 2 * p * trained, "gather": p * trained}
        case 2:
            sent = {"reduce": 2 * p * trained * layout.accumulation, "gather": p * trained}
        case _:
            again = max(0, model.parameters - memory.REUSE // 2)
            sent = {
                "reduce": p * trained * layout.accumulation,
                "gather": p * (model.parameters + again) * layout.accumulation,
            }
    return {name: ring * value for name, value in sent.items()}


def step(model: Architecture, layout: Layout, hardware: Accelerator, rates: Rates) -> Step | None:
    """The time of one optimiser step; None when the hardware's rates are not known."""
    if not hardware.flops:
        return None
    tokens = layout.tokens * layout.accumulation
    shared = 1 if hardware.gpu else layout.on_host  # workers without GPUs share the host's processors
    kept = activations.forward(
        model, layout.tokens, layout.sequence, layout.p, checkpointing=layout.checkpointing
    )
    # Forward and backward read the weights and write their gradients; what is kept is written and read.
    moved = layout.accumulation * (3 * layout.p * model.multiplied + 2 * kept)
    peak = hardware.flops / (2 if layout.p == 4 else 1)  # fp32 products run at half the rate or less
    compute = shared * max(flops(model, layout, tokens) / (rates.mfu * peak), moved / hardware.bandwidth)
    sent = {
        name: value / _bandwidth(layout, hardware, rates) for name, value in volume(model, layout).items()
    }
    if layout.zero_stage == 2 and layout.gpu:  # our configuration overlaps reduction and backward
        communication = max(0.0, sent["reduce"] - compute * 2 / 3) + sent["gather"]
    else:
        communication = sum(sent.values())
    own = memory.sizes(model, layout).own
    offload = 0.0
    if layout.offload == "none":
        update = shared * own * (ADAM_BYTES + layout.p) / hardware.bandwidth
    else:
        update = layout.on_host * own * (ADAM_BYTES + layout.p) / HOST_BANDWIDTH
        offload = _offloaded(model, layout, own) / hardware.pcie
    total = compute + communication + update + offload
    return Step(compute, communication, update, offload, total, tokens * layout.workers)


def _bandwidth(layout: Layout, hardware: Accelerator, rates: Rates) -> float:
    """Bytes a second around the ring: its slowest part decides, and every byte crosses each host's border once."""
    if layout.workers > layout.workers_per_host:
        return min(hardware.link, rates.network)
    return hardware.link


def _offloaded(model: Architecture, layout: Layout, own: int) -> float:
    """Bytes between a GPU and its host in one step: gradients down, parameters up."""
    p, times = layout.p, layout.accumulation
    down = p * own * times
    if layout.offload != "all":
        return down + p * own
    again = max(0, model.parameters - memory.REUSE // 2)
    return down + p * (model.parameters + again) / layout.workers * times


@dataclass(frozen=True)
class Run:
    """A whole training run."""

    steps: int
    seconds: float
    gpu_hours: float
    cost: float | None
    """In the currency of `plan.price`; None without a price."""


def run(one: Step, tokens: int, workers: int, price: float | None) -> Run:
    """A run over `tokens` tokens in all, at `price` for each worker's accelerator and hour."""
    steps = math.ceil(tokens / one.tokens)
    hours = steps * one.total * workers / 3600
    return Run(steps, steps * one.total, hours, None if price is None else hours * price)


def checkpoint(model: Architecture, layout: Layout) -> int:
    """Bytes of a checkpoint that can be resumed: weights, fp32 master weights, two moments.

    Of what is trained: frozen weights are the base model's. ZeRO-3 writes weights as master weights only;
    without a copy there is one set of weights.
    """
    trained = math.ceil(model.parameters * layout.trainable)
    weights = 0 if layout.zero_stage == 3 else layout.p * trained
    copied = layout.p < 4 or layout.zero_stage > 0
    return weights + (4 * trained if copied else 0) + 8 * trained
