"""Search for the settings that train best: Ray Tune over the same training as `jobs.finetune`.

    python -m jobs.tune --config jobs/configs/reviews.yaml --tuning.trials 8
    python -m jobs.tune --config jobs/configs/reviews.yaml --tuning.resume RUN_ID      after an interruption

`tuning.space` in the configuration names what is searched, `tuning.algorithm` how values are chosen and
`tuning.scheduler` which trials are ended early, or take over from better ones (pbt). Writes the best settings as a
configuration that `jobs.finetune` takes, a table of all trials, and pictures of them. Where pbt changed the values of
the best trial on its way, those are its settings that it was best with, and how they changed is printed and in
trials.json.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lib import storage, tracking
from lib.command import connect, joins_this_machine, main
from lib.data.plan import plan
from lib.errors import RegistryError, ResourceError
from lib.planner import check as plan_check
from lib.planner import layouts, timing
from lib.planner.memory import GIB, Layout
from lib.settings import Settings, override
from lib.training import space

BEST = "best.yaml"


def tune(settings: Settings) -> None:
    dataset = plan(settings, fresh=False).ref
    dataset.manifest()  # absent: one line, before Ray or a run is started
    space.check(settings)
    resumed = interrupted(settings)
    if joins_this_machine() and not settings.training.ignore_plan:
        check_disk(settings, plan_check.check(settings).layout)
    connect()
    # Imported only now: ray reads its environment, which connect() completes, when it is first imported.
    from lib.training import trials_plots
    from lib.training.search import search

    opened = tracking.resume_run(resumed, settings) if resumed else tracking.start_run("tune", settings)
    with opened as run:
        run.tag(dataset=dataset.fingerprint)
        print(f"run {run.ref.id}: {settings.tuning.trials} trials", flush=True)
        found = search(settings, dataset, run)
        best = override(settings, found.best.values, "tuning.space")
        uri = storage.join(run.ref.uri, BEST)
        values = best.model_dump(mode="json", exclude_defaults=True)
        storage.write_bytes(uri, yaml.safe_dump(values, sort_keys=False).encode())
        run.log_dict({"metric": found.metric, "trials": [asdict(t) for t in found.trials]}, "trials.json")
        run.log_metrics({f"best/{found.metric}": found.best.score or 0.0})
        with tempfile.TemporaryDirectory() as folder:
            for picture in trials_plots.draw(found, settings.tuning.space, Path(folder)):
                run.log_file(picture)
    print(f"\n{table(found.trials, found.metric)}\n")
    for since, changed in found.best.schedule:
        print(f"the best trial's values from validation {since} on: {shown(changed)}")
    print(f"best settings: {uri}")
    print(f"next: python -m jobs.finetune --config {uri.removeprefix('file://')}")


def check_disk(settings: Settings, layout: Layout) -> None:
    """Raises ResourceError when the checkpoints of all trials, which last as long as the search, find no room.

    Only where storage is a local disk.
    """
    place, tuning = Path(storage.root().removeprefix("file://")), settings.tuning
    if not place.is_absolute():
        return
    each = timing.checkpoint(layouts.base_shape(settings), layout)
    # The latest besides those that are kept; a member of a population has two parts at a time.
    kept = (settings.training.keep_checkpoints + 1) * (2 if tuning.scheduler == "pbt" else 1)
    needed, free = each * kept * tuning.trials, free_bytes(place)
    if needed > free:
        raise ResourceError(
            f"the checkpoints of {tuning.trials} trials, {kept} of {each / GIB:.2f} GiB each, need "
            f"{needed / GIB:.1f} GiB and {place} has {free / GIB:.1f} GiB free; lower tuning.trials or free some, "
            f"training.ignore_plan true tries it all the same"
        )


def free_bytes(place: Path) -> int:
    """Of the file system that holds `place`, or will hold it."""
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def interrupted(settings: Settings) -> tracking.Run | None:
    """The run that `tuning.resume` names. Raises RegistryError when it is not one to go on with."""
    if settings.tuning.resume is None:
        return None
    run = tracking.find_run(settings, "tune", settings.tuning.resume)
    if run.tags().get("kind") != "tune":
        raise RegistryError(f"run {run.ref.id} is of jobs.{run.tags().get('kind')}, not of jobs.tune")
    if run.status() == "FINISHED":
        raise RegistryError(
            f"run {run.ref.id} is finished, its best settings are {storage.join(run.ref.uri, BEST)}; "
            f"start a new search without --tuning.resume"
        )
    return run


def table(trials: list, metric: str) -> str:  # type: ignore[type-arg]
    """All trials, the best first."""
    from lib.evaluation.text import table as aligned

    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    rows = [
        [
            str(trial.number),
            *(_shown(trial.values.get(key)) for key in keys),
            "" if trial.score is None else f"{trial.score:.4f}",
            str(trial.validations),
            trial.error or "",
        ]
        for trial in trials
    ]
    return aligned(["trial", *(key.rpartition(".")[2] for key in keys), metric, "validations", ""], rows)


def shown(values: dict[str, Any]) -> str:
    return "  ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in values.items())


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(tune)
