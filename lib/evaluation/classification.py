"""From probabilities to a report: everything that is said about a classifier on one split."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from lib.artifacts import EvalReport
from lib.evaluation import metrics, slices
from lib.evaluation.baselines import Baseline
from lib.evaluation.intervals import bootstrap_macro_f1, interval, mcnemar, p_value
from lib.evaluation.metrics import Floats, Ints
from lib.evaluation.scoring import Scored
from lib.settings import EvaluationSettings
from lib.tasks import load_task

MODEL = "model"
MISTAKES = 20
MISTAKE_CHARS = 600
# Shown on each side of a mistaken word.
CONTEXT_ITEMS = 6
NOT_SLICES = ("id", "text", "label", "length", "row")


@dataclass(frozen=True)
class Measured:
    """A report, and row by row what it rests on."""

    report: EvalReport
    predictions: pa.Table
    """id, label, predicted (class indices), probabilities list<double>; sorted by id."""
    others: dict[str, Measured] = field(default_factory=dict)
    """The other heads."""

    def of(self, metric: str) -> Measured:
        """The head that a metric such as `topic/macro_f1` is about; the first for one without a head's name."""
        return self.others.get(metric.partition("/")[0], self)


@dataclass(frozen=True)
class Subject:
    """What is being measured, for the head of the report."""

    name: str
    run: str
    task: str
    dataset: str
    labels: list[str]
    """The dataset's labels: class i is the i-th."""


def measure(
    subject: Subject, scored: Scored, baselines: dict[str, Baseline], settings: EvaluationSettings
) -> Measured:
    """Compare a model's answers, and those of the baselines, with the truth."""
    rows, names = scored.rows, subject.labels
    classes = len(names)
    truth = rows["label"].to_numpy().astype(np.int64)
    answers = {MODEL: in_order(scored.probabilities, scored.labels, names)}
    answers |= {name: baseline.probabilities for name, baseline in baselines.items()}
    predicted = {name: probabilities.argmax(-1) for name, probabilities in answers.items()}
    task = load_task(subject.task)
    figures = {
        name: metrics.summary(truth, probabilities, settings.calibration_bins)
        | task.row_metrics(rows, predicted[name], names)
        for name, probabilities in answers.items()
    }
    confusion = metrics.confusion_matrix(truth, predicted[MODEL], classes)
    intervals, differences = _intervals(truth, predicted, figures, classes, settings.bootstrap, groups(rows))
    report = EvalReport(
        name=subject.name,
        run=subject.run,
        task=subject.task,
        dataset=subject.dataset,
        labels=names,
        rows=len(truth),
        metrics=figures[MODEL],
        per_class=metrics.per_class(confusion, names),
        confusion=confusion.tolist(),
        calibration=metrics.calibration(truth, answers[MODEL], settings.calibration_bins),
        slices=_slices(rows, truth, predicted[MODEL], classes),
        baselines={name: figures[name] for name in baselines},
        intervals=intervals,
        differences=differences,
        methods={
            MODEL: f"{scored.engine}, {scored.rows_per_second:,.0f} rows/s",
            **{name: f"{b.how}, {b.seconds:.1f} s" for name, b in baselines.items()},
        },
        mistakes=_mistakes(rows, truth, answers[MODEL], names),
        temperature=scored.temperature,
        uncalibrated=_uncalibrated(truth, scored, names, settings.calibration_bins),
        head=scored.head,
    )
    return Measured(report, _predictions(rows, truth, answers[MODEL]))


def _uncalibrated(truth: Ints, scored: Scored, names: list[str], bins: int) -> dict[str, float]:
    """What the temperature changes, before it did; empty for a model without one."""
    if scored.uncalibrated is None:
        return {}
    figures = metrics.summary(truth, in_order(scored.uncalibrated, scored.labels, names), bins)
    return {name: figures[name] for name in ("calibration_error", "log_loss", "brier")}


@dataclass(frozen=True)
class Lead:
    """One model beside another on the same split."""

    macro_f1: float
    """Ours minus theirs."""
    interval: list[float]
    """Ends of its 95% interval; empty without a bootstrap."""
    p: float | None
    """Of no difference, by the paired bootstrap; None without one."""
    only_ours: int
    """Items that ours alone has right."""
    only_theirs: int
    mcnemar_p: float | None
    """McNemar's exact test on these; None where items lie in rows and so are not independent."""

    def __str__(self) -> str:
        text = f"{self.macro_f1:+.4f}"
        if self.p is not None:
            text += f" (95% interval {self.interval[0]:+.4f} to {self.interval[1]:+.4f}, p {self.p:.3f})"
        text += f"; right where the other is wrong {self.only_ours:,} times, wrong where it is right {self.only_theirs:,}"
        return text + (f" (McNemar's p {self.mcnemar_p:.3f})" if self.mcnemar_p is not None else "")


