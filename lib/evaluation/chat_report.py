"""A measured chat model as files and for the terminal: report.json, report.html, figures, predictions.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from lib import pages
from lib.artifacts import AnswersReport, EvalReport
from lib.direction import gain, lower_is_better
from lib.evaluation.classification import MODEL, Measured
from lib.evaluation.report import PREDICTIONS
from lib.evaluation.text import table

TEMPLATE = Path(__file__).with_name("chat_report.html.j2")
# Metric → heading and how it is shown; the order is that of the tables.
HEADINGS = {
    "perplexity": ("perplexity", "{:.3f}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "ranking_accuracy": ("ranking accuracy", "{:.3f}"),
    "preference_accuracy": ("preference accuracy", "{:.3f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "chrf": ("chrF", "{:.1f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "distinct_1": ("distinct-1", "{:.3f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "repetition": ("repetition", "{:.3f}"),
    "grounded": ("grounded", "{:.3f}"),
    "abstained": ("abstained", "{:.1%}"),
    "refusals": ("refusals", "{:.1%}"),
    "cut": ("cut off", "{:.1%}"),
    "tokens_mean": ("tokens, mean", "{:.1f}"),
    "tokens_p5": ("5th percentile", "{:.0f}"),
    "tokens_median": ("median", "{:.0f}"),
    "tokens_p95": ("95th percentile", "{:.0f}"),
}
# Figures without a better and a worse: a refusal may be right, and how long an answer should be depends.
NEUTRAL = {"refusals", "distinct_1", "distinct_2", *(name for name in HEADINGS if name.startswith("tokens_"))}


def write(measured: Measured, folder: Path) -> None:
    """Fill an empty directory."""
    report = measured.report
    picture = figure(report)
    (folder / "answers.png").write_bytes(picture)
    (folder / "report.html").write_text(page(report, picture), encoding="utf-8")
    pq.write_table(measured.predictions, folder / PREDICTIONS)
    report.write(folder)


def page(report: EvalReport, picture: bytes) -> str:
    """The report as one self-contained HTML page: nothing is loaded from elsewhere."""
    return pages.render(
        TEMPLATE,
        report=report,
        answers=answers_of(report),
        systems={"base": "before", MODEL: "after", "nearest": "nearest"},
        comparison=comparison(report),
        picture=pages.embedded(picture),
        judged=judged(report),
        slices={name: slice_rows(values) for name, values in report.slices.items()},
        lower=lower_is_better,
    )


def answers_of(report: EvalReport) -> AnswersReport:
    """Raises ValueError for a report of another kind."""
    if report.answers is None:
        raise ValueError(f"the report of run {report.run} is not one of answers")
    return report.answers


def measured_metrics(report: EvalReport) -> list[str]:
    return [metric for metric in HEADINGS if metric in report.metrics]


def comparison(report: EvalReport) -> list[list[str]]:
    """A row for each metric: heading, base, model, their difference with its interval, nearest, references."""
    answers, rows = answers_of(report), []
    for metric in measured_metrics(report):
        heading, form = HEADINGS[metric]
        before, after = report.baselines["base"].get(metric), report.metrics[metric]
        near, reference = report.baselines["nearest"].get(metric), answers.reference.get(metric)
        difference = ""
        if before is not None:
            sign = form.replace("{:", "{:+")
            difference = sign.format(after - before)
            ends = answers.differences.get(metric, {}).get("base")
            if ends:
                difference += f" ({sign.format(ends[1])} to {sign.format(ends[2])}){mark(metric, ends)}"
        values = [form.format(value) if value is not None else "" for value in (before, after)]
        others = [form.format(value) if value is not None else "" for value in (near, reference)]
        arrow = "" if metric in NEUTRAL else " ↓" if lower_is_better(metric) else " ↑"
        rows.append([heading + arrow, *values, difference, *others])
    return rows


def mark(metric: str, ends: Sequence[float]) -> str:
    """Whether a difference's interval leaves no doubt, and which way."""
    if metric in NEUTRAL:
        return ""
    gains = [gain(metric, end, 0.0) for end in ends[1:]]
    return " better" if min(gains) > 0 else " worse" if max(gains) < 0 else ""


def slice_rows(values: dict[str, dict[str, float]]) -> list[list[str]]:
    """Value, rows, perplexity before and after, answers, ROUGE-L before and after."""
    return [
        [
            value,
            f"{int(part['rows']):,}",
            *(_shown(part, f"{before}perplexity", "{:.2f}") for before in ("base_", "")),
            f"{int(part['answers']):,}",
            *(_shown(part, f"{before}rouge_l", "{:.3f}") for before in ("base_", "")),
        ]
        for value, part in values.items()
    ]


def _shown(part: dict[str, float], name: str, form: str) -> str:
    return form.format(part[name]) if name in part else ""


def judged(report: EvalReport) -> str:
    """One line on what the judge said; empty without one."""
    said = answers_of(report).judge
    if not said:
        return ""
    if "error" in said:
        return f"the judge gave no verdict: {said['error']}"
    ends = said["interval"]
    between = f" (95% interval {ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
    return (
        f"{said['judge']} prefers the model to its base in {said['win_rate']:.1%} of {said['pairs']} pairs{between}: "
        f"{said['wins']} won, {said['ties']} tied, {said['losses']} lost; both orders agree in "
        f"{said['consistent']:.0%}"
    )


def render(report: EvalReport) -> str:
    """The report as text."""
    answers = answers_of(report)
    parts = [
        f"{report.name}, run {report.run}, dataset {report.dataset}: {report.rows:,} test dialogues with "
        f"{answers.prompts:,} different prompts, "
        f"{answers.tokens:,} answer tokens, {answers.generated:,} answers generated",
        table(["", "before", "after", "difference (95%)", "nearest", "references"], comparison(report)),
        judged(report),
        *(
            table(
                [name, "rows", "perplexity before", "after", "answers", "ROUGE-L before", "after"],
                slice_rows(values),
            )
            for name, values in report.slices.items()
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def figure(report: EvalReport) -> bytes:
    """Perplexity, ROUGE-L and chrF of each system with their intervals, as PNG."""
    answers = answers_of(report)
    drawn = pages.figure(9, 3)
    colours = {"base": pages.GREY, MODEL: pages.BLUE, "nearest": pages.LIGHT}
    for axes, metric in zip(drawn.subplots(1, 3), ("perplexity", "rouge_l", "chrf"), strict=True):
        systems = {
            "base": report.baselines["base"],
            MODEL: report.metrics,
            "nearest": report.baselines["nearest"],
        }
        having = {name: one[metric] for name, one in systems.items() if metric in one}
        axes.bar(
            range(len(having)), list(having.values()), color=[colours[name] for name in having], width=0.6
        )
        for place, (name, value) in enumerate(having.items()):
            ends = answers.intervals.get(metric, {}).get(name)
            if ends:
                # A percentile interval need not enclose the value; a negative error bar is refused.
                errors = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
                axes.errorbar(place, value, yerr=errors, color=pages.INK, capsize=4)
        names = {"base": "before", MODEL: "after", "nearest": "nearest"}
        axes.set_xticks(range(len(having)), [names[name] for name in having])
        axes.set_title(
            f"{HEADINGS[metric][0]} ({'lower' if lower_is_better(metric) else 'higher'} is better)",
            fontsize=10,
        )
    return pages.png(drawn)
