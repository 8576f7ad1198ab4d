"""A measured recommender as text and as files: report.json, report.html, baselines.png, predictions.parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from lib import pages
from lib.artifacts import EvalReport
from lib.evaluation import plots
from lib.evaluation.classification import MODEL, Measured
from lib.evaluation.rankings import INDEX
from lib.evaluation.report import PREDICTIONS
from lib.evaluation.text import table

TEMPLATE = Path(__file__).with_name("rankings_report.html.j2")
# Metric → heading, in the order of the columns.
HEADINGS = {
    "hr_10": "HR@10",
    "ndcg_10": "NDCG@10",
    "mrr": "MRR",
    "coverage_10": "coverage",
    "novelty_10": "novelty, bits",
    "popularity_10": "popularity",
    "diversity_10": "diversity",
}
SLICED = {"hr_10": "HR@10", "recall_50": "recall@50", "ndcg_10": "NDCG@10", "mrr": "MRR"}


def systems(report: EvalReport) -> dict[str, dict[str, float]]:
    return {MODEL: report.metrics, **report.baselines}


def render(report: EvalReport) -> str:
    """The whole report as text."""
    headings = {key: heading for key, heading in HEADINGS.items() if key in report.metrics}
    rows = [
        [name, *(f"{figures[key]:.3f}" for key in headings), _ends(report, name)]
        for name, figures in systems(report).items()
    ]
    parts = [
        f"{report.name}, run {report.run}, dataset {report.dataset}: {report.rows:,} next items foretold, each ranked "
        "among the whole catalogue",
        table(["", *headings.values(), f"95% interval of {HEADINGS[report.deciding]}"], rows),
        "\n".join(
            f"{HEADINGS[report.deciding]} above {name}: {value:+.4f} (95% interval {low:+.4f} to {high:+.4f})"
            for name, (value, low, high) in report.differences.items()
        ),
        _served(report),
        _earned(report),
        *(
            table(
                [name, "rows", *SLICED.values()],
                [
                    [value, f"{int(part['rows']):,}", *(f"{part[key]:.3f}" for key in SLICED)]
                    for value, part in values.items()
                ],
            )
            for name, values in report.slices.items()
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _served(report: EvalReport) -> str:
    """How the items of a large catalogue are found, which the figures do not depend on."""
    return f"served through an {report.methods[INDEX]}" if INDEX in report.methods else ""


def _earned(report: EvalReport) -> str:
    if not (said := report.logged):
        return ""
    return (
        f"in the place of what answered {said['requests']:,.0f} logged requests: {said['estimated']:.4f} of the places taken "
        f"(95% interval {said['low']:.4f} to {said['high']:.4f}; {said['matched']:,.0f} of {said['places']:,.0f} places match, "
        f"worth {said['effective']:,.0f}); logged: {said['logged']:.4f}"
    )


def _ends(report: EvalReport, name: str) -> str:
    ends = report.intervals.get(name)
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "not drawn"


def write(measured: Measured, folder: Path) -> None:
    """Fill an empty directory."""
    report = measured.report
    scores = {name: figures[report.deciding] for name, figures in systems(report).items()}
    png = plots.comparison_plot(
        scores, report.intervals, f"{report.name} beside its baselines", HEADINGS[report.deciding]
    )
    (folder / "baselines.png").write_bytes(png)
    pq.write_table(measured.predictions, folder / PREDICTIONS)
    page = pages.render(
        TEMPLATE,
        report=report,
        systems=systems(report),
        headings={key: heading for key, heading in HEADINGS.items() if key in report.metrics},
        sliced=SLICED,
        served=_served(report),
        earned=_earned(report),
        figure=pages.embedded(png),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    report.write(folder)
