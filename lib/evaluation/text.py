"""A report for the terminal: aligned columns, no colours, fit for a log file."""

from __future__ import annotations

from collections.abc import Sequence

from lib.artifacts import EvalReport

# Metric → heading; the order is the order of the columns.
HEADINGS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "log_loss": "log loss",
    "brier": "Brier",
    "calibration_error": "calibration error",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, all others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:]])


def render(report: EvalReport) -> str:
    """The whole report as text: classifiers side by side, classes, slices; behaviours."""
    parts = [f"{report.name}, run {report.run}, dataset {report.dataset}: {report.rows:,} test rows"]
    for one in reports(report):
        parts += [
            f"━━ {one.head}: {one.rows:,} rows with a label ━━" if one.head else "",
            classifiers(one),
            row_metrics(one),
            leads(one),
            calibration(one),
            classes(one),
            *(slice_table(name, values) for name, values in one.slices.items()),
        ]
    return "\n\n".join(part for part in [*parts, behaviours(report)] if part)


def reports(report: EvalReport) -> list[EvalReport]:
    """One for each head, the first first."""
    return [report, *(EvalReport(**one) for one in report.others.values())]


def calibration(report: EvalReport) -> str:
    """What the temperature did; empty for a model without one."""
    before = report.uncalibrated
    if not before:
        return ""
    changes = [f"{HEADINGS[name]} {value:.3f} → {report.metrics[name]:.3f}" for name, value in before.items()]
    return f"temperature {report.temperature:.2f}, fitted on the validation split: {', '.join(changes)}"


def behaviours(report: EvalReport) -> str:
    """Failure rates; empty where none were asked for."""
    rows = [
        [b["name"], b["kind"], b["what"], f"{b['cases']:,}", f"{b['failure_rate']:.1%}"]
        for b in report.behaviours
    ]
    return table(["behaviour", "kind", "what", "cases", "failures"], rows) if rows else ""


def classifiers(report: EvalReport) -> str:
    """The model and its baselines, one line each."""
    rows = []
    for name, figures in {"model": report.metrics, **report.baselines}.items():
        ends = report.intervals.get(name)
        between = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "not drawn"
        values = [f"{figures[key]:.3f}" for key in HEADINGS]
        rows.append([name, values[0], between, *values[1:]])
    first, *others = HEADINGS.values()
    return table(["", first, "95% interval", *others], rows)


def row_metrics(report: EvalReport) -> str:
    """What only whole rows show, such as entities; empty for a task without."""
    names = own_metrics(report)
    rows = [
        [name, *(f"{figures[key]:.3f}" if key in figures else "" for key in names)]
        for name, figures in {"model": report.metrics, **report.baselines}.items()
    ]
    return table(["", *(key.replace("_", " ") for key in names)], rows) if names else ""


def own_metrics(report: EvalReport) -> list[str]:
    """Metrics of the task alone, beside those that every classifier has."""
    heads = tuple(f"{head}/" for head in (report.head, *report.others) if head)
    return [
        key
        for key in report.metrics
        if key not in HEADINGS and key != "balanced_accuracy" and not key.startswith(heads)
    ]


def leads(report: EvalReport) -> str:
    """How far the model is ahead of each baseline; empty without a bootstrap."""
    return "\n".join(
        f"macro-F1 above {name}: {value:+.3f} (95% interval {low:+.3f} to {high:+.3f})"
        for name, (value, low, high) in report.differences.items()
    )


def classes(report: EvalReport) -> str:
    rows = [
        [label, f"{int(c['rows']):,}", f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}"]
        for label, c in report.per_class.items()
    ]
    return table(["class", "rows", "precision", "recall", "F1"], rows)


def slice_table(name: str, values: dict[str, dict[str, float]]) -> str:
    rows = [
        [value, f"{int(part['rows']):,}", f"{part['macro_f1']:.3f}", f"{part['accuracy']:.3f}"]
        for value, part in values.items()
    ]
    return table([name, "rows", "macro-F1", "accuracy"], rows)
