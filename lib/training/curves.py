"""A run's curves as a picture: loss, validation metrics, learning rate, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(summary: dict[str, Any], metric: str, path: Path) -> None:
    """Write a PNG from what the training loop returned."""
    from matplotlib.figure import Figure

    history, validations = summary["history"], summary["validations"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = [r["step"] for r in history]
    losses, scores, rates, speeds = axes.flat
    losses.plot(steps, [r["loss"] for r in history], label="training")
    measured = [v for v in validations if "loss" in v]
    losses.plot([v["step"] for v in measured], [v["loss"] for v in measured], "o-", label="validation")
    losses.set(title="loss", xlabel="step")
    losses.legend()
    for name in sorted({k for v in measured for k in v} - {"step", "epoch", "validation", "loss"}):
        scores.plot([v["step"] for v in measured], [v[name] for v in measured], "o-", label=name)
    if best := summary["best"].get(metric):
        scores.axhline(best, color="grey", linewidth=0.8, linestyle="--")
    scores.set(title="validation", xlabel="step")
    scores.legend()
    rates.plot(steps, [r["learning_rate"] for r in history])
    rates.set(title="learning rate", xlabel="step")
    speeds.plot(steps, [r["tokens_per_second"] for r in history])
    speeds.set(title="tokens per second, all workers", xlabel="step")
    figure.savefig(path, dpi=110)
