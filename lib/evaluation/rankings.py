"""A recommender measured: where it ranks what users turned to next, in the whole catalogue, beside popularity and
transitions; and what its lists are like besides.

Shapes: R rows of the test split, M that are foretold, N items, K = CUT recommended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.artifacts import DatasetRef, EvalReport
from lib.errors import DataError
from lib.evaluation import lists, logged
from lib.evaluation.classification import MODEL, Measured, Subject
from lib.evaluation.deciding import deciding
from lib.evaluation.intervals import Additive, bootstrap_sums, interval
from lib.recommender import index, ranks, rivals
from lib.recommender import items as catalogue
from lib.recommender.items import Scale
from lib.recommender.queries import asked, read_split, sequences_of
from lib.recommender.ranker import candidates
from lib.recommender.ranks import CUT
from lib.settings import ServingSettings, Settings

DECIDING = "ndcg_10"
MAY_DECIDE = ("ndcg_10", "hr_10", "mrr")
RETRIEVAL, POPULARITY, TRANSITIONS = "retrieval", "popularity", "transitions"
# Among a report's methods: how the items of a large catalogue are found when it is served; the figures are of all items looked at.
INDEX = "index"
# Rows that are ranked at a time: their scores are float32 [ROWS, N].
ROWS_AT_ONCE = 256

Scorer = Callable[[list[dict[str, Any]]], np.ndarray]
"""What is asked, rows with `items`, `times`, `events`, `user_categories` and `user_numbers` → scores float32 [M, N]."""


@dataclass(frozen=True)
class Ranked:
    """What one system makes of the split."""

    ranks: np.ndarray
    """float64 [M]."""
    first: np.ndarray
    """int64 [M, K]: numbers of the items that it recommends, best first."""
    chances: np.ndarray
    """float64 [M, K]: how likely each of them was to be the one, if scores are logits."""
    seconds: float


def rank(scorer: Scorer, known: list[dict[str, Any]], targets: np.ndarray) -> Ranked:
    """Rank the whole catalogue for each; items of the history are not ranked."""
    found, first, chances = [], [], []
    began = time.perf_counter()
    for start in range(0, len(known), ROWS_AT_ONCE):
        part = known[start : start + ROWS_AT_ONCE]
        for one, scores, target in zip(part, scorer(part), targets[start:], strict=False):
            found.append(ranks.rank(scores, int(target), one["items"]))
            left = scores.astype(np.float64)
            left[one["items"]] = -np.inf
            best = np.argpartition(-left, min(CUT, len(left) - 1))[:CUT]
            best = best[np.isfinite(left[best])]
            first.append(best[np.argsort(-left[best], kind="stable")])
            chances.append(np.exp(left[first[-1]] - np.logaddexp.reduce(left)))
    width = min((len(row) for row in first), default=0)

    def cut(rows: list[np.ndarray], kind: type) -> np.ndarray:
        return np.array([row[:width] for row in rows], kind).reshape(len(rows), width)

    seconds = time.perf_counter() - began
    return Ranked(np.array(found), cut(first, np.int64), cut(chances, np.float64), seconds)


def model_scorers(model_uri: str, dataset: DatasetRef, serving: ServingSettings) -> dict[str, Scorer]:
    """The model of a directory, over the items of a dataset; and beside it its retrieval alone, where it has a ranker."""
    from lib.recommender.predictor import history_of, load

    with storage.local_copy(model_uri) as folder:
        predictor = load(folder, serving).over(catalogue.read(dataset))
    translate = _translation(dataset.manifest(), predictor.shape)

    def retrieval(known: list[dict[str, Any]]) -> np.ndarray:
        return predictor.scores_of([translate(one) for one in known])

    def two_stages(known: list[dict[str, Any]]) -> np.ndarray:
        assert predictor.ranker is not None
        known = [translate(one) for one in known]
        found = predictor.scores_of(known)
        for one, scores in zip(known, found, strict=True):
            if not len(one["items"]):
                continue  # the ranker goes by what was done
            best = candidates(scores, one["items"])
            # It is asked at the last that is known of a user, later than which nothing is told.
            again = predictor.rank(history_of(one), int(one["times"][-1]), best, scores[best])
            scores[:] = _joined(scores, one["items"], best, again, predictor.ranker.coverage)
        return found

    if predictor.ranker is None:
        return {MODEL: retrieval}
    return {MODEL: two_stages, RETRIEVAL: retrieval}


def _joined(
    scores: np.ndarray, had: np.ndarray, best: np.ndarray, again: np.ndarray, coverage: float
) -> np.ndarray:
    """Logs of how likely each item is to come next [N]: the candidates `best` share what `coverage` says by the ranker's scores
    `again`, all others the rest by the retrieval's, as if those that were `had` could not come."""
    found = scores.astype(np.float64)
    others = np.ones(len(found), bool)
    others[had] = others[best] = False
    if others.any():
        found += np.log(max(1 - coverage, 1e-6)) - np.logaddexp.reduce(found[others])
    found[best] = np.log(coverage) + again - np.logaddexp.reduce(again)
    return found


