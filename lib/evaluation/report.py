"""A measured model as files: report.json, report.html, the figures as PNG, predictions.parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import EvalReport
from lib.evaluation import plots
from lib.evaluation.classification import MODEL, Measured
from lib.evaluation.text import HEADINGS, own_metrics, reports
from lib.pages import embedded, render

TEMPLATE = Path(__file__).with_name("report.html.j2")
PREDICTIONS = "predictions.parquet"


def write(measured: Measured, folder: Path) -> None:
    """Fill an empty directory."""
    drawn: dict[str, bytes] = {}
    for head, one in {"": measured, **measured.others}.items():
        drawn |= {f"{head}-{file}" if head else file: png for file, png in figures(one.report).items()}
        pq.write_table(one.predictions, folder / _predictions(head))
    for file, png in drawn.items():
        (folder / file).write_bytes(png)
    (folder / "report.html").write_text(page(measured.report, drawn), encoding="utf-8")
    measured.report.write(folder)


def read(uri: str) -> Measured:
    """What `write` left in a published directory. Raises StorageError."""
    with storage.local_copy(uri) as folder:
        first, *others = reports(EvalReport.read(str(folder)))
        return Measured(
            first,
            pq.read_table(folder / PREDICTIONS),
            {one.head: Measured(one, pq.read_table(folder / _predictions(one.head))) for one in others},
        )


def _predictions(head: str) -> str:
    """The file of a head; the first's for an empty name."""
    return f"{head}-{PREDICTIONS}" if head else PREDICTIONS


def figures(report: EvalReport) -> dict[str, bytes]:
    """File name → PNG."""
    scores = {MODEL: report.metrics["macro_f1"]}
    scores |= {name: one["macro_f1"] for name, one in report.baselines.items()}
    rows = f"{report.rows:,} test rows"
    return {
        "baselines.png": plots.comparison_plot(
            scores, report.intervals, f"{report.name} beside its baselines"
        ),
        "confusion.png": plots.confusion_plot(
            np.array(report.confusion), report.labels, f"{report.name}: {rows}"
        ),
        "reliability.png": plots.reliability_plot(
            report.calibration,
            report.metrics["calibration_error"],
            f"{report.name}: can its confidence be trusted?",
        ),
    }


def page(report: EvalReport, drawn: dict[str, bytes]) -> str:
    """The report as one self-contained HTML page: figures embedded, nothing loaded from elsewhere."""
    parts = [
        {
            "report": one,
            "own_metrics": own_metrics(one),
            "classifiers": {MODEL: one.metrics, **one.baselines},
            "figures": {
                file.removesuffix(".png"): embedded(png)
                for file, png in drawn.items()
                if _is_of(file, one.head if place else "")
            },
        }
        for place, one in enumerate(reports(report))
    ]
    return render(TEMPLATE, report=report, parts=parts, headings=HEADINGS)


def _is_of(file: str, head: str) -> bool:
    """Whether a figure is of this head; the first's have no head's name."""
    return file.startswith(f"{head}-") if head else "-" not in file
