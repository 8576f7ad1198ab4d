"""From likelihoods and answers to a report: a chat model beside its base, before and after fine-tuning.

Dialogues with the same prompt are right or wrong together, so the bootstrap draws prompts, not dialogues.
Systems: `model`; `base`, the same before; `nearest`, which looks the answer up (lib.evaluation.nearest) and so has
no perplexity. Shapes: N rows of the test split, G of them whose last answer is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lib.artifacts import AnswersReport, EvalReport
from lib.evaluation import answer_metrics
from lib.evaluation.answer_metrics import (
    OF_SOME,
    AnswerFigures,
    bits_per_byte_of,
    mean_of,
    perplexity_of,
)
from lib.evaluation.answering import Answered
from lib.evaluation.classification import MODEL, Measured, Subject
from lib.evaluation.intervals import Additive, bootstrap_sums, interval
from lib.evaluation.metrics import Floats
from lib.evaluation.nearest import Nearest
from lib.evaluation.slices import MISSING, REST
from lib.settings import EvaluationSettings

BASE, NEAREST = "base", "nearest"
DECIDING = "perplexity"
# Of all rows, from likelihoods; the others are of generated answers.
LIKELIHOODS = ("perplexity", "bits_per_byte", "ranking_accuracy", "preference_accuracy")
# By which a version may be promoted. What counts down, lib.direction says.
MAY_DECIDE = ("perplexity", "bits_per_byte", "ranking_accuracy", "rouge_l", "chrf", "exact_match", "grounded")
COMPARED = (*MAY_DECIDE, "abstained", "preference_accuracy", "repetition", "refusals", "cut")
MOST_SLICES = 20
NOT_SLICES = ("id", "length")


@dataclass(frozen=True)
class Asked:
    """The test split as this module reads it."""

    rows: pa.Table
    """N rows sorted by id: `id`, `length`, and the slices."""
    generated: np.ndarray
    """int64 [G]: which of them are generated, rising."""
    prompts: list[list[dict[str, str]]]
    """[G] messages before the last answer."""
    references: list[str]
    """[G] the last answer itself."""
    reference_tokens: list[int]
    passages: list[str] | None = None
    """[G] what a knowledge base had for each, empty where nothing; None where the data is not grounded."""


def measure(
    subject: Subject,
    asked: Asked,
    model: Answered,
    base: Answered,
    nearest: Nearest,
    settings: EvaluationSettings,
    deciding: str = DECIDING,
) -> Measured:
    """Compare the model's answers with its base's and with those that were looked up.

    Raises ValueError when the systems did not answer the same rows.
    """
    predictions = _predictions(asked, model, base, nearest)
    systems = {MODEL: model, BASE: base}
    figures = {name: _figures(one, asked, settings) for name, one in systems.items()}
    words = [len(answer_metrics.Words().tokenize(answer)) for answer in nearest.answers]
    figures[NEAREST] = answer_metrics.figures(
        nearest.answers,
        asked.references,
        settings.answers.refusals,
        words,
        [False] * len(words),
        asked.passages,
    )
    additive = {name: _additive(predictions, name, one) for name, one in figures.items()}
    metrics = {name: _summary(additive[name], one) for name, one in figures.items()}
    for key in [k for k in metrics[NEAREST] if k.startswith("tokens_")]:
        del metrics[NEAREST][key]  # counted in words: it has no tokeniser
    intervals, differences = _intervals(additive, metrics, settings.bootstrap, predictions, asked.generated)
    report = EvalReport(
        name=subject.name,
        run=subject.run,
        task=subject.task,
        dataset=subject.dataset,
        labels=[],
        rows=asked.rows.num_rows,
        metrics=metrics[MODEL],
        per_class={},
        confusion=[],
        calibration=[],
        slices=_slices(asked, predictions, figures),
        baselines={name: metrics[name] for name in (BASE, NEAREST)},
        intervals=intervals.get(deciding, {}),
        differences=differences.get(deciding, {}),
        methods={
            **{name: f"{one.engine}, {one.tokens_per_second:,.0f} tokens/s" for name, one in systems.items()},
            NEAREST: nearest.how,
        },
        mistakes=[],
        deciding=deciding,
        answers=AnswersReport(
            prompts=int(prompts_of(predictions).max()) + 1,
            generated=len(asked.generated),
            tokens=int(predictions["tokens"].to_numpy().sum()),
            reference=_reference(asked),
            intervals=intervals,
            differences=differences,
            conversations=_conversations(asked, model, base, nearest, settings.answers.shown),
            judge={},
        ),
    )
    return Measured(report, predictions)


def lead(ours: Measured, theirs: Measured, resamples: int, metric: str = DECIDING) -> list[float]:
    """One model's metric minus another's on the same split: value, and the ends of its 95% interval.

    Without resamples only the value. Raises ValueError when the two were measured on different rows, or answered
    different ones.
    """
    sides = {name: _stored(one, metric) for name, one in (("ours", ours), ("theirs", theirs))}
    if sides["ours"][0] != sides["theirs"][0]:
        raise ValueError("the two models were measured on different rows")
    additive = {name: figure for name, (_, figure) in sides.items()}
    value = additive["ours"].value - additive["theirs"].value
    table = ours.predictions
    groups = prompts_of(table.filter(pa.compute.is_in(table["id"], pa.array(sides["ours"][0]))))
    if not resamples or groups.max() == 0:
        return [value]
    drawn = bootstrap_sums(additive, resamples, groups=groups)
    return [value, *interval(drawn["ours"] - drawn["theirs"])]


def prompts_of(table: pa.Table) -> np.ndarray:
    """The prompt of each row, numbered from 0, int64 [N]."""
    _, places = np.unique(table["prompt"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    return np.asarray(places, np.int64)


def _stored(measured: Measured, metric: str) -> tuple[list[str], Additive]:
    """The rows that a metric is over, and the metric, from what a report rests on."""
    table = measured.predictions
    if metric in LIKELIHOODS:
        return table["id"].to_pylist(), _likelihood(table, MODEL)[metric]
    said = table.filter(pa.compute.is_valid(table["answer"]))
    figures = answer_metrics.figures(
        said["answer"].to_pylist(),
        said["reference"].to_pylist(),
        [],
        said["answer_tokens"].to_pylist(),
        said["cut"].to_pylist(),
        said["passages"].to_pylist() if "passages" in said.column_names else None,
    )
    return said["id"].to_pylist(), figures.additive(metric)


def _predictions(asked: Asked, model: Answered, base: Answered, nearest: Nearest) -> pa.Table:
    """Row by row what a report rests on: likelihoods of all rows; answers where they were generated, else null."""
    ids = asked.rows["id"].to_pylist()
    for one in (model, base):
        if one.likelihoods["id"].to_pylist() != ids:
            raise ValueError("the systems did not score the same rows")
        if one.answers["id"].to_pylist() != [ids[i] for i in asked.generated]:
            raise ValueError("the systems did not answer the same rows")
    likelihoods = model.likelihoods
    columns: dict[str, Any] = {
        "id": pa.array(ids),
        "prompt": likelihoods["prompt"],
        "tokens": likelihoods["tokens"],
        "bytes": likelihoods["bytes"],
        "loss": likelihoods["loss"],
        "base_loss": base.likelihoods["loss"],
    }
    if "rejected_loss" in likelihoods.column_names:
        columns["rejected_loss"] = likelihoods["rejected_loss"]
        columns["base_rejected_loss"] = base.likelihoods["rejected_loss"]
    columns |= {
        "reference": _spread(asked, asked.references, pa.string()),
        "answer": _spread(asked, model.answers["answer"].to_pylist(), pa.string()),
        "answer_tokens": _spread(asked, model.answers["tokens"].to_pylist(), pa.int64()),
        "cut": _spread(asked, model.answers["cut"].to_pylist(), pa.bool_()),
        "base_answer": _spread(asked, base.answers["answer"].to_pylist(), pa.string()),
        "nearest_answer": _spread(asked, nearest.answers, pa.string()),
        **({"passages": _spread(asked, asked.passages, pa.string())} if asked.passages else {}),
    }
    return pa.table(columns)


def _spread(asked: Asked, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of the generated rows among all rows; null elsewhere."""
    spread: list[Any] = [None] * asked.rows.num_rows
    for place, value in zip(asked.generated, values, strict=True):
        spread[place] = value
    return pa.array(spread, kind)


