"""The planner's report as text: Markdown tables that line up on a screen as well."""

from __future__ import annotations

from dataclasses import replace

from lib.planner import activations, timing
from lib.planner.hardware import USABLE
from lib.planner.layouts import Candidate, Estimate, Judged, Report, fits
from lib.planner.memory import GIB, Layout, load

OFFLOADS = {"none": "", "optimizer": "optimiser", "all": "optimiser, parameters"}


def render(report: Report) -> str:
    """The whole report: model, memory, what fits where, times, recommendation."""
    blocks = [_head(report)]
    on_gpus = [j for j in report.judged if j.accelerator.gpu]
    here = [j for j in report.judged if not j.accelerator.gpu]
    if on_gpus:
        blocks.append(_memory(report, on_gpus, f"GPUs, {report.settings.plan.workers_per_host} to a host"))
    for judged in here:
        total = judged.accelerator.memory / GIB
        blocks.append(_memory(report, [judged], f"this machine, {total:.1f} GiB, without a GPU"))
    blocks.extend(_times(report, judged) for judged in report.judged if judged.estimates)
    blocks.append(_recommendations(report))
    return "\n\n".join(blocks)


def _head(report: Report) -> str:
    model, settings = report.model, report.settings
    wanted, training = settings.plan, settings.training
    example = report.judged[0].candidates[0].layout if report.judged[0].candidates else Layout(0)
    head = f"{model.vocabulary:,} entries of the vocabulary" if model.vocabulary_head else "a few classes"
    lines = [
        f"{model.name}: {model.parameters:,} parameters"
        + (f", {wanted.trainable:.2%} of them trained" if wanted.trainable < 1 else "")
        + f", {model.layers} layers of width {model.width:,}, output over {head}",
        f"a micro-batch of {example.tokens:,} tokens in sequences of {example.sequence:,}, "
        f"{training.accumulation} to a step, in {example.precision}",
        _activations(report, example),
        f"assumed: {wanted.mfu:.0%} of the peak (MFU), {wanted.network_gb_s:g} GB/s between hosts of "
        f"{wanted.host_memory_gib:,g} GiB, {wanted.storage_gb_s:g} GB/s to storage, {USABLE:.0%} of a memory usable",
    ]
    if report.tokens is None:
        lines.append("training tokens: not known before python -m jobs.preprocess; plan.tokens gives them")
    else:
        steps = f", {training.max_steps:,} steps at most" if training.max_steps else ""
        lines.append(f"training tokens: {report.tokens:,} in an epoch, epochs: {training.epochs}{steps}")
    return "\n".join(lines)


def _activations(report: Report, example: Layout) -> str:
    model = report.model
    sizes = [
        activations.forward(
            model, example.tokens, example.sequence, example.p, checkpointing=c, fused=example.fused
        )
        for c in (False, True)
    ]
    scores = activations.logits(model, example.tokens, example.p)
    return (
        f"the same in every layout: activations {gib(sizes[0])} GiB, {gib(sizes[1])} with checkpointing"
        + (f"; logits {gib(scores)}" if scores else "")
    )


def _memory(report: Report, judged: list[Judged], title: str) -> str:
    """Parts of one worker at their largest, peaks, and what fits."""
    gpu = judged[0].accelerator.gpu
    head = ["workers", "ZeRO", *(["offload"] if gpu else []), "parameters", "gradients", "master", "moments"]
    head += ["fp32 gradients", "gathered", "buffers", "GPU" if gpu else "worker", "checkpointed", "in"]
    head += ["host", "load", "zero.Init", *(j.accelerator.name for j in judged)]
    host = report.settings.plan.host_memory_gib * GIB
    rows = []
    for number, candidate in enumerate(judged[0].candidates):
        used, small, layout = candidate.plain, candidate.recomputed, candidate.layout
        parts = ("parameters", "gradients", "master", "moments", "fp32 gradients", "gathered", "buffers")
        row = [str(layout.workers), str(layout.zero_stage), *([OFFLOADS[layout.offload]] if gpu else [])]
        row += [gib(used.part(name)) for name in parts]
        row += [gib(used.device), gib(small.device), used.peak.name, gib(used.host_running)]
        row += _loads(report, candidate)
        row += [_fit(j.candidates[number], j, host) for j in judged]
        rows.append(row)
    note = "fits: yes, with checkpointing (ckpt), or not (-)"
    return f"Memory in GiB on {title}; parts at their largest, peaks by phase. {note}\n\n{table(head, rows)}"


