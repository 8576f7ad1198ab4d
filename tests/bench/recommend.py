"""MovieLens-100K, the whole catalogue ranked: retrieval, and retrieval with its ranker, beside what people use.

    make bench-recommend        (python -m tests.bench.recommend --protocols A --seeds 0 1 2)

Two protocols, both leave-one-out by time, ties in the order of the file: A, ratings of 4 and more are interest, users with
at least 5 of them, all 1,682 films; B, every rating is, users and films with at least 5, iterated. Everything was chosen on
the validation item; the test item is looked at once. Rank = 1 + better + half of the equal.

Rivals, run here: popularity; item-to-item transitions; EASE (Steck 2019) asked with a history that fades; ALS (implicit's);
texts (the untuned encoder's, likeness to what was had); and a GRU4Rec, which is our sequence model without texts, genres
and years. The retrieval model and GRU4Rec are trained by the jobs' own code (two workers, ZeRO-2), each seed anew: until
validation is best, then once more with the validation items, for as many steps (--no-refit: not again); GRU4Rec with the
first seed alone, for the time it takes. The other rivals, and what the ranker counts, know the validation items. The
figure is the mean over the seeds.

Last, a tenth of the films is held out of training altogether: how many of the interactions with them are found among the
10 and 50 best, from the films' texts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from lib import tracking
from lib.artifacts import DatasetRef
from lib.command import connect
from lib.data.build import build
from lib.data.plan import plan
from lib.evaluation import lists, rankings
from lib.evaluation.rankings import Ranked, Scorer, rank
from lib.recommender import items as catalogue
from lib.recommender import ranks, vectors
from lib.recommender.queries import asked, read_split, sequences_of
from lib.settings import Settings, load_settings
from tests.bench.report import Report

if TYPE_CHECKING:
    from lib.training.fit import Fit

CONFIG = "jobs/configs/movies.yaml"
PROTOCOLS: dict[str, list[str]] = {
    "A": [],
    "B": [
        "--data.interactions.least_value", "null",
        "--data.interactions.least_per_item", "5",
    ],
}  # fmt: skip
# Chosen on the validation items of protocol A, out of 16 and 7 settings.
EASE_L2, EASE_RECENCY = 400.0, 0.7
ALS = {"factors": 96, "regularization": 20.0, "iterations": 30, "alpha": 5.0}
TWO, ONE = "two stages", "retrieval alone"
OURS = (TWO, ONE)
TARGETS = {"A": {TWO: 0.119, ONE: 0.110}, "B": {TWO: 0.138, ONE: 0.128}}
METRICS = ("hr_10", "ndcg_10", "mrr")


def settings_of(protocol: str, *words: str) -> Settings:
    return load_settings(CONFIG, [*PROTOCOLS[protocol], *words])


class Ease:
    """Steck 2019, https://doi.org/10.1145/3308558.3313710: a linear item-to-item model in closed form; asked with a
    history of which the latest counts most."""

    def __init__(self, sequences: Sequence[np.ndarray], items: int) -> None:
        rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
        taken = csr_array((np.ones(len(rows)), (rows, np.concatenate(sequences))), (len(sequences), items))
        gram = (taken.T @ taken).toarray() + EASE_L2 * np.eye(items)
        inverse = np.linalg.inv(gram)
        self.weights = -inverse / np.diag(inverse)
        np.fill_diagonal(self.weights, 0)

    def __call__(self, known: list[dict[str, Any]]) -> np.ndarray:
        asked_with = np.zeros((len(known), len(self.weights)))
        for row, one in zip(asked_with, known, strict=True):
            row[one["items"]] = EASE_RECENCY ** np.arange(len(one["items"]) - 1, -1, -1)
        return asked_with @ self.weights


class Als:
    """implicit's alternating least squares (Hu et al. 2008); users are computed anew from what they had done."""

    def __init__(self, sequences: Sequence[np.ndarray], items: int, seed: int = 0) -> None:
        from implicit.als import AlternatingLeastSquares
        from scipy.sparse import csr_matrix

        self._items = items
        self._matrix = csr_matrix
        self.model = AlternatingLeastSquares(random_state=seed, num_threads=0, **ALS)
        self.model.fit(self._of(sequences), show_progress=False)

    def _of(self, sequences: Sequence[np.ndarray]) -> Any:
        rows = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
        values = np.ones(len(rows), np.float32)
        return self._matrix((values, (rows, np.concatenate(sequences))), shape=(len(sequences), self._items))

    def __call__(self, known: list[dict[str, Any]]) -> np.ndarray:
        given = self._of([one["items"] for one in known])
        users = self.model.recalculate_user(np.arange(len(known)), given)
        return np.asarray(users @ self.model.item_factors.T)


