"""Search over the settings of a training: Ray Tune trials, each a whole Ray Train run with its DeepSpeed workers.

A trial is a driver of its own with a child run in the tracking database. Its validations go to Ray Tune, whose
scheduler may end it early; its workers are not among the resources that Tune counts for the trial, so the number
of trials at a time is computed here. Checkpoints of a trial last as long as the search: what remains is which
settings were best.

    random      values drawn independently
    tpe         tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna
    asha        asynchronous successive halving (Li et al. 2020) over validations
    pbt         population based training (lib.training.population)
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import tune
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.tune.integration.ray_train import TuneReportCallback

from lib import storage, tracking
from lib.artifacts import DatasetRef, RunRef
from lib.direction import lower_is_better
from lib.errors import ConfigError, unwrap
from lib.settings import Dimension, Settings, override
from lib.tasks import deciding_metric
from lib.training import cleaner, population
from lib.training.fit import check_resources, train
from lib.training.population import TIME

# Of the trial's own process, which only waits for its workers; Tune takes no 0.
DRIVER_CPUS = 0.1
# Validations that no trial reaches: where a trial ends is `training`'s matter, not the scheduler's.
MOST_VALIDATIONS = 1000


@dataclass(frozen=True)
class Trial:
    """One set of values and what came of it."""

    number: int
    values: dict[str, Any]
    """Dotted key → value; the one at its best validation, where population based training has changed it."""
    score: float | None
    """The best that `training.metric` was at any validation; None when there was none."""
    validations: int
    id: str
    """Ray Tune's name of it, which its run carries as the tag `trial`."""
    error: str | None = None
    schedule: tuple[tuple[int, dict[str, Any]], ...] = ()
    """Which values it had from which validation on, where they changed."""


@dataclass(frozen=True)
class Found:
    """What a search came to. `trials` from the best to those without a score."""

    trials: list[Trial]
    metric: str
    lower_is_better: bool

    @property
    def best(self) -> Trial:
        return self.trials[0]


def search(settings: Settings, dataset: DatasetRef, run: tracking.Run) -> Found:
    """Try `tuning.trials` settings on the connected cluster. A run that was interrupted goes on.

    The space was checked (lib.training.space). Raises ConfigError when every trial failed, with the first trial's reason,
    ResourceError when the cluster has no room for one trial.
    """
    check_resources(settings)
    concurrent = settings.tuning.concurrency or room(settings, ray.cluster_resources())
    lower = lower_is_better(deciding_metric(settings))
    path = storage.join(run.ref.uri, "search")
    trainable = tune.with_resources(
        tune.with_parameters(
            trial,
            settings=settings.model_dump(mode="json"),
            dataset=dataclasses.asdict(dataset),
            parent=run.ref.id,
            places=tracking.places(),
        ),
        _resources(settings, concurrent),
    )
    if storage.exists(storage.join(path, "tuner.pkl")):
        tuner = tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=_domains(settings),
            tune_config=tune.TuneConfig(
                metric=deciding_metric(settings),
                mode="min" if lower else "max",
                num_samples=settings.tuning.trials,
                search_alg=_algorithm(settings, concurrent),
                scheduler=_scheduler(settings),
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=run.ref.uri, verbose=0, callbacks=[population.Results()]
            ),
        )
    results: Any = ()
    try:
        results = tuner.fit()
    finally:
        # Workers of a trial that was just ended may still write checkpoints.
        cleaner.wait_until_freed()
        _end_children(run, results)
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
        if chosen.tuning.scheduler == "pbt":
            population.run_trial(chosen, values, DatasetRef(**dataset), run)
            return
        result = train(chosen, DatasetRef(**dataset), run, callbacks=[TuneReportCallback()])
        summary = result.return_value
        run.log_metrics({f"best/{key}": value for key, value in summary["best"].items()})


def _resources(settings: Settings, concurrent: int) -> dict[str, float]:
    """What Tune counts for a trial."""
    if settings.tuning.scheduler != "pbt":
        return {"CPU": DRIVER_CPUS}
    # All trials of a population are begun, and wait for one another: no limit on how many Tune begins would
    # do. A share of what only the head has limits how many run.
    return {"CPU": DRIVER_CPUS, HEAD_NODE_RESOURCE_NAME: int(9000 / concurrent) / 10000}


def _domains(settings: Settings) -> dict[str, Any]:
    return {key: _domain(dimension) for key, dimension in settings.tuning.space.items()}


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
    tuning = settings.tuning
    if tuning.algorithm == "random" or tuning.scheduler == "pbt":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Tune's own limit does not reach this one.
        limit = 0 if tuning.scheduler == "pbt" else concurrent
        return BasicVariantGenerator(max_concurrent=limit, random_state=tuning.seed)
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(seed=settings.tuning.seed), max_concurrent=concurrent)


def _scheduler(settings: Settings) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    tuning = settings.tuning
    if tuning.scheduler == "none":
        return FIFOScheduler()
    if tuning.scheduler == "pbt":
        return population.scheduler(settings, _domains(settings))
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
        rows = _validations(result, metric)
        best = (min if lower else max)(rows, key=lambda row: row[metric]) if rows else None
        told = unwrap(result.error) if result.error else None
        trials.append(
            Trial(
                number=number,
                values=_values(best, result.config) if best else dict(result.config or {}),
                score=float(best[metric]) if best else None,
                validations=len(rows),
                id=_trial_id(result),
                error=str(told or result.error) if result.error else None,
                schedule=_schedule(rows, result.config),
            )
        )
    sign = 1 if lower else -1
    trials.sort(key=lambda t: (t.score is None, sign * (t.score or 0.0), t.number))
    return Found(trials, metric, lower)


def _trial_id(result: Any) -> str:
    return str((result.metrics or {}).get("trial_id", ""))


def _validations(result: Any, metric: str) -> list[dict[str, Any]]:
    """A trial's reports, in order, one for each validation: an interrupted trial may have reported one twice."""
    frame = result.metrics_dataframe
    if frame is None or metric not in frame:
        return []
    rows = frame.dropna(subset=[metric]).drop_duplicates(TIME, keep="last").sort_values(TIME)
    return [dict(row) for row in rows.to_dict("records")]


def _values(row: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """The values that a report was made with; `last` are those that the trial ended with."""
    # A mapping has no column of its own, and NumPy's numbers are no YAML.
    values = {key: row.get(f"config/{key}", value) for key, value in last.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


def _schedule(rows: list[dict[str, Any]], last: dict[str, Any]) -> tuple[tuple[int, dict[str, Any]], ...]:
    changes: list[tuple[int, dict[str, Any]]] = []
    for row in rows:
        values = _values(row, last)
        if not changes or changes[-1][1] != values:
            changes.append((int(row[TIME]), values))
    return tuple(changes) if len(changes) > 1 else ()


def _end_children(run: tracking.Run, results: Any) -> None:
    """Close the runs of trials that the scheduler ended, and delete all trials' checkpoints."""
    # A trial that is ended may see its workers die before its own process does, and take that for a failure.
    unfailed = {_trial_id(result) for result in results if not result.error}
    for child in tracking.children(run.ref.id, run.ref.name):
        status, tags = child.status(), child.tags()
        if status == "RUNNING" or (status == "FAILED" and tags.get("trial") in unfailed):
            child.client.set_terminated(child.ref.id, status="KILLED")
            child.tag(ended="by the scheduler, or with the search")
            if "error" in tags:
                child.client.delete_tag(child.ref.id, "error")
            status = "KILLED"
        if status in ("FINISHED", "KILLED"):
            storage.remove(RunRef(child.ref.id, child.ref.name).checkpoints_uri)