def _figures(answered: Answered, asked: Asked, settings: EvaluationSettings) -> AnswerFigures:
    table = answered.answers
    return answer_metrics.figures(
        table["answer"].to_pylist(),
        asked.references,
        settings.answers.refusals,
        table["tokens"].to_pylist(),
        table["cut"].to_pylist(),
        asked.passages,
    )


def _likelihood(table: pa.Table, system: str) -> dict[str, Additive]:
    """Figures of all rows, of a system that has likelihoods.

    For pairs `ranking_accuracy`: share whose chosen answer is likelier than the rejected one (Chen et al. 2024);
    and, of the model alone, `preference_accuracy`: share whose implicit reward, against the base as reference, is
    higher for the chosen answer (Rafailov et al. 2023), as training measures it.
    """

    def column(name: str) -> Floats:
        values: Floats = table[name].to_numpy().astype(np.float64)
        return values

    before = "" if system == MODEL else "base_"
    losses = column(f"{before}loss")
    found = {
        "perplexity": perplexity_of(losses, column("tokens")),
        "bits_per_byte": bits_per_byte_of(losses, column("bytes")),
    }
    if "rejected_loss" in table.column_names:
        margin = column(f"{before}rejected_loss") - losses
        found["ranking_accuracy"] = mean_of((margin > 0).astype(np.float64))
        if system == MODEL:
            reward = margin - (column("base_rejected_loss") - column("base_loss"))
            found["preference_accuracy"] = mean_of((reward > 0).astype(np.float64))
    return found


