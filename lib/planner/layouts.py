"""Every layout that a configuration allows, which of them fit, what each takes, and which is the cheapest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lib import tracking
from lib.errors import ConfigError, nearest
from lib.planner import architecture, hardware, memory, timing, trained
from lib.planner.architecture import Architecture
from lib.planner.hardware import Accelerator
from lib.planner.memory import GIB, Layout, Memory
from lib.settings import Settings
from lib.tasks import judged


@dataclass(frozen=True)
class Candidate:
    """A layout without and with activation checkpointing."""

    plain: Memory
    recomputed: Memory

    @property
    def layout(self) -> Layout:
        return self.plain.layout


@dataclass(frozen=True)
class Estimate:
    """A layout that fits an accelerator."""

    memory: Memory
    step: timing.Step | None
    """None when the accelerator's rates are not known."""
    run: timing.Run | None
    """None when it is not known how many tokens there are."""

    @property
    def layout(self) -> Layout:
        return self.memory.layout


@dataclass(frozen=True)
class Judged:
    """All layouts on one accelerator."""

    accelerator: Accelerator
    candidates: list[Candidate]
    estimates: list[Estimate]
    """Of those that fit, in the same order."""
    recommended: Estimate | None
    reason: str


@dataclass(frozen=True)
class Report:
    """What `jobs.plan` tells."""

    model: Architecture
    settings: Settings
    tokens: int | None
    """Training tokens in one epoch."""
    judged: list[Judged]


def report(settings: Settings, tokens: int | None) -> Report:
    """Weigh up every layout. `tokens` are the training tokens of one epoch, None when nobody knows.

    Raises ConfigError for an unknown architecture or accelerator, ModelError for a base model that cannot
    be read.
    """
    wanted = settings.plan
    for name in wanted.price:
        if name not in wanted.accelerator:
            raise ConfigError(
                f"plan.price: {name!r} is not among plan.accelerator{nearest(name, wanted.accelerator)} "
                f"({', '.join(wanted.accelerator)})"
            )
    model = shape(settings)
    on_gpu = settings.training.gpus_per_worker > 0
    found = [hardware.accelerator(n, on_gpu=on_gpu, measured=wanted.measure) for n in wanted.accelerator]
    return Report(model, settings, tokens, [_judge(model, settings, tokens, a) for a in found])


def shape(settings: Settings) -> Architecture:
    """The architecture of `plan.architecture`, else that of `model.base`."""
    wanted = settings.plan
    if wanted.architecture:
        model = architecture.named(wanted.architecture)
        return model if wanted.head == "auto" else replace(model, vocabulary_head=wanted.head == "vocabulary")
    return base_shape(settings)


def base_shape(settings: Settings) -> Architecture:
    """The architecture of `model.base`, with the head that the task puts on it."""
    wanted = settings.plan
    vocabulary = wanted.head == "vocabulary" or (wanted.head == "auto" and judged(settings.task) == "answers")
    return architecture.read(settings.model.base, vocabulary, settings.model.dropout)


def layout(model: Architecture, settings: Settings, *, gpu: bool) -> Layout:
    """The layout that `jobs.finetune` trains in."""
    training = settings.training
    sequence = settings.plan.sequence or settings.model.max_length
    precision = training.precision
    if precision == "auto":  # 16 bits on every GPU; which kind makes no difference here
        precision = "bf16" if gpu else tracking.cpu_precision()
    return Layout(
        zero_stage=training.zero_stage,
        # Of a number that follows the cluster, the least must fit.
        workers=training.least_workers,
        workers_per_host=settings.plan.workers_per_host if gpu else training.least_workers,
        precision=precision,
        # A sequence above the budget is a batch of its own.
        tokens=max(training.tokens_per_batch, sequence),
        sequence=sequence,
        accumulation=training.accumulation,
        gpu=gpu,
        # On a CPU encoders take an attention of our own, which writes the scores out (lib/training/dropout.py).
        fused=gpu or model.causal,
        trainable=trained.share(model, settings),
        offload=training.offload,
        checkpointing=training.gradient_checkpointing,
        zero_init=training.zero_init if settings.plan.zero_init is None else settings.plan.zero_init,
    )


def candidates(model: Architecture, settings: Settings, *, gpu: bool) -> Iterator[Candidate]:
    """Every layout of `plan.workers`, `plan.zero_stage` and `plan.offload` that DeepSpeed has."""
    wanted = settings.plan
    base = layout(model, settings, gpu=gpu)
    for workers in sorted(set(wanted.workers)):
        for stage in sorted(set(wanted.zero_stage)):
            for offload in ("none", "optimizer", "all"):
                # Without a GPU there is nowhere to offload from.
                known = offload == "none" or (gpu and stage > 0 and (offload == "optimizer" or stage == 3))
                if offload not in wanted.offload or not known:
                    continue
                one = replace(
                    base,
                    zero_stage=stage,
                    workers=workers,
                    workers_per_host=wanted.workers_per_host if gpu else workers,
                    offload=offload,
                )
                yield Candidate(memory.plan(model, one), memory.plan(model, replace(one, checkpointing=True)))


