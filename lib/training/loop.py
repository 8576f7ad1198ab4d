"""What each Ray Train worker runs: steps, validation, early stopping, checkpoints, going on from one.

The loss of a step is the sum over all rows of all workers, divided by their weight, whatever the
number of rows in each batch: the gradient is that of one big batch. The learning rate follows the share
of the rows that were seen, not a count of steps, since batches are cut by tokens.
"""

from __future__ import annotations

import logging
import math
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution import context

from lib import tracking
from lib.artifacts import DatasetRef, RunRef
from lib.base_models import base_directory
from lib.direction import gain
from lib.errors import ConfigError
from lib.settings import Settings, TrainingSettings
from lib.tasks import Task, deciding_metric, load_task, packs
from lib.training import batches, checkpoints, disk, trainable, windows, zero
from lib.training.checkpoints import Own, State
from lib.training.dropout import use_fast_dropout
from lib.training.logged import Logged

# Validation keeps no gradients, so its batches may be larger.
VALIDATION_BATCH = 4


def train(config: dict[str, Any]) -> dict[str, Any]:
    """A worker, from start to end. Returns what `Loop.summary` says (the same on every worker)."""
    settings = Settings.model_validate(config["settings"])
    # It tells of each report, under a name that RunConfig's log level does not reach.
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    training = settings.training
    dataset, ref = DatasetRef(**config["dataset"]), RunRef(**config["run"])
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, round(training.cpus_per_worker)))
    if checkpoints.leads_node():  # what workers that were killed have left
        shutil.rmtree(checkpoints.staging(), ignore_errors=True)
    if rank == 0:
        checkpoints.remove_uncommitted(config["checkpoints"])
    manifest = dataset.manifest()
    with checkpoints.opened(config["begin"]) as folder:
        state = State.read(folder) if folder else State(world)
        if rank == 0 and folder:
            then = f", saved by {state.world} workers" if state.world != world else ""
            print(f"goes on from the checkpoint of step {state.step}{then}", flush=True)
        if folder:
            state.resumed.append(state.step)
        own = Own.share(folder, rank, world, state.world) if folder else Own()
        begin = state.position_for(world, folder) if folder else state.position
        coming = windows.Coming(manifest["splits"]["train"]["rows"], training, world, begin)
        engine = start_engine(settings, dataset, state, folder, world)
    state.world, state.position = world, begin
    task = load_task(settings.task)
    run = tracking.attach(ref) if rank == 0 else None
    balance, validation = task.balance(manifest, settings), dataset.shards("validation")
    loop = Loop(
        engine, task, settings, balance, coming, state, own, run, validation,
        terminal=config["terminal"], until=config["until"],
    )  # fmt: skip
    try:
        return loop.run_all()
    finally:
        disk.leave(training)


def start_engine(
    settings: Settings, dataset: DatasetRef, state: State, folder: str | None, world: int
) -> Any:
    """A DeepSpeed engine as it was when the checkpoint in `folder` was saved; a new one without."""
    seed, rank = settings.training.seed, dist.get_rank()
    # Ranks must not drop the same elements.
    if folder is None:
        engine = build_engine(settings, dataset)
        torch.manual_seed(seed * 1000 + rank)
        return engine
    source = Path(folder)
    universal = state.world != world and zero.is_divided(source)
    if universal and settings.training.offload_path:
        raise ConfigError(
            f"the checkpoint is one of {state.world} workers and there are {world}; with training.offload_path go on "
            f"with as many, or leave it out until the next checkpoint"
        )
    if universal:
        source = checkpoints.staging() / "universal"
        if checkpoints.leads_node():
            zero.to_universal(Path(folder), source)
        dist.barrier()
    engine = build_engine(settings, dataset, universal)
    zero.load(engine, source)
    if universal:
        dist.barrier()
        shutil.rmtree(source, ignore_errors=True)
    # The same number of workers gets its random states back (Loop); others start new ones.
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, state.step]).generate_state(1)[0]))
    return engine