def _additive(table: pa.Table, system: str, figures: AnswerFigures) -> dict[str, Additive]:
    """Every figure of a system that has an interval."""
    found = {} if system == NEAREST else _likelihood(table, system)
    lacking = {*LIKELIHOODS, *OF_SOME} - {*figures.of_some}
    return found | {name: figures.additive(name) for name in COMPARED if name not in lacking}


def _summary(additive: dict[str, Additive], figures: AnswerFigures) -> dict[str, float]:
    return {name: additive[name].value for name in LIKELIHOODS if name in additive} | figures.summary()


def _intervals(
    additive: dict[str, dict[str, Additive]],
    metrics: dict[str, dict[str, float]],
    resamples: int,
    predictions: pa.Table,
    generated: np.ndarray,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, list[float]]]]:
    """Metric → system → interval, and metric → baseline → the model's lead; paired: all on the same resamples.

    A metric over a single prompt has none: nothing can be told of others.
    """
    of_all = prompts_of(predictions)
    of_generated = np.unique(of_all[generated], return_inverse=True)[1]
    intervals: dict[str, dict[str, list[float]]] = {}
    differences: dict[str, dict[str, list[float]]] = {}
    for metric in COMPARED if resamples else ():
        having = {name: ones[metric] for name, ones in additive.items() if metric in ones}
        groups = of_all if metric in LIKELIHOODS else of_generated
        if not having or groups.max() == 0:
            continue
        drawn = bootstrap_sums(having, resamples, groups=groups)
        intervals[metric] = {name: interval(scores) for name, scores in drawn.items()}
        differences[metric] = {
            name: [metrics[MODEL][metric] - metrics[name][metric], *interval(drawn[MODEL] - scores)]
            for name, scores in drawn.items()
            if name != MODEL
        }
    return intervals, differences


