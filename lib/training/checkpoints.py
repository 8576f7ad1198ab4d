"""What a run goes on from after its workers, its driver or a node were killed.

    runs/RUN_ID/checkpoints/RUN_ID/
        checkpoint_manager_snapshot.json   Ray Train's record of the committed checkpoints
        step_000150/engine/                DeepSpeed's files, each worker's part: weights, optimiser, fp32 masters
        step_000150/loop.json              State: what all workers share
        step_000150/worker_00001.json      Own: counters and random state of each worker

Every worker writes its part to its node's disk and trains on; Ray Train brings the parts to storage in the
background and commits the checkpoint when all are there (within two seconds after). What is not in the
record was never whole, and the next start removes it. All but DeepSpeed's own files is JSON, and those are
the run's own and never a user's, which is why they may be unpickled.

Imports neither torch nor DeepSpeed: Ray Train's controller and its data side read these records too.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, UserCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as RECORD

from lib import storage
from lib.artifacts import RunRef
from lib.errors import StorageError, unwrap

ENGINE = "engine"
STATE = "loop.json"
FORMAT = 1
# A copy of Ray's record, which Ray itself overwrites in place: a driver killed in that moment, or a full
# disk, leaves it empty.
RECORD_COPY = "checkpoint_manager_snapshot.last.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
# By this a checkpoint is ranked: the best ones carry their step, so that the last of them is the best.
SCORE = "best_step"


@dataclass(frozen=True)
class Position:
    """Where in the data the next step begins: everything before it was trained, nothing after it."""

    epoch: int = 0
    start: int = 0
    """First row of the round (lib.training.windows), counted through the shards."""
    steps: int = 0
    """Optimiser steps of the round that are done."""
    following: int = 0
    """First row of the round after it; known inside a round."""
    left: tuple[int, ...] = ()
    """Numbers of the round's rows, when it is what another number of workers left of one."""


