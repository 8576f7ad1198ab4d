"""What each Ray Train worker runs: steps, validation, early stopping, checkpoints.

The loss of a step is the sum over all rows of all workers, divided by their weight, whatever the
number of rows in each batch: the gradient is that of one big batch. The learning rate follows the share
of the rows that were seen, not a count of steps, since batches are cut by tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import Checkpoint
from ray.train.v2._internal.execution import context

from lib import tracking
from lib.artifacts import DatasetRef, RunRef
from lib.base_models import base_directory
from lib.errors import ConfigError
from lib.settings import Settings, TrainingSettings
from lib.tasks import Task, load_task
from lib.training import batches, zero
from lib.training.dropout import use_fast_dropout

# Validation keeps no gradients, so its batches may be larger.
VALIDATION_BATCH = 4


def train(config: dict[str, Any]) -> dict[str, Any]:
    """A worker, from start to end. Returns what `Loop.summary` says (the same on every worker)."""
    settings = Settings.model_validate(config["settings"])
    # It tells of each report, under a name that RunConfig's log level does not reach.
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    first = FirstWindow(settings.training.shuffle_rows)
    dataset = DatasetRef(**config["dataset"])
    torch.set_num_threads(max(1, round(settings.training.cpus_per_worker)))
    torch.manual_seed(settings.training.seed)
    task = load_task(settings.task)
    model = task.build(base_directory(settings.model.base), settings)
    if not torch.cuda.is_available():
        use_fast_dropout(model)
    engine = zero.initialize(model, settings.training)
    # Ranks must not drop the same elements.
    torch.manual_seed(settings.training.seed * 1000 + dist.get_rank())
    run = tracking.attach(RunRef(**config["run"])) if dist.get_rank() == 0 else None
    manifest = dataset.manifest()
    loop = Loop(engine, task, settings, task.balance(manifest, settings), run)
    loop.rows_in_all = settings.training.epochs * manifest["splits"]["train"]["rows"]
    loop.first = first
    loop.validation = dataset.shards("validation")
    return loop.run_all()


def learning_rate(training: TrainingSettings, progress: float) -> float:
    """The learning rate after a share `progress` (0 to 1) of the training."""
    if progress < training.warmup:
        return training.learning_rate * progress / training.warmup
    if training.schedule == "constant":
        return training.learning_rate
    done = (progress - training.warmup) / max(1 - training.warmup, 1e-9)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return training.learning_rate * max(0.0, 1 - done)


def training_windows(rows: int) -> Iterator[pa.Table]:
    """This worker's part of the training rows, in tables of `rows` rows."""
    shard = ray.train.get_dataset_shard("train")
    windows: Iterator[pa.Table] = iter(
        shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=1)
    )
    return windows


class FirstWindow:
    """The first epoch's windows, the first of them read while the model is built."""

    def __init__(self, rows: int) -> None:
        self._rest = training_windows(rows)
        self._first = ThreadPoolExecutor(1).submit(lambda: list(itertools.islice(self._rest, 1)))

    def windows(self) -> Iterator[pa.Table]:
        yield from self._first.result()
        yield from self._rest