def _loads(report: Report, candidate: Candidate) -> list[str]:
    """The host's load peak: every rank with the whole model, and with zero.Init."""
    layout, model = candidate.layout, report.model
    whole = layout.on_host * load(model, replace(layout, zero_init=False))
    if layout.zero_stage < 3:
        return [gib(whole), ""]
    return [gib(whole), gib(layout.on_host * load(model, replace(layout, zero_init=True)))]


def _fit(candidate: Candidate, judged: Judged, host: float) -> str:
    if fits(candidate.plain, judged.accelerator, host):
        return "yes"
    return "ckpt" if fits(candidate.recomputed, judged.accelerator, host) else "-"


def _times(report: Report, judged: Judged) -> str:
    accelerator = judged.accelerator
    if judged.estimates[0].step is None:
        return f"Times on {accelerator.name}: not known; --plan.measure true measures this machine for some seconds"
    head = ["workers", "ZeRO", "offload", "checkpointing", "compute", "communication", "update", "offloading"]
    head += ["step", "tokens/s"]
    price = report.settings.plan.price.get(accelerator.name)
    if report.tokens is not None:
        head += ["steps", "hours", "accelerator hours", *(["cost"] if price is not None else [])]
    head += ["checkpoint GiB", "written in"]
    rows = [_time_row(report, estimate) for estimate in judged.estimates]
    known = f"{accelerator.flops / 1e12:,.4g} TFLOP/s, {accelerator.bandwidth / 1e9:,.0f} GB/s"
    return f"Times in seconds on {accelerator.name} ({known}), where it fits\n\n{table(head, rows)}"


def _time_row(report: Report, estimate: Estimate) -> list[str]:
    one, at = estimate.layout, estimate.step
    assert at is not None  # the caller has looked
    row = [str(one.workers), str(one.zero_stage), OFFLOADS[one.offload], "yes" if one.checkpointing else ""]
    row += [figure(v) for v in (at.compute, at.communication, at.update, at.offload, at.total)]
    row.append(f"{at.tokens_per_second:,.0f}")
    if estimate.run is not None:
        whole = estimate.run
        row += [f"{whole.steps:,}", figure(whole.seconds / 3600), figure(whole.gpu_hours)]
        row += [] if whole.cost is None else [f"{whole.cost:,.2f}"]
    size = timing.checkpoint(report.model, one)
    return [*row, gib(size), figure(size / (report.settings.plan.storage_gb_s * 1e9))]


def _recommendations(report: Report) -> str:
    head = [
        "accelerator",
        "workers",
        "ZeRO",
        "offload",
        "checkpointing",
        "peak GiB",
        "of",
        "hours",
        "cost",
        "why",
    ]
    rows = []
    for judged in report.judged:
        best, total = judged.recommended, judged.accelerator.usable
        if best is None:
            rows.append([judged.accelerator.name, *[""] * 8, judged.reason])
            continue
        one, used = best.layout, best.memory.device if judged.accelerator.gpu else best.memory.host
        run = best.run
        rows.append(
            [
                judged.accelerator.name,
                str(one.workers),
                str(one.zero_stage),
                OFFLOADS[one.offload],
                "yes" if one.checkpointing else "",
                gib(used),
                gib(total),
                "" if run is None else figure(run.seconds / 3600),
                "" if run is None or run.cost is None else f"{run.cost:,.2f}",
                judged.reason,
            ]
        )
    return f"Recommended\n\n{table(head, rows)}"


def gib(value: float) -> str:
    """Bytes in GiB, three figures; empty for nothing."""
    return "" if not value else figure(value / GIB)


def figure(value: float) -> str:
    """A number with three figures, at most two of them after the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table; numbers stand to the right."""
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    columns = [[line[i] for line in body if line[i]] for i in range(len(head))]
    right = [bool(cells) and all(cell[0].isdigit() for cell in cells) for cells in columns]

    def line(cells: list[str]) -> str:
        aligned = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "| " + " | ".join(aligned) + " |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), "| " + " | ".join(rule) + " |", *(line(row) for row in body)])