def _reference(asked: Asked) -> dict[str, float]:
    """What the references' own texts measure, to hold the answers against."""
    figures = answer_metrics.figures(
        asked.references,
        asked.references,
        [],
        asked.reference_tokens,
        [False] * len(asked.references),
        asked.passages,
    )
    apart = {
        "rouge_l",
        "chrf",
        "exact_match",
        "refusals",
        "abstained",
        "cut",
    }  # of a text beside itself they say nothing
    return {name: value for name, value in figures.summary().items() if name not in apart}


def _slices(
    asked: Asked, predictions: pa.Table, figures: dict[str, AnswerFigures]
) -> dict[str, dict[str, dict[str, float]]]:
    rows = asked.rows
    found = {
        name: _values(rows[name].to_pylist())
        for name in rows.column_names
        if name not in NOT_SLICES and pa.types.is_string(rows.schema.field(name).type)
    }
    found["length"] = _lengths(rows["length"].to_numpy())
    place = {int(row): i for i, row in enumerate(asked.generated)}
    return {
        name: {
            value: _slice(mask, predictions, figures, [place[i] for i in np.flatnonzero(mask) if i in place])
            for value, mask in masks.items()
        }
        for name, masks in found.items()
    }


def _slice(
    mask: np.ndarray, predictions: pa.Table, figures: dict[str, AnswerFigures], generated: list[int]
) -> dict[str, float]:
    part = predictions.filter(pa.array(mask))
    found: dict[str, float] = {"rows": part.num_rows, "answers": len(generated)}
    for system, before in ((MODEL, ""), (BASE, "base_")):
        if part["tokens"].to_numpy().sum():
            found[f"{before}perplexity"] = _likelihood(part, system)["perplexity"].value
        if generated:
            found[f"{before}rouge_l"] = figures[system].part(generated).additive("rouge_l").value
    return found


def _values(values: list[str | None]) -> dict[str, np.ndarray]:
    """Value → mask bool [N] of its rows; the most frequent values, and all others as one."""
    names = np.array([value or MISSING for value in values])
    found, counts = np.unique(names, return_counts=True)
    kept = [str(found[i]) for i in np.argsort(-counts, kind="stable")[:MOST_SLICES]]
    masks = {name: names == name for name in kept}
    if len(found) > MOST_SLICES:
        masks[REST] = ~np.isin(names, kept)
    return masks


def _lengths(lengths: np.ndarray, buckets: int = 4) -> dict[str, np.ndarray]:
    """`A-B tokens` → mask, for buckets of about equally many rows."""
    bounds = np.unique(np.quantile(lengths, np.linspace(0, 1, buckets + 1), method="inverted_cdf")[1:])
    place = np.searchsorted(bounds, lengths)
    masks = [place == bucket for bucket in range(len(bounds))]
    return {f"{lengths[m].min()}-{lengths[m].max()} tokens": m for m in masks}


def _conversations(
    asked: Asked, model: Answered, base: Answered, nearest: Nearest, shown: int
) -> list[dict[str, Any]]:
    count = len(asked.generated)
    places = np.unique(np.linspace(0, count - 1, min(shown, count)).astype(np.int64))
    ids = asked.rows["id"]
    said: dict[str, Callable[[int], str]] = {
        BASE: lambda i: base.answers["answer"][i].as_py(),
        MODEL: lambda i: model.answers["answer"][i].as_py(),
        NEAREST: lambda i: nearest.answers[i],
    }
    return [
        {
            "id": ids[int(asked.generated[i])].as_py(),
            "prompt": asked.prompts[i],
            "reference": asked.references[i],
            "answers": {name: of(int(i)) for name, of in said.items()},
        }
        for i in places
    ]