@dataclass
class State:
    """What all workers share."""

    world: int
    position: Position = Position()
    step: int = 0
    seen: float = 0.0
    """Rows that all workers have seen; the learning rate follows it."""
    seconds: float = 0.0
    saves: int = 0
    saving_seconds: float = 0.0
    """How long the training stood still for its checkpoints; uploads go on beside it."""
    bad: int = 0
    """Validations since the best one."""
    best: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    """Steps whose checkpoints the run went on from."""

    def write(self, folder: Path) -> None:
        storage.write_json(str(folder / STATE), {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: str) -> State:
        """Raises StorageError when the file is absent or of a format that this code does not know."""
        path = storage.join(folder, STATE)
        values = storage.read_json(path)
        if values.pop("format", None) != FORMAT:
            raise StorageError(f"{path} is not of format {FORMAT}; train anew with this version of Whorl")
        position = values["position"]
        return cls(**{**values, "position": Position(**{**position, "left": tuple(position["left"])})})

    def position_for(self, world: int, folder: str) -> Position:
        """Where `world` workers begin that go on from the checkpoint in `folder`.

        Windows and batches depend on the number of workers. Another number of them begins with a round of
        the rows that were left of the round: no row comes twice, and fewer than the workers are left out.
        """
        if world == self.world or not self.position.steps:
            return self.position
        left = sorted(row for rank in range(self.world) for row in Own.read(folder, rank).left)
        at = self.position
        return Position(at.epoch, at.start, 0, at.following, tuple(left))


@dataclass
class Own:
    """What each worker has of its own."""

    rows: int = 0
    tokens: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    """Summed loss and weight of the steps since the last record of the history."""
    random: dict[str, Any] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    """Numbers of the rows of this worker's window that it has still to train."""

    def write(self, folder: Path, rank: int) -> None:
        storage.write_json(str(folder / _own_file(rank)), asdict(self))

    @classmethod
    def read(cls, folder: str, rank: int) -> Own:
        values = storage.read_json(storage.join(folder, _own_file(rank)))
        return cls(**{**values, "losses": [(s, w) for s, w in values["losses"]]})

    @classmethod
    def share(cls, folder: str, rank: int, world: int, saved_world: int) -> Own:
        """This worker's part of a checkpoint that `saved_world` workers wrote.

        With another number of workers the counters go to the first, so that their sums stay what they
        were; random states belong to the workers that there were, and none is given.
        """
        if world == saved_world:
            return cls.read(folder, rank)
        if rank:
            return cls()
        parts = [cls.read(folder, i) for i in range(saved_world)]
        pending = zip(*(p.losses for p in parts), strict=True)
        # Losses are sums over a worker's rows; the weight of a step counts the rows of all of them.
        losses = [(sum(s for s, _ in step), step[0][1]) for step in pending]
        return cls(sum(p.rows for p in parts), sum(p.tokens for p in parts), losses)


def _own_file(rank: int) -> str:
    return f"worker_{rank:05d}.json"


@dataclass(frozen=True)
class Part:
    """A part of a training that is a Ray Train run of its own (population based training has many)."""

    name: str
    begin: str | None
    """The checkpoint that it begins from, which may be another run's."""
    until: int
    """Number of the validation that ends it."""


def run_folder(run: RunRef, part: Part | None = None) -> str:
    """Where Ray Train keeps a run's checkpoints and its record of them."""
    return storage.join(run.checkpoints_uri, part.name if part else run.id)


def committed(folder: str) -> list[str]:
    """Names of the whole checkpoints of a run folder, the latest last; the others from worst to best."""
    path = storage.join(folder, RECORD)
    if not storage.exists(path):
        return []
    record = storage.read_json(path)
    names = [result["checkpoint_dir_name"] for result in record["checkpoint_results"]]
    latest = record["latest_checkpoint_result"]
    last = latest["checkpoint_dir_name"] if latest else None
    return [n for n in names if n != last] + ([last] if last else [])


def latest_state(folder: str) -> State | None:
    """The state in the checkpoint that workers start from; None before the first is committed."""
    names = committed(folder)
    return State.read(storage.join(folder, names[-1])) if names else None


def latest_position(folder: str, world: int, begin: str | None = None) -> Position:
    """Where in the data `world` workers begin that go on from the latest checkpoint of a run folder.

    `begin` is the checkpoint that the run itself began from, if it did from one.
    """
    names = committed(folder)
    latest = storage.join(folder, names[-1]) if names else begin
    return State.read(latest).position_for(world, latest) if latest else Position()


def mend_record(folder: str) -> None:
    """Put the copy of Ray's record back when the record itself was cut off while it was written."""
    path, copy = storage.join(folder, RECORD), storage.join(folder, RECORD_COPY)
    if not storage.exists(path):
        return
    with suppress(StorageError):
        storage.read_json(path)
        return
    # Without a copy the very first record was being written, and nothing was committed before it.
    if storage.exists(copy):
        storage.write_bytes(path, storage.read_bytes(copy))
    else:
        storage.remove(path)


def remove_uncommitted(folder: str) -> None:
    """Delete the parts of checkpoints that never became whole: their names may be used again."""
    whole = committed(folder)
    for name in storage.ls(folder):
        if name.startswith("step_") and name not in whole:
            storage.remove(storage.join(folder, name))


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def staging() -> Path:
    """Where the workers of this node write before the upload."""
    # Ray Train gives each run a working directory; nodes on one machine share it.
    return Path.cwd() / f"staging-{ray.get_runtime_context().get_node_id()}"


def leads_node() -> bool:
    """Whether this worker is the first of those that share a staging folder; collective.

    Ray Train's local rank counts by address, and Ray nodes on one machine share theirs.
    """
    import torch.distributed as dist

    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return nodes.index(nodes[dist.get_rank()]) == dist.get_rank()


def save(engine: Any, state: State, own: Own, rank: int, metrics: dict[str, float]) -> None:
    """Write this worker's part and hand it to Ray Train; every worker must call it at the same step.

    Returns before the upload is done. Raises StorageError when this node's disk is full; a full storage
    ends the run later, with the same kind of error.
    """
    staging().mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name_of(state.step)}-", dir=staging()))
    try:
        write_engine(engine, folder, state.step)
        own.write(folder, rank)
        if rank == 0:
            state.write(folder)
    except Exception as error:
        if _is_full(error) or shutil.disk_usage(folder).free < 1 << 20:
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"no space left on {folder.parent} for a checkpoint on its way to storage; free some"
            ) from error
        raise
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=name_of(state.step),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
        checkpoint_upload_fn=_upload,
    )