def _translation(manifest: dict[str, Any], shape: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """From a dataset's numbers of events and of what is known of users to the model's, which may come from another."""
    events = np.array(
        [shape.events.index(n) if n in shape.events else 0 for n in manifest["events"]], np.int64
    )
    number = {name: place for place, name in enumerate(shape.user_categories)}
    categories = np.array([number.get(name, -1) for name in manifest["users_known"]["categories"]], np.int64)
    theirs, ours = Scale(**manifest["users_known"]["numbers"]), Scale(**shape.user_numbers)

    def translate(one: dict[str, Any]) -> dict[str, Any]:
        chosen = categories[one["user_categories"]]
        numbers = one["user_numbers"]
        if theirs != ours:
            same = len(ours.mean) == len(numbers)
            numbers = ours.apply(theirs.undo(numbers)) if same else np.zeros(len(ours.mean), np.float32)
        return one | {
            "events": events[one["events"]],
            "user_categories": chosen[chosen >= 0],
            "user_numbers": numbers,
        }

    return translate


def rival_scorers(dataset: DatasetRef) -> dict[str, Scorer]:
    """The baselines, fitted on the training split."""
    counts = catalogue.read(dataset, ["interactions"])["interactions"].to_numpy()
    transitions = rivals.Transitions.fit(sequences_of(dataset), len(counts))
    return {
        POPULARITY: lambda known: rivals.popularity(counts, [k["items"] for k in known]),
        TRANSITIONS: lambda known: transitions.scores([k["items"] for k in known]),
    }


def measure(
    subject: Subject, model_uri: str, dataset: DatasetRef, settings: Settings, split: str = "test"
) -> Measured:
    """Rank the split with the model and the baselines. Raises ConfigError, DataError, ModelError."""
    metric = deciding(settings, DECIDING, MAY_DECIDE)
    shown = _logged(settings)
    rows = read_split(dataset, split)
    known, targets, places = asked(rows)
    scorers = model_scorers(model_uri, dataset, settings.serving) | rival_scorers(dataset)
    ranked = {name: rank(scorer, known, targets) for name, scorer in scorers.items()}
    measured = report(subject, dataset, rows, known, targets, places, ranked, settings, metric)
    if (told := index.told(model_uri)) is not None:
        methods = measured.report.methods | {INDEX: str(told)}
        measured = replace(measured, report=replace(measured.report, methods=methods))
    if not shown:
        return measured
    earned = logged.estimate(shown, _lists_for(shown, scorers[MODEL], dataset))
    return replace(measured, report=replace(measured.report, logged=earned))


def _logged(settings: Settings) -> list[logged.Shown]:
    """What was shown, where the configuration wants an estimate. Raises DataError when there is nothing."""
    days = settings.evaluation.logged_days
    if days is None:
        return []
    application = settings.curation.application or settings.name
    found = list(logged.read(application, time.time() - days * 86_400))
    if not found:
        raise DataError(
            f"evaluation.logged_days: {application} logged no list in {days:g} days; serve it with serving.recommend.explore "
            "above 0 and serving.events.content true, or leave the key out"
        )
    return found


def _lists_for(shown: list[logged.Shown], scorer: Scorer, dataset: DatasetRef) -> list[list[str]]:
    """Items that a model has for what was asked, from the best on, as many as can be needed."""
    items = catalogue.read(dataset, ["item"])["item"].to_pylist()
    row = {item: place for place, item in enumerate(items)}
    numbers = len(dataset.manifest()["users_known"]["numbers"]["mean"])
    most = min(2 * max(len(one.items) for one in shown), len(items))
    found: list[list[str]] = []
    for start in range(0, len(shown), ROWS_AT_ONCE):
        known = [logged.known_of(one, row, numbers) for one in shown[start : start + ROWS_AT_ONCE]]
        for one, scores in zip(known, scorer(known), strict=True):
            scores[one["items"]] = -np.inf
            best = np.argsort(-scores, kind="stable")[:most]
            found.append([items[i] for i in best if np.isfinite(scores[i])])
    return found


def report(
    subject: Subject,
    dataset: DatasetRef,
    rows: pa.Table,
    known: list[dict[str, Any]],
    targets: np.ndarray,
    places: np.ndarray,
    ranked: dict[str, Ranked],
    settings: Settings,
    metric: str,
) -> Measured:
    items = catalogue.read(dataset, ["item", "title", "interactions", "categories"])
    fresh = rows["fresh"].to_numpy(zero_copy_only=False)[places].astype(bool)
    seen = items["interactions"].to_numpy()
    usual = ~fresh if (~fresh).any() else fresh
    names = rows["user"].take(pa.array(places)).combine_chunks().dictionary_encode()
    users = np.asarray(names.indices, np.int64)
    intervals, differences = _intervals(ranked, users, usual, metric, settings.evaluation.bootstrap)
    figures = {
        name: ranks.figures(one.ranks[usual]) | lists.figures_of(one.first[usual], seen, items)
        for name, one in ranked.items()
    }
    table = pa.table(
        {
            "id": rows["id"].take(pa.array(places)),
            "user": rows["user"].take(pa.array(places)),
            "item": items["item"].take(pa.array(targets)),
            "fresh": fresh,
            **{f"rank_{name}": one.ranks for name, one in ranked.items()},
        }
    )
    return Measured(
        EvalReport(
            name=subject.name,
            run=subject.run,
            task=subject.task,
            dataset=subject.dataset,
            labels=[],
            rows=int(usual.sum()),
            metrics=figures[MODEL],
            per_class={},
            confusion=[],
            calibration=lists.calibration(
                ranked[MODEL].first[usual],
                ranked[MODEL].chances[usual],
                targets[usual],
                settings.evaluation.calibration_bins,
            ),
            slices=lists.slices(ranked[MODEL].ranks, known, targets, fresh, seen)
            | lists.groups(ranked[MODEL].ranks[usual], [known[i] for i in np.flatnonzero(usual)], dataset),
            baselines={name: one for name, one in figures.items() if name != MODEL},
            intervals=intervals,
            differences=differences,
            methods={
                name: f"{len(targets) / max(one.seconds, 1e-9):,.0f} lists/s" for name, one in ranked.items()
            },
            mistakes=[],
            deciding=metric,
            rankings=lists.examples(known, targets, ranked[MODEL].ranks, ranked[MODEL].first, items),
        ),
        table,
    )


def each(found: np.ndarray, metric: str) -> np.ndarray:
    """What each rank [M] adds to the mean that the metric is."""
    if metric == "mrr":
        return np.asarray(1 / found)
    return ranks.hits(found) if metric == "hr_10" else ranks.gains(found)


def _intervals(
    ranked: dict[str, Ranked], users: np.ndarray, usual: np.ndarray, metric: str, resamples: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bootstrap over users: of each system, and of the model's lead over each baseline."""
    if not resamples:
        return {}, {}
    _, groups = np.unique(users[usual], return_inverse=True)
    sums = {name: _mean(each(one.ranks[usual], metric)) for name, one in ranked.items()}
    drawn = bootstrap_sums(sums, resamples, groups=groups)
    leads = {
        name: [sums[MODEL].value - sums[name].value, *interval(drawn[MODEL] - drawn[name])]
        for name in ranked
        if name != MODEL
    }
    return {name: interval(scores) for name, scores in drawn.items()}, leads


def _mean(values: np.ndarray) -> Additive:
    return Additive(
        np.stack([values, np.ones(len(values))], axis=1),
        lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1),
    )


def lead(candidate: Measured, rival: Measured, resamples: int, metric: str) -> tuple[float, ...]:
    """The candidate's figure minus the rival's on the same rows, and the ends of its 95% interval."""
    both = [
        one.predictions.sort_by("id").filter(pa.compute.invert(one.predictions.sort_by("id")["fresh"]))
        for one in (candidate, rival)
    ]
    sums = {str(i): _mean(each(one[f"rank_{MODEL}"].to_numpy(), metric)) for i, one in enumerate(both)}
    value = sums["0"].value - sums["1"].value
    if not resamples:
        return (value,)
    groups = np.unique(both[0]["user"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    drawn = bootstrap_sums(sums, resamples, groups=groups)
    return (value, *interval(drawn["0"] - drawn["1"]))
