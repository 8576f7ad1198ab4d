"""The driver's side of a fine-tuning run: checks, Ray Train, the export of the best checkpoint."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import yaml
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from lib import storage, tracking
from lib.artifacts import DatasetRef, RunRef, TaskFile
from lib.base_models import base_directory
from lib.command import QUIET
from lib.errors import DataError, ResourceError, unwrap
from lib.recommender import vectors
from lib.settings import Settings
from lib.tasks import load_task, packs
from lib.training import checkpoints, disk, loop, overrides, reference, trainable, windows
from lib.training.dropout import plain_attention
from lib.training.restore import restore
from lib.training.trainer import Trainer

PARTS = "parts.json"
"""In the `model` folder of a multitask run: part → the run that holds its model."""


@dataclass(frozen=True)
class Fit:
    """What came of a run: the exported model and rank 0's summary (`loop.Loop.summary`)."""

    model_uri: str
    summary: dict[str, Any]


def fit(settings: Settings, dataset: DatasetRef, run: tracking.Run) -> Fit:
    """Train on `dataset`, export the best checkpoint to the run's model directory, delete the checkpoints.

    Raises what `train` raises.
    """
    result = train(settings, dataset, run)
    if not storage.published(run.ref.model_uri):  # a driver may be killed between here and the next line
        # From worst to best; the latest is there too and need not be the best.
        export(settings, dataset, run.ref, result.best_checkpoints[-1][0], result.return_value["best"])
    storage.remove(run.ref.checkpoints_uri)
    return Fit(run.ref.model_uri, result.return_value)


def train(
    settings: Settings,
    dataset: DatasetRef,
    run: tracking.Run,
    callbacks: Sequence[UserCallback] = (),
    part: checkpoints.Part | None = None,
) -> Result:
    """Train on `dataset`, all or one part of it, and leave the checkpoints under the run.

    A run that has checkpoints goes on from the latest. Raises ResourceError when the cluster is too small,
    DataError for an empty dataset, ModelError for a base that cannot be used, ConfigError for a
    `training.deepspeed` that contradicts another key; nothing is started then.
    Raises StorageError when there is no space for a checkpoint, and ResourceError when workers were lost
    more often than `training.max_failures`; what was committed stays, for the run to go on from.
    """
    manifest = dataset.manifest()
    packs(settings)  # refuses what the task cannot
    base = base_directory(settings.model.base)
    settings = overrides.resolve(settings)
    trainable.check(base, settings.training)
    disk.check(settings.training)
    check_resources(settings)
    if manifest["splits"]["train"]["rows"] < settings.training.most_workers:
        raise DataError(
            f"dataset {dataset.name}/{dataset.fingerprint} has {manifest['splits']['train']['rows']} training "
            f"rows for {settings.training.most_workers} workers; give it more rows or lower training.workers"
        )
    if reference.wanted(settings):
        dataset = reference.with_reference(settings, dataset)
    if vectors.wanted(settings):
        vectors.make(settings, dataset)
    checkpoints.mend_record(checkpoints.run_folder(run.ref, part))
    try:
        return _trainer(settings, dataset, run.ref, callbacks, part).fit()
    except TrainingFailedError as error:
        raise explain(error, settings, run.ref) from error


def explain(error: Exception, settings: Settings, run: RunRef) -> Exception:
    """What a user can mend as one line; otherwise `error` itself."""
    if ours := unwrap(error) or checkpoints.full_disk(error, run):
        return ours
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    lost = [rank for rank, failure in failures.items() if isinstance(failure, WorkerHealthCheckFailedError)]
    if not lost:
        return error
    return ResourceError(
        f"worker {', '.join(map(str, lost))} was killed or its node went, more often than training.max_failures "
        f"{settings.training.max_failures} allows; see whether memory is short, then go on with "
        f"--training.resume {run.id}"
    )


def check_resources(settings: Settings) -> None:
    """More workers than the cluster has slots would wait for ever without a word."""
    training, total = settings.training, ray.cluster_resources()
    workers, fixed = training.least_workers, isinstance(training.workers, int)
    for kind, each in (("CPU", training.cpus_per_worker), ("GPU", training.gpus_per_worker)):
        # One slot beside the workers: the reads that feed them must find a place (windows.Dealer).
        reads = kind == "CPU" and fixed
        needed = workers * each + reads
        if each and needed > total.get(kind, 0):
            raise ResourceError(
                f"training.workers {workers} need {needed:g} {kind} slots ({each:g} each"
                f"{', one more to read data' if reads else ''}) and the cluster has "
                f"{total.get(kind, 0):g}; lower training.workers or start a larger cluster"
            )


