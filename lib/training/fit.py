"""The driver's side of a fine-tuning run: checks, Ray Train, the export of the best checkpoint."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.train
from ray.train import CheckpointConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lib import storage, tracking
from lib.artifacts import DatasetRef, RunRef, TaskFile
from lib.base_models import base_directory
from lib.command import QUIET
from lib.errors import DataError, ResourceError
from lib.settings import Settings
from lib.tasks import load_task
from lib.training import batches, loop
from lib.training.dropout import plain_attention


@dataclass(frozen=True)
class Fit:
    """What came of a run: the exported model and rank 0's summary (`loop.Loop.summary`)."""

    model_uri: str
    summary: dict[str, Any]


def fit(settings: Settings, dataset: DatasetRef, run: tracking.Run) -> Fit:
    """Train on `dataset`, keep the best checkpoint, export it to the run's model directory.

    Raises ResourceError when the cluster is too small, DataError for an empty dataset, ModelError for a
    base that cannot be used; nothing is started then.
    """
    manifest = dataset.manifest()
    base_directory(settings.model.base)
    check_resources(settings)
    if manifest["splits"]["train"]["rows"] < settings.training.workers:
        raise DataError(
            f"dataset {dataset.name}/{dataset.fingerprint} has {manifest['splits']['train']['rows']} training "
            f"rows for {settings.training.workers} workers; give it more rows or lower training.workers"
        )
    result = _trainer(settings, dataset, run.ref).fit()
    export(settings, dataset, run.ref, result.checkpoint)
    storage.remove(run.ref.checkpoints_uri)
    return Fit(run.ref.model_uri, result.return_value)


def check_resources(settings: Settings) -> None:
    """More workers than the cluster has slots would wait for ever without a word."""
    training, total = settings.training, ray.cluster_resources()
    for kind, each in (("CPU", training.cpus_per_worker), ("GPU", training.gpus_per_worker)):
        # One slot beside the workers: the reads that feed them must find a place.
        needed = training.workers * each + (1 if kind == "CPU" else 0)
        if each and needed > total.get(kind, 0):
            raise ResourceError(
                f"training.workers {training.workers} need {needed:g} {kind} slots ({each:g} each"
                f"{', one more to read data' if kind == 'CPU' else ''}) and the cluster has "
                f"{total.get(kind, 0):g}; lower training.workers or start a larger cluster"
            )


def _trainer(settings: Settings, dataset: DatasetRef, run: RunRef) -> TorchTrainer:
    training = settings.training
    on_gpu = training.gpus_per_worker > 0
    per_worker: dict[str, float] = {"CPU": training.cpus_per_worker}
    if on_gpu:
        per_worker["GPU"] = training.gpus_per_worker
    environment = {
        **tracking.places(),
        **QUIET,
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        if name in os.environ:
            environment[name] = os.environ[name]
    ray.data.DataContext.get_current().enable_progress_bars = False  # the training bar shows the same rows
    return TorchTrainer(
        loop.train,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "dataset": dataclasses.asdict(dataset),
            "run": dataclasses.asdict(run),
        },
        # Split in equal shares, which may leave out a row or two; validation reads its split whole.
        datasets={"train": _read(dataset, training.workers)},
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=on_gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=run.id,
            storage_path=run.checkpoints_uri,
            # A checkpoint is reported only when it is the best so far, so the latest is the best.
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": environment},
            # Ray would print each report and checkpoint; the loop prints what counts.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _read(dataset: DatasetRef, workers: int) -> ray.data.Dataset:
    """The training shards as a lazy Ray dataset, without the columns that training does not read."""
    shards = dataset.shards("train")
    return ray.data.read_parquet(
        shards, columns=batches.columns(shards[0]), override_num_blocks=max(len(shards), workers)
    )


def export(settings: Settings, dataset: DatasetRef, run: RunRef, checkpoint: Any) -> None:
    """Publish a model directory that plain transformers reads."""
    task, base = load_task(settings.task), base_directory(settings.model.base)
    model = task.build(base, settings)
    model.load_state_dict(loop.joined_checkpoint(checkpoint), strict=False)
    plain_attention(model)
    info = TaskFile(
        task=settings.task,
        labels=task.classes(settings.data),
        max_length=settings.model.max_length,
        base=settings.model.base,
        dataset=dataset.fingerprint,
    )
    with storage.publish(run.model_uri) as folder:
        task.save(model, base, info, folder)