@dataclass
class Loop:
    """One worker's state while it trains. `run` is the tracked run on rank 0, None on the others."""

    engine: Any
    task: Task
    settings: Settings
    balance: dict[str, float]
    run: tracking.Run | None
    rows_in_all: int = 1
    validation: list[str] = field(default_factory=list)
    first: FirstWindow | None = None
    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    shown: int = 0
    best: dict[str, float] = field(default_factory=dict)
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.training = self.settings.training
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = self.engine.device
        model = self.engine.module
        self.pad = int(getattr(model.config, "pad_token_id", None) or 0)
        self.bar: Any = None

    def run_all(self) -> dict[str, Any]:
        if self.rank == 0:
            self.bar = tqdm_ray.tqdm(total=self.rows_in_all, desc="training", unit="rows")
        stop = False
        for epoch in range(self.training.epochs):
            stop = self._epoch(epoch)
            if stop:
                break
        if self.rank == 0:
            self.bar.close()
        return self.summary()

    def _epoch(self, epoch: int) -> bool:
        """One pass over the data; True when training is over."""
        every = self.training.validate_every
        began = time.perf_counter()
        losses: list[tuple[float, float]] = []
        for group in self._groups(epoch):
            losses.append(self._step(group))
            limit = self.training.max_steps
            last = limit is not None and self.step >= limit
            if self.step % self.training.log_every == 0 or last:
                self.seconds += time.perf_counter() - began
                self._log(losses, epoch)
                began, losses = time.perf_counter(), []
            due = every != "epoch" and self.step % every == 0
            if due or last:
                self.seconds += time.perf_counter() - began
                if self._validate(epoch) or last:
                    return True
                began = time.perf_counter()
        self.seconds += time.perf_counter() - began
        if losses:
            self._log(losses, epoch)
        if every == "epoch":
            return self._validate(epoch)
        measured = bool(self.validations) and self.validations[-1]["step"] == self.step
        return epoch == self.training.epochs - 1 and not measured and self._validate(epoch)

    def _groups(self, epoch: int) -> Iterator[list[batches.Planned]]:
        """The micro-batches of one optimiser step after another."""
        random = np.random.default_rng([self.training.seed, epoch])
        first, self.first = self.first, None
        windows = first.windows() if first else training_windows(self.training.shuffle_rows)
        for window in windows:
            planned = batches.plan_window(
                window,
                self.training.tokens_per_batch,
                random,
                lambda rows: self.task.weight(rows, self.settings, self.balance),
                self._largest,
                self._sum,
            )
            for start in range(0, len(planned), self.training.accumulation):
                yield planned[start : start + self.training.accumulation]

    def _step(self, group: list[batches.Planned]) -> tuple[float, float]:
        """One optimiser step; this worker's summed loss and the weight of all workers' rows."""
        self.engine.train()
        self._set_learning_rate()
        weight = max(sum(p.weight for p in group), 1e-12)
        summed = 0.0
        for planned in group:
            batch = self._to_device(self.task.collate(planned.rows, self.pad))
            loss, _ = self.task.loss(self.engine, batch, self.settings, self.balance)
            # DeepSpeed averages over workers; the loss is one sum over all of them.
            self.engine.backward(loss * (self.world / weight), scale_wrt_gas=False)
            summed += float(loss.detach())
            self.rows += planned.rows.num_rows
            self.tokens += int(np.sum(planned.rows["length"].to_numpy()))
        self.engine.step()
        self.step += 1
        return summed, weight

    def _set_learning_rate(self) -> None:
        progress = min(self.rows * self.world / self.rows_in_all, 1.0)
        if self.training.max_steps:
            progress = max(progress, self.step / self.training.max_steps)
        rate = learning_rate(self.training, progress)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def _log(self, losses: list[tuple[float, float]], epoch: int) -> None:
        total = self._sum(np.array([sum(s for s, _ in losses), self.tokens, self.rows]))
        loss = float(total[0]) / max(sum(w for _, w in losses), 1e-12)
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss became {loss} at step {self.step}; lower training.learning_rate "
                f"(now {self.training.learning_rate:g}) or set training.precision fp32"
            )
        norm = self.engine.get_global_grad_norm()
        record = {
            "step": self.step,
            "epoch": epoch + self.rows * self.world / self.rows_in_all * self.training.epochs % 1,
            "loss": loss,
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "gradient_norm": float(norm) if norm is not None else 0.0,
            "tokens_per_second": float(total[1]) / max(self.seconds, 1e-9),
            "memory_gib": peak_memory_gib(),
        }
        self.history.append(record)
        if self.rank == 0 and self.run is not None:
            values = {f"train/{k}": v for k, v in record.items() if k != "step"}
            self.run.log_metrics(values, self.step)
            self.bar.set_description(f"training, loss {loss:.3f}")
            self.bar.update(int(total[2]) - self.shown)
            self.shown = int(total[2])

    def _validate(self, epoch: int) -> bool:
        """Measure on the validation split, keep the engine if it is the best; True to stop early."""
        metrics = self._measure() if self.validation else {}
        name = self.training.metric
        if metrics and name not in metrics:
            raise ConfigError(
                f"training.metric {name!r} is not measured (known: {', '.join(sorted(metrics))})"
            )
        record = {"step": self.step, "epoch": epoch + 1, **metrics}
        self.validations.append(record)
        better = self._is_better(metrics)
        self.bad = 0 if better else self.bad + 1
        if self.rank == 0 and self.run is not None:
            self.run.log_metrics({f"validation/{k}": v for k, v in metrics.items()}, self.step)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            print(
                f"validation after step {self.step}: {shown}{'  (best so far)' if better else ''}", flush=True
            )
        if better:
            self.best = record
            with tempfile.TemporaryDirectory(prefix="whorl-checkpoint-") as folder:
                zero.save(self.engine, folder, {"step": self.step})
                ray.train.report(record, checkpoint=Checkpoint.from_directory(folder))
        else:
            ray.train.report(record)
        patience = self.training.patience
        return patience is not None and self.bad >= patience

    def _is_better(self, metrics: dict[str, float]) -> bool:
        if not metrics or not self.best:
            return True
        gain = metrics[self.training.metric] - self.best[self.training.metric]
        return (-gain if self.training.metric == "loss" else gain) > self.training.min_delta

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Metrics over the whole validation split; every row is computed on one worker."""
        self.engine.eval()
        outputs: list[dict[str, np.ndarray]] = []
        sums = np.zeros(2)
        rows_held = self.training.shuffle_rows * self.world
        budget = self.training.tokens_per_batch * VALIDATION_BATCH
        for window in batches.read(self.validation, rows_held):
            share = list(batches.in_order(window, budget, self.rank, self.world))
            # Under ZeRO-3 every forward pass is collective: a worker with one batch fewer repeats its last.
            for i in range(self._largest(len(share))):
                rows = share[i] if i < len(share) else window.slice(0, 1)
                batch = self._to_device(self.task.collate(rows, self.pad))
                loss, output = self.task.loss(self.engine, batch, self.settings, self.balance)
                if i < len(share):
                    outputs.append(output)
                    sums += (float(loss), self.task.weight(rows, self.settings, self.balance))
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, outputs)
        joined = [part for worker in gathered for part in worker]
        merged = {key: np.concatenate([part[key] for part in joined]) for key in joined[0]}
        total = self._sum(sums)
        return {"loss": float(total[0] / total[1]), **self.task.metrics(merged)}

    def summary(self) -> dict[str, Any]:
        """Totals over all workers; seconds are this worker's, without start-up and validation."""
        memory: list[Any] = [None] * self.world
        dist.all_gather_object(memory, peak_memory_gib())
        total = self._sum(np.array([self.rows, self.tokens], np.float64))
        return {
            "steps": self.step,
            "rows": int(total[0]),
            "tokens": int(total[1]),
            "seconds": self.seconds,
            "best": self.best,
            "stopped_early": self.training.patience is not None and self.bad >= self.training.patience,
            "peak_memory_gib": memory,
            "precision": zero.precision(self.training),
            "history": self.history,
            "validations": self.validations,
        }

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _largest(self, value: int) -> int:
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def _sum(self, values: np.ndarray) -> np.ndarray:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


def peak_memory_gib() -> float:
    """The most memory this worker has held: on its GPU if it has one, else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def joined_checkpoint(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """fp32 weights of a reported checkpoint."""
    with checkpoint.as_directory() as folder:
        return zero.state_dict(Path(folder))