class Texts:
    """How like the encoder's vector of an item is to those of what was had, the latest above all."""

    def __init__(self, texts: np.ndarray) -> None:
        self._texts = texts

    def __call__(self, known: list[dict[str, Any]]) -> np.ndarray:
        found = []
        for one in known:
            weights = 0.9 ** np.arange(len(one["items"]) - 1, -1, -1)
            found.append(weights @ self._texts[one["items"]] @ self._texts.T)
        return np.array(found)


def trained(settings: Settings, dataset: DatasetRef, again: bool) -> dict[str, Scorer]:
    """Trained until validation is best; `again`: then once more with the validation items for as many steps, and with the
    first run's ranker, which has seen what it had not."""
    once = fitted(settings, dataset)
    best = once.summary["best"]
    print(f"    best validation: step {best['step']}, ndcg_10 {best['ndcg_10']:.4f}", flush=True)
    if not again:
        return rankings.model_scorers(once.model_uri, dataset, settings.serving)
    values = refitted(settings).model_dump(mode="json")
    values["model"]["recommender"] |= {
        "new_bias": best["new_bias"],
        "ranker": settings.model.recommender.ranker,
        "ranker_from": once.model_uri,
    }
    values["training"] |= {"max_steps": best["step"], "validate_every": best["step"], "patience": None}
    more = Settings.model_validate(values)
    whole = made(more)
    return rankings.model_scorers(fitted(more, whole).model_uri, whole, settings.serving)


def refitted(settings: Settings) -> Settings:
    values = settings.model_dump(mode="json")
    values["data"]["interactions"]["refit"] = True
    values["model"]["recommender"]["ranker"] = "none"
    return Settings.model_validate(values)


def fitted(settings: Settings, dataset: DatasetRef) -> Fit:
    from lib.training.fit import fit

    with tracking.start_run("finetune", settings) as run:
        run.tag(dataset=dataset.fingerprint)
        return fit(settings, dataset, run)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recommend", description=__doc__)
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--new", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train once more with the validation items",
    )
    given = parser.parse_args()
    report = Report("recommend")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WHORL_STORAGE": folder, "WHORL_DATABASE": f"sqlite:///{folder}/whorl.db"}
        connect()
        for protocol in given.protocols:
            measure(report, protocol, given.seeds, given.refit)
        if given.new:
            measure_new(report, given.seeds[0])
        for name in ("WHORL_STORAGE", "WHORL_DATABASE"):
            del os.environ[name]
    report.finish()


def measure(report: Report, protocol: str, seeds: list[int], again: bool) -> None:
    settings = settings_of(protocol)
    bare = settings_of(
        protocol,
        "--model.recommender.text", "none",
        "--model.recommender.id_dropout", "0",
        "--model.recommender.ranker", "none",
        "--data.items.categories", "[]",
        # Without texts smaller steps are better: chosen out of five settings.
        "--training.learning_rate", "1e-3",
    )  # fmt: skip
    dataset, whole = made(settings), made(refitted(settings))
    known, targets, _ = asked(read_split(dataset, "test"))
    seen = catalogue.read(dataset, ["interactions"])["interactions"].to_numpy()
    scorers = rivals_of(whole, settings, seeds) | {"GRU4Rec": [], TWO: [], ONE: []}
    for name, own in (("GRU4Rec", bare), (TWO, settings)):
        of = made(own)
        for seed in seeds if name == TWO else seeds[:1]:
            began = time.perf_counter()
            print(f"{protocol}: {name}, seed {seed}", flush=True)
            found = trained(seeded(own, seed), of, again)
            scorers[name].append(found[rankings.MODEL])
            if rankings.RETRIEVAL in found:
                scorers[ONE].append(found[rankings.RETRIEVAL])
            print(f"    {time.perf_counter() - began:.0f} s", flush=True)
    ranked = {name: [rank(one, known, targets) for one in several] for name, several in scorers.items()}
    tell(report, protocol, ranked, seen[targets], len(seeds))


def seeded(settings: Settings, seed: int) -> Settings:
    return settings.model_copy(update={"training": settings.training.model_copy(update={"seed": seed})})


def rivals_of(dataset: DatasetRef, settings: Settings, seeds: list[int]) -> dict[str, list[Scorer]]:
    """Those that are not trained by gradients."""
    sequences = sequences_of(dataset)
    vectors.make(settings, dataset)
    items = len(catalogue.read(dataset, ["interactions"]))
    return {
        **{name: [one] for name, one in rankings.rival_scorers(dataset).items()},
        "EASE, fading history": [Ease(sequences, items)],
        "ALS": [Als(sequences, items, seed) for seed in seeds],
        "texts": [Texts(vectors.read(settings, dataset))],
    }


