"""Population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846) over whole Ray Train runs.

All trials train up to the same validation, then the worst take over weights, optimiser and position in the
data from the best, with values near theirs, and all go on. So each trial is a chain of parts, each a Ray Train
run of its own that begins from a checkpoint: its own last one, or another trial's. Ray Tune cannot move these
checkpoints, which the workers write to storage themselves; what it hands from trial to trial is a note of
where one lies.

A part's folder is named by where it begins and with which values, so an interrupted search that goes on finds
what a part had come to, and never takes one part for another.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from lib import storage, tracking
from lib.artifacts import DatasetRef
from lib.settings import Dimension, Settings
from lib.training import checkpoints
from lib.training.checkpoints import Part
from lib.training.fit import train

TIME = "validation"
# Metric of a trial's report: whether its training is at its end.
ENDS = "ends"
NOTE = "begin.json"


class Population(PopulationBasedTraining):
    """Tune's, held up by no trial that ends before the others."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(ENDS):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._go_on(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        self._go_on(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, trial)
        self._go_on(tune_controller, trial)

    def _go_on(self, tune_controller: Any, ended: Any) -> None:
        """Release the trials that wait when the one they waited for is gone."""
        waiting = [t for t in tune_controller.get_live_trials() if t is not ended]
        reached = min((self._trial_state[t].last_train_time for t in waiting), default=0)
        while waiting and reached >= self._next_perturbation_sync:
            self._next_perturbation_sync += self._perturbation_interval


def scheduler(settings: Settings, domains: dict[str, Any]) -> Population:
    """Tune's scheduler for `tuning.space`, whose Tune domains are `domains`."""
    tuning = settings.tuning
    # A process that is used again would still hold the last part's controller.
    warnings.filterwarnings("ignore", "Consider boosting PBT performance by enabling `reuse_actors`")
    # Tune draws from the global generators.
    random.seed(tuning.seed)
    np.random.seed(tuning.seed)

    def inside(values: dict[str, Any]) -> dict[str, Any]:
        return {key: _clipped(tuning.space[key], value) for key, value in values.items()}

    return Population(
        time_attr=TIME,
        perturbation_interval=tuning.perturb_every,
        hyperparam_mutations={
            key: dimension.ends if dimension.chosen[0] == "choice" else domains[key]
            for key, dimension in tuning.space.items()
        },
        quantile_fraction=tuning.quantile,
        custom_explore_fn=inside,
        log_config=False,
        synch=True,
    )


class Results(JsonLoggerCallback):
    """Ray's record of what trials report; a trial that goes on keeps the file that is here.

    Ray fetches the copy in storage instead, which may be older: reports of before the trial's pause are lost then.
    """

    def _restore_from_remote(self, file_name: str, trial: Any) -> None:
        if not Path(trial.local_path, file_name).exists():
            super()._restore_from_remote(file_name, trial)


def _clipped(dimension: Dimension, value: Any) -> Any:
    if dimension.chosen[0] == "choice":
        return value
    low, high = dimension.ends
    return min(max(value, low), high)


def run_trial(settings: Settings, values: dict[str, Any], dataset: DatasetRef, run: tracking.Run) -> None:
    """Train in parts, in a trial's own process, until the training ends or Tune ends the process."""
    every = settings.tuning.perturb_every
    begin, done = _told()
    while True:
        part = part_of(run, values, begin, done, done + every)
        _forget(run, part)
        summary = train(settings, dataset, run, part=part).return_value
        folder = checkpoints.run_folder(run.ref, part)
        begin = storage.join(folder, checkpoints.committed(folder)[-1])
        new, done = summary["validations"][done:], len(summary["validations"])
        for record in new[:-1]:
            tune.report(record)
        if new:
            # Returns only when Tune lets the trial go on.
            _report({**new[-1], ENDS: summary["ended"]}, begin, done)
        if summary["ended"]:
            run.log_metrics({f"best/{key}": value for key, value in summary["best"].items()})
            return


def part_of(run: tracking.Run, values: dict[str, Any], begin: str | None, done: int, until: int) -> Part:
    """The part that begins from the checkpoint `begin`, with `done` validations, with these values."""
    digest = hashlib.sha256(json.dumps([values, begin], sort_keys=True).encode()).hexdigest()
    return Part(f"{run.ref.id}-{done:04d}-{digest[:12]}", begin, until)


def _told() -> tuple[str | None, int]:
    """The checkpoint to begin from and its number of validations."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None, 0
    with checkpoint.as_directory() as folder:
        note = json.loads((Path(folder) / NOTE).read_text())
    return note["checkpoint"], note["validations"]


def _report(metrics: dict[str, Any], begin: str, done: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NOTE).write_text(json.dumps({"checkpoint": begin, "validations": done}))
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def _forget(run: tracking.Run, part: Part) -> None:
    """Delete this trial's earlier parts, which no trial can take over from any more.

    Trials take over when all have come to the same validation; a trial that goes on from there has seen all
    others come to it.
    """
    kept = {part.name, (part.begin or "").rstrip("/").rsplit("/", 2)[-2:][0]}
    for name in storage.ls(run.ref.checkpoints_uri):
        if name not in kept:
            storage.remove(storage.join(run.ref.checkpoints_uri, name))
