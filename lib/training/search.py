"""Search over the settings of a training: Ray Tune trials, each a whole Ray Train run with its DeepSpeed workers.

A trial is a driver of its own with a child run in the tracking database. Its validations go to Ray Tune, whose
scheduler may end it early; its workers are not among the resources that Tune counts for the trial, so the number
of trials at a time is computed here. Checkpoints of a trial last as long as the search: what remains is which
settings were best.

    random      values drawn independently
    tpe         tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna
    asha        asynchronous successive halving (Li et al. 2020) over validations
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from lib import storage, tracking
from lib.artifacts import DatasetRef, RunRef
from lib.errors import ConfigError, unwrap
from lib.settings import Dimension, Settings, override
from lib.tasks import FALLING, deciding_metric
from lib.training.fit import check_resources, train

# Of the trial's own process, which only waits for its workers; Tune takes no 0.
DRIVER_CPUS = 0.1
# Validations that no trial reaches: where a trial ends is `training`'s matter, not the scheduler's.
MOST_VALIDATIONS = 1000
TIME = "validation"


@dataclass(frozen=True)
class Trial:
    """One set of values and what came of it."""

    number: int
    values: dict[str, Any]
    """Dotted key → value."""
    score: float | None
    """The best that `training.metric` was at any validation; None when there was none."""
    validations: int
    id: str
    """Ray Tune's name of it, which its run carries as the tag `trial`."""
    error: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search came to. `trials` from the best to those without a score."""

    trials: list[Trial]
    metric: str
    lower_is_better: bool

    @property
    def best(self) -> Trial:
        return self.trials[0]


def check(settings: Settings) -> None:
    """Raises ConfigError for a search without a space, or with a value that the configuration does not allow."""
    tuning = settings.tuning
    if not tuning.space:
        raise ConfigError(
            "tuning.space is empty; name what is searched, such as "
            "tuning.space.training.learning_rate: {log_uniform: [1e-5, 1e-3]}"
        )
    for key, dimension in tuning.space.items():
        for value in dimension.ends:
            override(settings, {key: value}, f"tuning.space.{key}")


def search(settings: Settings, dataset: DatasetRef, run: tracking.Run) -> Found:
    """Try `tuning.trials` settings on the connected cluster. A run that was interrupted goes on.

    The space was checked (`check`). Raises ConfigError when every trial failed, with the first trial's reason,
    ResourceError when the cluster has no room for one trial.
    """
    check_resources(settings)
    concurrent = settings.tuning.concurrency or room(settings, ray.cluster_resources())
    lower = deciding_metric(settings) in FALLING
    path = storage.join(run.ref.uri, "search")
    trainable = tune.with_resources(
        tune.with_parameters(
            trial,
            settings=settings.model_dump(mode="json"),
            dataset=dataclasses.asdict(dataset),
            parent=run.ref.id,
            places=tracking.places(),
        ),
        {"CPU": DRIVER_CPUS},
    )
    if storage.exists(storage.join(path, "tuner.pkl")):
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={key: _domain(dimension) for key, dimension in settings.tuning.space.items()},
            tune_config=tune.TuneConfig(
                metric=deciding_metric(settings),
                mode="min" if lower else "max",
                num_samples=settings.tuning.trials,
                search_alg=_algorithm(settings, concurrent),
                scheduler=_scheduler(settings),
            ),
            run_config=tune.RunConfig(name="search", storage_path=run.ref.uri, verbose=0),
        )
    try:
        results = tuner.fit()
    finally:
        _end_children(run)
    found = _found(results, settings, lower)
    if found.best.score is None:
        raise ConfigError(
            f"no trial came to a validation; the first: {found.best.error or 'ended without a word'}"
        )
    return found


def room(settings: Settings, resources: dict[str, float]) -> int:
    """How many trials fit into the cluster at a time, at least 1."""
    training = settings.training
    # As `check_resources`: one slot for the reads that feed a trial's workers.
    each = {
        "CPU": training.least_workers * training.cpus_per_worker + 1 + DRIVER_CPUS,
        "GPU": training.least_workers * training.gpus_per_worker,
    }
    fitting = [int(resources.get(kind, 0) // need) for kind, need in each.items() if need]
    return max(1, min(fitting))


def trial(
    values: dict[str, Any],
    settings: dict[str, Any],
    dataset: dict[str, Any],
    parent: str,
    places: dict[str, str],
) -> None:
    """Runs in the trial's own process: train with these values."""
    os.environ.update(places)
    chosen = override(Settings.model_validate(settings), values, "tuning.space")
    name = tune.get_context().get_trial_id()
    child = tracking.child(parent, name, chosen)
    opened = tracking.resume_run(child, chosen) if child else tracking.start_run("trial", chosen)
    with opened as run:
        run.tag(**{"trial": name, "mlflow.parentRunId": parent, "dataset": dataset["fingerprint"]})
        result = train(chosen, DatasetRef(**dataset), run, callbacks=[TuneReportCallback()])
        summary = result.return_value
        run.log_metrics({f"best/{key}": value for key, value in summary["best"].items()})


def _domain(dimension: Dimension) -> Any:
    kind, value = dimension.chosen
    match kind:
        case "uniform":
            return tune.uniform(*value)
        case "log_uniform":
            return tune.loguniform(*value)
        case "integer":
            return tune.randint(value[0], value[1] + 1)
        case _:
            return tune.choice(value)


def _algorithm(settings: Settings, concurrent: int) -> Any:
    if settings.tuning.algorithm == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Tune's own limit does not reach this one.
        return BasicVariantGenerator(max_concurrent=concurrent, random_state=settings.tuning.seed)
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(seed=settings.tuning.seed), max_concurrent=concurrent)


def _scheduler(settings: Settings) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    tuning = settings.tuning
    if tuning.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=TIME,
        max_t=MOST_VALIDATIONS,
        grace_period=tuning.grace,
        reduction_factor=tuning.reduction,
    )


def _found(results: Any, settings: Settings, lower: bool) -> Found:
    metric = deciding_metric(settings)
    trials = []
    for number, result in enumerate(results):
        frame = result.metrics_dataframe
        scores = list(frame[metric].dropna()) if frame is not None and metric in frame else []
        best = float(min(scores) if lower else max(scores)) if scores else None
        told = unwrap(result.error) if result.error else None
        trials.append(
            Trial(
                number=number,
                values=dict(result.config or {}),
                score=best,
                validations=len(scores),
                id=str((result.metrics or {}).get("trial_id", "")),
                error=str(told or result.error) if result.error else None,
            )
        )
    sign = 1 if lower else -1
    trials.sort(key=lambda t: (t.score is None, sign * (t.score or 0.0), t.number))
    return Found(trials, metric, lower)


def _end_children(run: tracking.Run) -> None:
    """Close the runs of trials that the scheduler ended, and delete all trials' checkpoints."""
    for child in tracking.children(run.ref.id, run.ref.name):
        if child.status() == "RUNNING":
            child.client.set_terminated(child.ref.id, status="KILLED")
            child.tag(ended="by the scheduler, or with the search")
        if child.status() in ("FINISHED", "KILLED"):
            storage.remove(RunRef(child.ref.id, child.ref.name).checkpoints_uri)