def build_engine(settings: Settings, dataset: DatasetRef, universal: bool = False) -> Any:
    """A DeepSpeed engine around the base model, what is not trained frozen; the same on every rank."""
    training, base = settings.training, base_directory(settings.model.base)
    torch.manual_seed(training.seed)
    disk.prepare(training)
    with zero.divided(training):
        model = load_task(settings.task).build(base, settings, dataset)
        model = trainable.prepare(model, base, training)
    if not torch.cuda.is_available():
        use_fast_dropout(model)
    return zero.initialize(model, training, universal, base)


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


@dataclass
class Loop:
    """One worker while it trains. `run` is the tracked run on rank 0, None on the others."""

    engine: Any
    task: Task
    settings: Settings
    balance: dict[str, float]
    coming: windows.Coming
    state: State
    own: Own
    run: tracking.Run | None
    validation: list[str] = field(default_factory=list)
    terminal: bool = False
    until: int | None = None
    """Number of the validation that ends this part of the training; None: it goes to its end."""

    def __post_init__(self) -> None:
        self.training, self.metric = self.settings.training, deciding_metric(self.settings)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = self.engine.device
        model = self.engine.module
        self.pad = int(getattr(model.config, "pad_token_id", None) or 0)
        self.ended = self._is_over()
        self.rows_in_all = self.training.epochs * self.coming.total
        self.logged = Logged(self.run, self.rows_in_all, self.state, self.terminal)
        if self.own.random:
            checkpoints.set_random_state(self.own.random)

    def run_all(self) -> dict[str, Any]:
        began = time.perf_counter()
        for group in self._groups():
            self._step(group)
            step, epoch_ends = self.state.step, group.ends_epoch
            last = group.ends_training or step == self.training.max_steps
            validates = last or self._is_due(self.training.validate_every, step, epoch_ends)
            if last or epoch_ends or step % self.training.log_every == 0:
                self.state.seconds += time.perf_counter() - began
                self._log()
                began = time.perf_counter()
            saves = self._is_due(self.training.checkpoint_every, step, validates)
            if validates or saves:
                self.state.seconds += time.perf_counter() - began
                better = validates and self._validate(group.epoch)
                last = last or self._is_stopped()
                pauses = not last and self._is_due_to_pause()
                if saves or better or last or pauses:
                    self.own.left = group.rows_left()
                    self._save(better)
                elif validates:
                    checkpoints.report(self.state.validations[-1])
                began = time.perf_counter()
                if pauses:
                    break
            if last:
                self.ended = True
                break
        self.logged.close()
        return self.summary()

    @staticmethod
    def _is_due(every: str | int, step: int, event: bool) -> bool:
        """Whether what happens every so many steps, or else with an event, happens after this step."""
        return step % every == 0 if isinstance(every, int) else event

    def _is_stopped(self) -> bool:
        patience = self.training.patience
        return patience is not None and self.state.bad >= patience

    def _is_over(self) -> bool:
        """Whether the checkpoint that this goes on from was the training's last."""
        return not self.coming.rounds or self._is_stopped() or self.state.step == self.training.max_steps

    def _is_due_to_pause(self) -> bool:
        return self.until is not None and len(self.state.validations) >= self.until

    def _groups(self) -> Iterator[windows.Group]:
        """One optimiser step after another, until the last epoch ends."""
        if self.ended or self._is_due_to_pause():
            return
        skip = self.coming.skip
        for of, window in self.coming.tables():
            planned = batches.plan_window(
                window,
                self.training.tokens_per_batch,
                np.random.default_rng([self.training.seed, of.epoch, of.start]),
                lambda rows: self.task.weight(rows, self.settings, self.balance),
                self._largest,
                self._sum,
                self.settings.model.max_length if packs(self.settings) else None,
            )
            for index in range(skip, -(-len(planned) // self.training.accumulation)):
                yield self.coming.group(of, planned, index)
            skip = 0

    def _step(self, group: windows.Group) -> None:
        """One optimiser step."""
        self.engine.train()
        self._set_learning_rate()
        weight = max(sum(p.weight for p in group.micro_batches), 1e-12)
        summed = 0.0
        for planned in group.micro_batches:
            batch = self._to_device(self.task.collate(planned.rows, self.pad))
            loss, _ = self.task.loss(self.engine, batch, self.settings, self.balance)
            # DeepSpeed averages over workers; the loss is one sum over all of them.
            self.engine.backward(loss * (self.world / weight), scale_wrt_gas=False)
            summed += float(loss.detach())
            self.own.rows += planned.rows.num_rows
            self.own.tokens += int(np.sum(planned.rows["length"].to_numpy()))
        self.engine.step()
        self.own.losses.append((summed, weight))
        self.state.step += 1
        self.state.position, self.state.seen = group.position, group.seen

    def _set_learning_rate(self) -> None:
        progress = min(self.state.seen / self.rows_in_all, 1.0)
        if self.training.max_steps:
            progress = max(progress, self.state.step / self.training.max_steps)
        rate = learning_rate(self.training, progress)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def _log(self) -> None:
        """Add the mean loss since the last record, and what goes with it, to the history."""
        losses = self.own.losses
        total = self._sum(np.array([sum(s for s, _ in losses), self.own.tokens]))
        loss = float(total[0]) / max(sum(w for _, w in losses), 1e-12)
        step = self.state.step
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss became {loss} at step {step}; lower training.learning_rate "
                f"(now {self.training.learning_rate:g}) or set training.precision fp32"
            )
        norm = self.engine.get_global_grad_norm()
        record = {
            "step": step,
            "epoch": self.state.seen / self.coming.total,
            "loss": loss,
            "learning_rate": max(group["lr"] for group in self.engine.optimizer.param_groups),
            "gradient_norm": float(norm) if norm is not None else 0.0,
            "tokens_per_second": float(total[1]) / max(self.state.seconds, 1e-9),
            "memory_gib": peak_memory_gib(),
        }
        self.own.losses = []
        self.state.history.append(record)
        self.logged.training(record, self.state.seen)

    def _validate(self, epoch: int) -> bool:
        """Measure on the validation split; True when nothing before was better."""
        metrics = self._measure() if self.validation else {}
        name = self.metric
        if metrics and name not in metrics:
            raise ConfigError(
                f"training.metric {name!r} is not measured (known: {', '.join(sorted(metrics))})"
            )
        number = len(self.state.validations) + 1
        record = {"step": self.state.step, "epoch": epoch + 1, "validation": number, **metrics}
        self.state.validations.append(record)
        better = self._is_better(metrics)
        self.state.bad = 0 if better else self.state.bad + 1
        if better:
            self.state.best = record
        self.logged.validation(self.state.step, metrics, better)
        return better

    def _is_better(self, metrics: dict[str, float]) -> bool:
        best = self.state.best
        if not metrics or not best:
            return True
        return gain(self.metric, metrics[self.metric], than=best[self.metric]) > self.training.min_delta

    def _save(self, best: bool) -> None:
        self.own.random = checkpoints.random_state()
        measured = self.state.validations[-1] if self.state.validations else {}
        metrics = {**measured, "step": self.state.step, checkpoints.SCORE: self.state.step if best else 0}
        began = time.perf_counter()
        checkpoints.save(self.engine, self.state, self.own, self.rank, metrics)
        self.state.saves += 1
        self.state.saving_seconds += time.perf_counter() - began

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
        # A batch of several data sets may hold no row of one of them, and then no output of it.
        keys = dict.fromkeys(key for part in joined for key in part)
        merged = {key: np.concatenate([part[key] for part in joined if key in part]) for key in keys}
        total = self._sum(sums)
        return {"loss": float(total[0] / total[1]), **self.task.metrics(merged)}

    def summary(self) -> dict[str, Any]:
        """Totals over all workers; seconds are this worker's, without start-up, validation and checkpoints."""
        memory: list[Any] = [None] * self.world
        dist.all_gather_object(memory, peak_memory_gib())
        total = self._sum(np.array([self.own.rows, self.own.tokens], np.float64))
        return {
            "steps": self.state.step,
            "rows": int(total[0]),
            "tokens": int(total[1]),
            "seconds": self.state.seconds,
            "saves": self.state.saves,
            "saving_seconds": self.state.saving_seconds,
            "best": self.state.best,
            "stopped_early": self._is_stopped(),
            "ended": self.ended,
            "resumed": self.state.resumed,
            "peak_memory_gib": memory,
            "precision": zero.precision(self.training),
            "history": self.state.history,
            "validations": self.state.validations,
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