def fits(used: Memory, accelerator: Accelerator, host: float) -> bool:
    """Whether a layout fits the accelerator and a host of `host` bytes."""
    if not accelerator.gpu:
        return used.host <= accelerator.usable
    return used.device <= accelerator.usable and used.host <= hardware.USABLE * host


def _judge(model: Architecture, settings: Settings, tokens: int | None, accelerator: Accelerator) -> Judged:
    wanted, training = settings.plan, settings.training
    rates = timing.Rates(wanted.mfu, wanted.network_gb_s * 1e9, wanted.storage_gb_s * 1e9)
    host = wanted.host_memory_gib * GIB
    every = list(candidates(model, settings, gpu=accelerator.gpu))
    estimates = []
    for candidate in every:
        # With checkpointing everything takes longer, so only where nothing else fits.
        used = next((m for m in (candidate.plain, candidate.recomputed) if fits(m, accelerator, host)), None)
        if used is None:
            continue
        one = timing.step(model, used.layout, accelerator, rates)
        whole = None
        if one is not None and tokens is not None:
            seen = tokens * training.epochs
            if training.max_steps:
                seen = min(seen, training.max_steps * one.tokens)
            whole = timing.run(one, seen, used.layout.workers, wanted.price.get(accelerator.name))
        estimates.append(Estimate(used, one, whole))
    recommended, reason = _recommend(every, estimates, accelerator, host, wanted.max_hours)
    return Judged(accelerator, every, estimates, recommended, reason)


def _effort(estimate: Estimate) -> tuple[float, ...]:
    """What a layout is ranked by: accelerator-seconds for each token, then simplicity."""
    one, at = estimate.layout, estimate.step
    simple = (one.workers, one.checkpointing, ("none", "optimizer", "all").index(one.offload), one.zero_stage)
    # Without known rates the simplest is all that can be told.
    return (round(one.workers * at.total / at.tokens, 12) if at else 0.0, *simple)


def _recommend(
    every: list[Candidate],
    estimates: list[Estimate],
    accelerator: Accelerator,
    host: float,
    max_hours: float | None,
) -> tuple[Estimate | None, str]:
    if not estimates:
        return None, _why_none(every, accelerator, host)
    ranked = sorted(estimates, key=_effort)
    in_time = [e for e in ranked if not max_hours or not e.run or e.run.seconds <= max_hours * 3600]
    if not in_time:
        fastest = min((e for e in ranked if e.run), key=lambda e: e.run.seconds if e.run else 0.0)
        hours = fastest.run.seconds / 3600 if fastest.run else 0.0
        return (
            None,
            f"none of {len(ranked)} that fit ends within {max_hours:g} h; the fastest takes {hours:,.1f} h",
        )
    best = in_time[0]
    if best.step is None:
        return best, f"the simplest of {len(ranked)} layouts that fit; plan.measure true tells times too"
    why = f"cheapest of {len(in_time)} layouts that fit" + (
        f" and end within {max_hours:g} h" if max_hours else ""
    )
    if len(in_time) > 1 and in_time[1].step:
        more = _effort(in_time[1])[0] / _effort(best)[0] - 1
        why += f"; the next takes {more:.1%} more" if more > 0.0005 else "; the next takes as much"
    return best, why


def _why_none(every: list[Candidate], accelerator: Accelerator, host: float) -> str:
    if not every:
        return "no layout of plan.zero_stage and plan.offload is one that DeepSpeed has"
    if not accelerator.gpu:
        least = min(c.recomputed.host for c in every)
        return f"none fits: the smallest takes {least / GIB:,.1f} GiB of {accelerator.usable / GIB:,.1f} that are usable"
    device = min(c.recomputed.device for c in every)
    if device > accelerator.usable:
        return (
            f"none fits: the smallest takes {device / GIB:,.1f} GiB on a GPU of "
            f"{accelerator.usable / GIB:,.1f} that are usable"
        )
    least = min(c.recomputed.host for c in every if c.recomputed.device <= accelerator.usable)
    return (
        f"none fits: those that fit the GPU take at least {least / GIB:,.1f} GiB of the host's "
        f"{hardware.USABLE * host / GIB:,.1f} that are usable"
    )