def lead(ours: Measured, theirs: Measured, resamples: int) -> Lead:
    """How far one model is ahead of another, and whether that could be chance.

    Raises ValueError when the two were measured on different rows.
    """
    if ours.predictions["id"] != theirs.predictions["id"]:
        raise ValueError("the two models were measured on different rows")
    truth = ours.predictions["label"].to_numpy().astype(np.int64)
    predicted = {
        name: one.predictions["predicted"].to_numpy().astype(np.int64)
        for name, one in (("ours", ours), ("theirs", theirs))
    }
    ids = ours.predictions["id"].to_pylist()
    inside = any(":" in name for name in ids[:1])  # an item's id is its row's, and its place behind a colon
    won, lost, chance = mcnemar(predicted["ours"] == truth, predicted["theirs"] == truth)
    ends: list[float] = []
    p = None
    if resamples:
        rows = _numbered(pa.array([name.partition(":")[0] for name in ids])) if inside else None
        classes = len(ours.report.labels)
        scores = bootstrap_macro_f1(truth, predicted, classes, resamples, groups=rows)
        differences = scores["ours"] - scores["theirs"]
        ends, p = interval(differences), p_value(differences)
    value = ours.report.metrics["macro_f1"] - theirs.report.metrics["macro_f1"]
    return Lead(value, ends, p, won, lost, None if inside else chance)


def groups(items: pa.Table) -> Ints | None:
    """The row that each item lies in, numbered from 0, int64 [N]; None where items are rows."""
    return _numbered(items["row"]) if "row" in items.column_names else None


def _numbered(names: pa.Array | pa.ChunkedArray) -> Ints:
    encoded = names.dictionary_encode()
    array = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return np.asarray(array.indices).astype(np.int64)


def in_order(probabilities: Floats, own: list[str], wanted: list[str]) -> Floats:
    """A model's probabilities [N, C'] over the labels of a dataset [N, C].

    A champion may have been trained on other labels than the dataset that it is measured on. A label it
    does not know gets 0; what it gave to labels that the dataset lacks is shared out over the rest.
    """
    if own == wanted:
        return probabilities
    ordered = np.zeros((len(probabilities), len(wanted)))
    for i, label in enumerate(wanted):
        if label in own:
            ordered[:, i] = probabilities[:, own.index(label)]
    total = ordered.sum(-1, keepdims=True)
    shares = np.full_like(ordered, 1 / len(wanted))
    np.divide(ordered, total, out=shares, where=total > 0)
    return shares


def _intervals(
    truth: Ints,
    predicted: dict[str, Ints],
    figures: dict[str, dict[str, float]],
    classes: int,
    resamples: int,
    rows: Ints | None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Interval of each classifier; value and interval of the model's lead over each baseline."""
    if not resamples:
        return {}, {}
    scores = bootstrap_macro_f1(truth, predicted, classes, resamples, groups=rows)
    lead = {name: figures[MODEL]["macro_f1"] - figures[name]["macro_f1"] for name in figures if name != MODEL}
    return (
        {name: interval(drawn) for name, drawn in scores.items()},
        {name: [value, *interval(scores[MODEL] - scores[name])] for name, value in lead.items()},
    )


def _slices(
    rows: pa.Table, truth: Ints, predicted: Ints, classes: int
) -> dict[str, dict[str, dict[str, float]]]:
    parts = {
        column: slices.by_value(rows[column].to_pylist(), truth, predicted, classes)
        for column in rows.column_names
        if column not in NOT_SLICES and _is_text(rows.schema.field(column).type)
    }
    parts["length"] = slices.by_length(rows["length"].to_numpy(), truth, predicted, classes)
    return parts


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _mistakes(rows: pa.Table, truth: Ints, probabilities: Floats, names: list[str]) -> list[dict[str, Any]]:
    """The wrong answers that the model was surest of: its blind spots, and the dataset's wrong labels."""
    confidence, predicted = probabilities.max(-1), probabilities.argmax(-1)
    wrong = np.flatnonzero(predicted != truth)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return [
        {
            "id": rows["id"][int(i)].as_py(),
            "text": textwrap.shorten(_in_context(rows, int(i)), MISTAKE_CHARS, placeholder=" …"),
            "label": names[truth[i]],
            "predicted": names[predicted[i]],
            "confidence": float(confidence[i]),
        }
        for i in surest
    ]


def _in_context(items: pa.Table, place: int) -> str:
    """An item's text; of one inside a row, between its neighbours."""
    if "row" not in items.column_names:
        return str(items["text"][place].as_py())
    first = max(0, place - CONTEXT_ITEMS)
    near = items.slice(first, place + 1 + CONTEXT_ITEMS - first).select(["row", "text"]).to_pylist()
    row = near[place - first]["row"]
    return " ".join(
        f"⟦{item['text']}⟧" if first + i == place else item["text"]
        for i, item in enumerate(near)
        if item["row"] == row
    )


def _predictions(rows: pa.Table, truth: Ints, probabilities: Floats) -> pa.Table:
    offsets = np.arange(len(truth) + 1, dtype=np.int32) * probabilities.shape[1]
    return pa.table(
        {
            "id": rows["id"],
            "label": pa.array(truth, pa.int32()),
            "predicted": pa.array(probabilities.argmax(-1), pa.int32()),
            "probabilities": pa.ListArray.from_arrays(pa.array(offsets), pa.array(probabilities.ravel())),
        }
    )
