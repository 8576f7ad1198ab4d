"""A model with several heads, measured: each head as a classifier of its own, on the rows that have its label."""

from __future__ import annotations

from dataclasses import asdict, replace

from lib.evaluation.baselines import Baseline
from lib.evaluation.classification import Measured, Subject, measure
from lib.evaluation.scoring import Scored
from lib.settings import EvaluationSettings


def measure_heads(
    subject: Subject,
    labels: dict[str, list[str]],
    scored: Scored,
    baselines: dict[str, dict[str, Baseline]],
    settings: EvaluationSettings,
) -> Measured:
    """`measure` for each head; `labels` gives those of the dataset, head → labels.

    The report is the first head's, holds the others', and in `metrics` and `baselines` every head's figures as
    `HEAD/METRIC`, so that any of them can decide.
    """
    own = {head: replace(subject, labels=names) for head, names in labels.items()}
    first = measure(own[scored.head], scored, baselines.get(scored.head, {}), settings)
    if not scored.head:
        return first
    others = {
        head: measure(own[head], one, baselines.get(head, {}), settings)
        for head, one in scored.others.items()
    }
    every = {scored.head: first, **others}
    report = replace(
        first.report,
        metrics=first.report.metrics
        | {f"{head}/{m}": v for head, one in every.items() for m, v in one.report.metrics.items()},
        baselines={
            name: figures
            | {
                f"{head}/{m}": v
                for head, one in every.items()
                for m, v in one.report.baselines.get(name, {}).items()
            }
            for name, figures in first.report.baselines.items()
        },
        others={head: asdict(one.report) for head, one in others.items()},
    )
    return Measured(report, first.predictions, others)
