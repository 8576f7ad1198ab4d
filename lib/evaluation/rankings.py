"""A recommender measured: where it ranks what users turned to next, in the whole catalogue, beside popularity and
transitions; and what its lists are like besides.

Shapes: R rows of the test split, M that are foretold, N items, K = CUT recommended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.artifacts import DatasetRef, EvalReport
from lib.errors import DataError
from lib.evaluation import logged
from lib.evaluation.classification import MODEL, Measured, Subject
from lib.evaluation.deciding import deciding
from lib.evaluation.intervals import Additive, bootstrap_sums, interval
from lib.recommender import items as catalogue
from lib.recommender import ranks, rivals
from lib.recommender.items import Scale
from lib.recommender.queries import asked, read_split, sequences_of
from lib.recommender.ranker import candidates
from lib.recommender.ranks import CUT
from lib.settings import ServingSettings, Settings

DECIDING = "ndcg_10"
MAY_DECIDE = ("ndcg_10", "hr_10", "mrr")
RETRIEVAL, POPULARITY, TRANSITIONS = "retrieval", "popularity", "transitions"
# Rows that are ranked at a time: their scores are float32 [ROWS, N].
ROWS_AT_ONCE = 256
EXAMPLES, SHOWN_HISTORY = 12, 8
# Values of a users' column that have a slice.
GROUPS = 12
# Interactions in training from which on an item is no longer rare.
RARE = 10

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
        found = retrieval(known)
        for one, scores in zip(known, found, strict=True):
            if not len(one["items"]):
                continue  # the ranker goes by what was done
            best = candidates(scores, one["items"])
            # It is asked at the last that is known of a user, later than which nothing is told.
            again = predictor.rank(history_of(translate(one)), int(one["times"][-1]), best, scores[best])
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
        name: ranks.figures(one.ranks[usual]) | _lists(one.first[usual], seen, items)
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
            calibration=calibration(ranked[MODEL], targets, usual, settings.evaluation.calibration_bins),
            slices=_slices(ranked[MODEL].ranks, known, targets, fresh, seen)
            | _groups(ranked[MODEL].ranks[usual], [known[i] for i in np.flatnonzero(usual)], dataset),
            baselines={name: one for name, one in figures.items() if name != MODEL},
            intervals=intervals,
            differences=differences,
            methods={
                name: f"{len(targets) / max(one.seconds, 1e-9):,.0f} lists/s" for name, one in ranked.items()
            },
            mistakes=[],
            deciding=metric,
            rankings=_examples(known, targets, ranked[MODEL], items),
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


def calibration(ranked: Ranked, targets: np.ndarray, usual: np.ndarray, bins: int) -> list[dict[str, float]]:
    """Bins of as many recommended items each, from the least likely to the likeliest: how likely the model said that they
    come next, and how often they did."""
    said = ranked.chances[usual].ravel()
    came = (ranked.first[usual] == targets[usual][:, None]).ravel()
    order = np.argsort(said, kind="stable")
    return [
        {
            "lower": float(said[part[0]]),
            "upper": float(said[part[-1]]),
            "rows": len(part),
            "confidence": float(said[part].mean()),
            "accuracy": float(came[part].mean()),
        }
        for part in np.array_split(order, min(bins, len(order)))
    ]


def _lists(first: np.ndarray, seen: np.ndarray, items: pa.Table) -> dict[str, float]:
    """What the lists [M, K] are like: `coverage_10`, the share of the catalogue that anybody is shown; `novelty_10`, mean
    self-information of the items in bits (Zhou et al. 2010, https://doi.org/10.1073/pnas.1000488107); `popularity_10`,
    mean share of the catalogue that is seen less often; `diversity_10`, mean share of categories that two items of a
    list do not have in common (1 - Jaccard; intra-list distance of Ziegler et al. 2005)."""
    if not first.size:
        return {}
    likely = (seen + 1) / (seen.sum() + len(seen))
    below = np.searchsorted(np.sort(seen), seen, side="left") / max(len(seen), 1)
    found = {
        "coverage_10": len(np.unique(first)) / len(seen),
        "novelty_10": float(-np.log2(likely[first]).mean()),
        "popularity_10": float(below[first].mean()),
    }
    names = catalogue.vocabulary(items["categories"])
    if not names or first.shape[1] < 2:
        return found
    codes, starts = catalogue.coded(items["categories"], names)
    sizes = np.diff(np.append(starts, len(codes)))
    from scipy.sparse import csr_array

    has = csr_array(
        (np.ones(len(codes), np.float32), codes, np.append(starts, len(codes))), (len(seen), len(names))
    )
    distances = []
    for row in first:
        own = has[row].toarray()
        common = own @ own.T
        union = sizes[row][:, None] + sizes[row] - common
        pairs = np.triu_indices(len(row), 1)
        distances.append(1 - (common / np.maximum(union, 1))[pairs].mean())
    return found | {"diversity_10": float(np.mean(distances))}


def _slices(
    found: np.ndarray, known: list[dict[str, Any]], targets: np.ndarray, fresh: np.ndarray, seen: np.ndarray
) -> dict[str, dict[str, dict[str, float]]]:
    """By how much is known of the user, and of the item that is foretold."""
    lengths = np.array([len(one["items"]) for one in known])
    counts = seen[targets]
    of = {
        "history": {
            "none": lengths == 0,
            "1 to 9": (lengths > 0) & (lengths < 10),
            "10 to 49": (lengths >= 10) & (lengths < 50),
            "50 and more": lengths >= 50,
        },
        "item": {
            "held out": fresh,
            "not seen": ~fresh & (counts == 0),
            f"seen 1 to {RARE - 1} times": ~fresh & (counts > 0) & (counts < RARE),
            f"seen {RARE} to 99 times": ~fresh & (counts >= RARE) & (counts < 100),
            "seen 100 times and more": ~fresh & (counts >= 100),
        },
    }
    return {
        name: {
            value: {
                "rows": int(chosen.sum()),
                **ranks.figures(found[chosen]),
                "recall_50": float(ranks.hits(found[chosen], 50).mean()),
            }
            for value, chosen in values.items()
            if (chosen & (~fresh if name == "history" else True)).any()
            for chosen in [chosen & (~fresh if name == "history" else np.ones(len(fresh), bool))]
        }
        for name, values in of.items()
    }


def _groups(
    found: np.ndarray, known: list[dict[str, Any]], dataset: DatasetRef
) -> dict[str, dict[str, dict[str, float]]]:
    """By what is known of the users besides what they do: of each column the values of the most rows."""
    names = dataset.manifest()["users_known"]["categories"]
    rows: dict[str, dict[str, list[int]]] = {}
    for row, one in enumerate(known):
        for code in one["user_categories"].tolist():
            column, _, value = names[code].partition("=")
            rows.setdefault(column, {}).setdefault(value, []).append(row)
    return {
        f"user's {column}": {
            value: {
                "rows": len(of),
                **ranks.figures(found[of]),
                "recall_50": float(ranks.hits(found[of], 50).mean()),
            }
            for value, of in sorted(values.items(), key=lambda item: -len(item[1]))[:GROUPS]
        }
        for column, values in rows.items()
    }


def _examples(
    known: list[dict[str, Any]], targets: np.ndarray, ranked: Ranked, items: pa.Table
) -> list[dict[str, Any]]:
    """Evenly spaced: what somebody had done last, what is recommended, and what came."""
    titles: Sequence[str] = items["title"].to_pylist()
    chosen = np.unique(np.linspace(0, len(targets) - 1, min(EXAMPLES, len(targets))).astype(np.int64))
    return [
        {
            "history": [titles[item] for item in known[i]["items"][-SHOWN_HISTORY:]],
            "recommended": [titles[item] for item in ranked.first[i]],
            "came": titles[targets[i]],
            "rank": float(ranked.ranks[i]),
        }
        for i in chosen.tolist()
    ]