def write_engine(engine: Any, folder: Path, step: int) -> None:
    """This worker's part of the weights and the optimiser; collective. What is frozen is in the base model."""
    from lib.training import disk  # torch, which processes that only read positions and windows go without

    with disk.whole(engine):
        engine.save_checkpoint(
            str(folder),
            tag=ENGINE,
            client_state={"step": step},
            exclude_frozen_parameters=is_partial(engine.module),
        )


def is_partial(model: Any) -> bool:
    """Whether some parameters are frozen."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def report(metrics: dict[str, float]) -> None:
    """Tell Ray Train figures that no checkpoint goes with, without waiting for an upload before them."""
    ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


def _upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Ray Train's own upload, with a full disk told in one line."""
    place = ray.train.get_context().get_storage()
    try:
        return place.persist_current_checkpoint(checkpoint, name)
    except OSError as error:
        if not _is_full(error):
            raise
        # The part that fitted is of no use, and the disk may be needed to write down how the run ended.
        with suppress(OSError):
            place.storage_filesystem.delete_dir(place.build_checkpoint_path_from_name(name))
        raise no_space(place.experiment_fs_path) from error


def no_space(folder: str) -> StorageError:
    """One line for a run folder whose disk is full."""
    return StorageError(
        f"no space left for a checkpoint at {folder}; the earlier ones are whole: free some space, then go on "
        f"with --training.resume {folder.rsplit('/', 1)[-1]}"
    )


def _is_full(error: BaseException | None) -> bool:
    """True when a full disk or quota is behind `error`; pyarrow and torch keep it in the text alone."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, (OSError, RuntimeError)) and (
            "No space left" in str(error) or "Disk quota exceeded" in str(error)
        ):
            return True
        error = getattr(error, "controller_failure", None) or error.__cause__ or error.__context__
    return False


def full_disk(error: BaseException, run: RunRef) -> StorageError | None:
    """One line for a run that Ray Train ended because its record could not be written."""
    return no_space(run_folder(run)) if _is_full(error) else None


class Keeper(UserCallback):
    """In Ray Train's controller: keeps the record's copy, and ends a run that a retry cannot help."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        record = storage.read_bytes(storage.join(self.folder, RECORD))
        try:
            storage.write_bytes(storage.join(self.folder, RECORD_COPY), record)
        except StorageError as error:
            if _is_full(error):
                raise no_space(self.folder) from error
            raise

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # What a user can mend (a full disk, a loss that is not finite) would only happen again.
        for error in worker_exceptions.values():
            if ours := unwrap(error):
                raise ours


@contextmanager
def opened(begin: str | None = None) -> Iterator[str | None]:
    """The checkpoint that this worker starts from, as a local folder; None for a run's first start.

    `begin` is where a run starts that has no checkpoint of its own yet.
    """
    checkpoint = ray.train.get_checkpoint() or (Checkpoint(begin) if begin else None)
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield folder


def random_state() -> dict[str, Any]:
    """State of torch's, NumPy's and Python's global generators in this process."""
    import torch

    numbers = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": numbers
        | {"state": {"key": numbers["state"]["key"].tolist(), "pos": numbers["state"]["pos"]}},
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(_bytes(state["torch"]))
    numbers = state["numpy"]
    words = {**numbers["state"], "key": np.array(numbers["state"]["key"], np.uint32)}
    np.random.set_state({**numbers, "state": words})
    version, integers, gauss = state["python"]
    random.setstate((version, tuple(integers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
