"""Which run `training.resume` means, and whether it can be gone on with."""

from __future__ import annotations

from typing import Any

from lib import storage, tracking
from lib.artifacts import DatasetRef
from lib.errors import ConfigError, RegistryError, StorageError
from lib.settings import Settings

# What may change when a run goes on: where and how safely it is computed, not what.
FREE = {
    "resume",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "log_every",
    "gradient_checkpointing",
    "zero_init",
    "ignore_plan",
}


def find(settings: Settings, dataset: DatasetRef) -> tracking.Run | None:
    """The run to go on with; None to start a new one.

    With `auto` the latest unfinished run of this configuration and dataset, if there is one. Raises
    RegistryError for a run that does not exist, is finished or is being trained, and ConfigError for one of
    another dataset or configuration, naming what differs.
    """
    wanted = settings.training.resume
    if wanted is None:
        return None
    if wanted == "auto":
        for run in tracking.unfinished_runs(settings, "finetune"):
            try:
                check(run, settings, dataset)
            except (ConfigError, RegistryError, StorageError):
                continue
            return run
        return None
    run = tracking.find_run(settings, "finetune", wanted)
    check(run, settings, dataset)
    return run


def check(run: tracking.Run, settings: Settings, dataset: DatasetRef) -> None:
    """Raises what `find` raises when `run` cannot be gone on with."""
    tags = run.tags()
    anew = "start a new run without --training.resume"
    if tags.get("kind") != "finetune":
        raise RegistryError(f"run {run.ref.id} is of jobs.{tags.get('kind')}, not of jobs.finetune; {anew}")
    if run.status() == "FINISHED" or (
        storage.published(run.ref.model_uri) and not storage.exists(run.ref.checkpoints_uri)
    ):
        raise RegistryError(f"run {run.ref.id} is finished, its model is {run.ref.model_uri}; {anew}")
    if run.status() == "RUNNING" and run.driver_is_alive():
        raise RegistryError(f"run {run.ref.id} is being trained by another process of this machine")
    try:
        there = run.settings()
    except (ValueError, StorageError) as error:
        raise RegistryError(
            f"run {run.ref.id}: its configuration cannot be read ({error}); {anew}"
        ) from error
    differ = differences(there, settings)
    if (made := tags.get("dataset", "")) != dataset.fingerprint:
        differ.append(f"dataset {made or 'none'} there, {dataset.fingerprint} here")
    if differ:
        raise ConfigError(f"run {run.ref.id} differs: {'; '.join(differ)}; change it back, or {anew}")


def differences(there: Settings, here: Settings) -> list[str]:
    """What of the model and the training is not the same, as `key value there, value here`."""
    found = []
    for key in ("name", "task", "model", "training"):
        left, right = (s.model_dump(mode="json")[key] for s in (there, here))
        found += _differences(key, left, right)
    weights = [
        {name: head.model_dump(mode="json") for name, head in s.data.heads.items()}
        | {name: part.weight for name, part in s.data.parts.items()}
        for s in (there, here)
    ]
    return found + _differences("data", *weights)


def _differences(key: str, left: Any, right: Any) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted((left.keys() | right.keys()) - (FREE if key == "training" else set()))
        return [d for name in names for d in _differences(f"{key}.{name}", left.get(name), right.get(name))]
    return [] if left == right else [f"{key} {left} there, {right} here"]
