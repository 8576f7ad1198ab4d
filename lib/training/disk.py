"""What `training.offload_path` puts on a node's NVMe disk: its operator, a folder for each worker, and checkpoints.

DeepSpeed 0.19 names the files that it swaps by rank alone, so that two trainings of a node would write into one
another's; here each worker has a folder of its own. Its checkpoints of swapped states are copies of those files: on
loading them it leaves out the weights that the model computes with, the moments of torch's optimisers and whatever is
too small to be swapped, and what else reads checkpoints (zero_to_fp32, ds_to_universal) cannot read them. Here a
checkpoint is what it is without a disk, written and read through mapped files, so that no more than one group of
states is in memory.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lib.errors import ResourceError, StorageError
from lib.settings import TrainingSettings

LOCK = "in-use"
PREFIX = "whorl-"
# What holds the lock of this process's folder: a file that nobody refers to is closed.
_held: list[Any] = []


def check(training: TrainingSettings) -> None:
    """Raises ResourceError when this machine cannot build what reads and writes an NVMe disk asynchronously."""
    if training.offload_path is None:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ResourceError(
            "training.offload_path needs DeepSpeed's async_io operator, which cannot be built here: install "
            "libaio's headers (libaio-dev) and a C++ compiler, or leave offload_path out to use the host's memory"
        )


def prepare(training: TrainingSettings) -> None:
    """On a worker, before a model is read: the operator, which is compiled once on a machine and takes minutes, and
    this process's folder, which goes with it. Raises ResourceError."""
    if training.offload_path is None:
        return
    check(training)
    _build()
    place = folder(training)
    try:
        _sweep(place.parent)
        place.mkdir(parents=True, exist_ok=True)
        held = (place / "new").open("w")
        fcntl.flock(held, fcntl.LOCK_EX)  # let go with the process, however it ends
        (place / "new").rename(place / LOCK)
    except OSError as error:
        raise ResourceError(
            f"training.offload_path {training.offload_path} on {socket.gethostname()}: {error.strerror}"
        ) from error
    atexit.register(leave, training)
    _held.append(held)


def leave(training: TrainingSettings) -> None:
    """Remove this process's folder: Ray kills workers that have come to their end."""
    if training.offload_path is not None:
        shutil.rmtree(folder(training), ignore_errors=True)


def folder(training: TrainingSettings) -> Path:
    """Where this process's states are swapped to."""
    assert training.offload_path is not None
    return Path(training.offload_path) / f"{PREFIX}{socket.gethostname()}-{os.getpid()}"


def _sweep(parent: Path) -> None:
    """Remove what workers that were killed have left."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its worker lives
            shutil.rmtree(lock.parent, ignore_errors=True)


def _build() -> None:
    """One worker of a machine at a time. A build that was killed leaves PyTorch's lock, for which every later one
    would wait without end: whoever holds ours, which ends with its process, knows that nobody holds that one."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
    from torch.utils.cpp_extension import _get_build_directory

    for builder in (PinMemoryBuilder(), AsyncIOBuilder()):
        place = Path(_get_build_directory(builder.name, verbose=False))
        with place.with_suffix(".whorl-lock").open("w") as ours:
            fcntl.flock(ours, fcntl.LOCK_EX)
            (place / "lock").unlink(missing_ok=True)
            if not list(place.glob("*.so")):
                print(
                    f"compiling DeepSpeed's {builder.name} for this machine, once: this takes minutes",
                    flush=True,
                )
            builder.load(verbose=False)


def swaps(engine: Any) -> bool:
    """Whether optimiser states of this engine lie on a disk."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def whole(engine: Any) -> Iterator[None]:
    """While this lasts all optimiser states are there, mapped from files on the same disk, and DeepSpeed saves them as
    it does without one."""
    if not swaps(engine):
        yield
        return
    swapped = engine.optimizer.optimizer_swapper.swap_folder
    mapped: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory(dir=swapped) as scratch, _without_files(engine):
        try:
            for number, flat in _swapped(engine.optimizer):
                engine.optimizer._optimizer_states_and_gradient_swap_in(number)
                tensors = _states(engine.optimizer, flat)
                files = [
                    _in_file(tensor, Path(scratch) / f"{number}-{place}")
                    for place, tensor in enumerate(tensors)
                ]
                engine.optimizer._release_swap_buffers(number)
                for tensor, file in zip(tensors, files, strict=True):
                    tensor.data = file
                mapped += tensors
            yield
        finally:
            for tensor in mapped:
                tensor.data = torch.Tensor()


def load(engine: Any, saved: dict[str, Any]) -> None:
    """This worker's part of a checkpoint, the `optimizer_state_dict` of its file: weights, moments and counts."""
    optimizer = engine.optimizer
    order = optimizer.sub_group_to_group_id
    assert [order[number] for number in sorted(order)] == sorted(order.values())
    moments = saved["optimizer_state_dict"]["state"]
    swapped = {number for number, _ in _swapped(optimizer)}
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        if number in swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        flat.data.copy_(saved["fp32_flat_groups"][number])
        optimizer.optimizer.state[flat] = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in moments.get(number, {}).items()
        }
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if number in swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)


@contextmanager
def without_states(engine: Any) -> Iterator[None]:
    """While this lasts `load_checkpoint(load_optimizer_states=False)` loads what is not swapped, and that alone."""
    with _without_files(engine), _instead(engine.optimizer, "_restore_from_bit16_weights", lambda: None):
        yield


def _without_files(engine: Any) -> AbstractContextManager[None]:
    """DeepSpeed neither copies swapped files into a checkpoint nor out of one."""
    return _instead(engine, "zero_nvme_offload_optimizer", lambda: False)


@contextmanager
def _instead(thing: Any, method: str, other: Callable[[], Any]) -> Iterator[None]:
    setattr(thing, method, other)  # of the object: it hides the one of its class
    try:
        yield
    finally:
        delattr(thing, method)


def _swapped(optimizer: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and flat fp32 weights of each group that is large enough to be swapped."""
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        if optimizer._swappable_optimizer_subgroup(number):
            yield number, flat


def _states(optimizer: Any, flat: torch.Tensor) -> list[torch.Tensor]:
    """Those tensors of a group that are swapped: its weights and moments, not Adam's count."""
    states = optimizer.optimizer.state.get(flat, {}).values()
    return [flat, *(value for value in states if torch.is_tensor(value) and value.numel() == flat.numel())]


def _in_file(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """A copy in a mapped file. Raises StorageError when it does not fit: a mapped file that has no room kills its
    process when it is written to."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, tensor.numel() * tensor.element_size())
    except OSError as error:
        raise StorageError(
            f"no room in {path.parent} (training.offload_path) for a copy of the optimiser's states, which a "
            f"checkpoint is written from: {error.strerror}"
        ) from error
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)