def measure_new(report: Report, seed: int) -> None:
    """Films that training never sees."""
    settings = seeded(settings_of("A", "--data.interactions.new_items", "0.1"), seed)
    dataset = made(settings)
    rows = read_split(dataset, "test")
    known, targets, places = asked(rows.filter(rows["fresh"]))
    print(f"new films, seed {seed}: {len(places):,} interactions with {len(np.unique(targets))}", flush=True)
    model = rankings.model_scorers(fitted(settings, dataset).model_uri, dataset, settings.serving)
    scorers: dict[str, list[Scorer]] = {TWO: [model[rankings.MODEL]], ONE: [model[rankings.RETRIEVAL]]}
    scorers |= rivals_of(dataset, settings, [seed])
    ranked = {name: rank(several[0], known, targets) for name, several in scorers.items()}
    # Among the new films alone, too: which of them somebody turns to.
    new = np.unique(targets)
    for cut in (10, 50):
        tell_recall(report, f"new films: recall@{cut}", {n: [one] for n, one in ranked.items()}, cut)
    among = {name: [rank(Among(several[0], new), known, targets)] for name, several in scorers.items()}
    for cut in (10, 50):
        tell_recall(report, f"among the {len(new)} new films: recall@{cut}", among, cut)


class Among:
    """A scorer to which other items than some are the worst."""

    def __init__(self, scorer: Scorer, items: np.ndarray) -> None:
        self._scorer, self._items = scorer, items

    def __call__(self, known: list[dict[str, Any]]) -> np.ndarray:
        scores = self._scorer(known)
        found = np.full(scores.shape, scores.min() - 1)
        found[:, self._items] = scores[:, self._items]
        return found


def made(settings: Settings) -> DatasetRef:
    planned = plan(settings)
    if not planned.ref.exists():
        build(planned, lambda line: None)
    return planned.ref


def mean(several: list[Ranked], metric: str) -> np.ndarray:
    """What each user adds to the metric, mean over the seeds."""
    return np.asarray(np.mean([rankings.each(one.ranks, metric) for one in several], axis=0))


def tell(report: Report, protocol: str, found: dict[str, list[Ranked]], seen: np.ndarray, seeds: int) -> None:
    rivals = [name for name in found if name not in OURS]
    for metric in METRICS:
        for name in [*rivals, ONE]:
            report.row(
                f"{protocol}: {metric}, {seeds} seeds",
                float(mean(found[TWO], metric).mean()),
                unit="",
                rival=name,
                theirs=float(mean(found[name], metric).mean()),
            )
    for name in OURS:
        figure = float(mean(found[name], "ndcg_10").mean())
        report.row(f"{protocol}: ndcg_10, {name}", figure, unit="", target=TARGETS[protocol][name])
    best = max(rivals, key=lambda name: float(mean(found[name], "ndcg_10").mean()))
    for name in OURS:
        low, value, high = lead(mean(found[name], "ndcg_10"), mean(found[best], "ndcg_10"))
        report.row(
            f"{protocol}: ndcg_10 of {name} above {best}", value, unit=f"95%: {low:+.4f} to {high:+.4f}"
        )
    rare = seen < lists.RARE
    for cut in (10, 50):
        case = f"{protocol}: recall@{cut}, {int(rare.sum())} items seen under {lists.RARE} times"
        tell_recall(report, case, found, cut, rare)


def tell_recall(
    report: Report,
    case: str,
    found: dict[str, list[Ranked]],
    cut: int,
    chosen: np.ndarray | None = None,
) -> None:
    """Of both stages beside the best rival."""
    pick = slice(None) if chosen is None else chosen
    recall = {
        name: float(np.mean([ranks.hits(one.ranks[pick], cut) for one in several]))
        for name, several in found.items()
    }
    rival = max((name for name in recall if name not in OURS), key=lambda name: recall[name])
    report.row(case, recall[TWO], unit="", rival=rival, theirs=recall[rival], target=3.0)


def lead(ours: np.ndarray, theirs: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Of paired differences over users: lower end of the 95% interval, mean, upper end."""
    difference = ours - theirs
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(difference), np.full(len(difference), 1 / len(difference)), resamples)
    low, high = np.quantile(drawn @ difference / len(difference), [0.025, 0.975])
    return float(low), float(difference.mean()), float(high)


if __name__ == "__main__":
    main()