def _trainer(
    settings: Settings,
    dataset: DatasetRef,
    run: RunRef,
    callbacks: Sequence[UserCallback],
    part: checkpoints.Part | None,
) -> Trainer:
    training = settings.training
    on_gpu = training.gpus_per_worker > 0
    per_worker: dict[str, float] = {"CPU": training.cpus_per_worker}
    if on_gpu:
        per_worker["GPU"] = training.gpus_per_worker
    folder, elastic = checkpoints.run_folder(run, part), not isinstance(training.workers, int)
    begin = part.begin if part else None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the training bar shows the same rows
    context.print_on_execution_start = False
    return Trainer(
        loop.train,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "dataset": dataclasses.asdict(dataset),
            "run": dataclasses.asdict(run),
            "checkpoints": folder,
            "begin": begin,
            "until": part.until if part else None,
            "terminal": sys.stdout.isatty(),
        },
        # The dealer makes the dataset when the workers are there; validation reads its split whole.
        datasets={"train": ray.data.range(1)},
        dataset_config=windows.Dealer(
            dataset.shards("train"), training.epochs, training.shuffle_rows, folder, elastic, begin
        ),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=on_gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=part.name if part else run.id,
            storage_path=run.checkpoints_uri,
            # Ray keeps the latest besides.
            checkpoint_config=CheckpointConfig(
                num_to_keep=training.keep_checkpoints, checkpoint_score_attribute=checkpoints.SCORE
            ),
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=[checkpoints.Keeper(folder), *callbacks],
            worker_runtime_env={"env_vars": _environment(on_gpu)},
            # Ray would print each report and checkpoint; the loop prints what counts.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _environment(on_gpu: bool) -> dict[str, str]:
    """What a worker's process has in its environment."""
    environment = {
        **tracking.places(),
        **QUIET,
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        "PYTHONWARNINGS": "ignore",
        # Ray Train would say each line twice: once as it is, once by its logger.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment


def export(
    settings: Settings, dataset: DatasetRef, run: RunRef, checkpoint: Any, best: dict[str, float]
) -> None:
    """Publish a model directory that plain transformers reads, and the adapter beside it when there is one.
    `best` is what was measured of the checkpoint."""
    task, base = load_task(settings.task), base_directory(settings.model.base)
    with checkpoint.as_directory() as folder:
        model = restore(
            task.build(base, settings, dataset), base, settings.training, Path(folder), run.adapter_uri
        )
    plain_attention(model)
    if settings.data.parts:
        export_parts(settings, dataset, run, model, best)
        return
    with storage.publish(run.model_uri) as folder:
        task.save(model, base, task_file(settings, dataset.fingerprint, best), folder)


def export_parts(
    settings: Settings, dataset: DatasetRef, run: RunRef, model: Any, best: dict[str, float]
) -> None:
    """Each part of a multitask run as a finished run of its own, and under the run's `model` what leads to them:
    a configuration for each part, which every later job takes."""
    base, made = base_directory(settings.model.base), dataset.manifest()["parts"]
    runs, configs = {}, {}
    for name in settings.data.parts:
        own, prefix = settings.part(name), f"{name}/"
        measured = {key.removeprefix(prefix): v for key, v in best.items() if key.startswith(prefix)}
        with tracking.start_run("finetune", own) as part:
            part.tag(dataset=made[name], part_of=run.id)
            part.log_metrics({f"best/{key}": value for key, value in measured.items()})
            with storage.publish(part.ref.model_uri) as folder:
                info = task_file(own, made[name], measured)
                load_task(own.task).save(model.alone(name, base, settings), base, info, folder)
        runs[name] = part.ref.id
        configs[name] = yaml.safe_dump(own.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    with storage.publish(run.model_uri) as folder:
        storage.write_json(str(folder / PARTS), runs)
        for name, text in configs.items():
            (folder / f"{name}.yaml").write_text(text)


def task_file(settings: Settings, dataset: str, best: dict[str, float]) -> TaskFile:
    """task.json of a model that was trained on the dataset of this fingerprint."""
    own = settings.model.recommender
    return TaskFile(
        task=settings.task,
        labels=load_task(settings.task).classes(settings.data),
        max_length=settings.model.max_length,
        base=settings.model.base,
        dataset=dataset,
        case_markers=settings.model.case_markers,
        chat_template=settings.model.chat_template,
        temperature=best.get("temperature", 1.0),
        new_bias=best.get("new_bias", 0.0) if own.new_bias is None else own.new_bias,
        heads={
            name: {"labels": head.label_names, "temperature": best.get(f"{name}/temperature", 1.0)}
            for name, head in settings.data.heads.items()
        },
    )
