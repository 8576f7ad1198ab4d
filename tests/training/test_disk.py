"""What is swapped to a disk trains to the same, goes on from a checkpoint and is exported as what lies in the host's
memory; nothing that a killed process left is in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.errors import ResourceError, StorageError
from lib.settings import TrainingSettings
from lib.training import disk, zero
from tests.training.engines import Job, build, ids, run, save_llama
from tests.training.ranks import Ranks

WORDS = "AutoModelForCausalLM"
CHILD = """
import sys
from pathlib import Path
from lib.settings import TrainingSettings
from lib.training import disk
disk._build = lambda: None
disk.check = lambda training: None
training = TrainingSettings(zero_stage=3, offload="all", offload_path=sys.argv[1])
disk.prepare(training)
(disk.folder(training) / "states").write_text("x")
print("ready", flush=True)
sys.stdin.read()
"""


def with_path(path: Path) -> TrainingSettings:
    return TrainingSettings(zero_stage=3, offload="all", offload_path=str(path))


def test_what_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ResourceError, match=r"training.offload_path needs DeepSpeed's async_io operator"):
        disk.check(with_path(Path("/nvme")))
    disk.check(TrainingSettings(zero_stage=3, offload="all"))


def child(path: Path) -> subprocess.Popen[str]:
    """Another worker's process, which has its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_worker_left_goes_and_what_a_living_one_has_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_build", lambda: None)
    monkeypatch.setattr(disk, "check", lambda training: None)
    killed, living = child(tmp_path), child(tmp_path)
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    third = child(tmp_path)
    names = {path.name.rpartition("-")[2] for path in tmp_path.iterdir()}
    assert names == {str(living.pid), str(third.pid)}
    for process in (living, third):
        process.communicate("")  # ends by itself
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_build", lambda: None)
    monkeypatch.setattr(disk, "check", lambda training: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"training.offload_path .*/file on .*: Not a directory"):
        disk.prepare(with_path(tmp_path / "file"))


def test_a_build_that_was_killed_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops import op_builder

    found: list[tuple[str, bool]] = []

    class Builder:
        name = "async_io"

        def load(self, verbose: bool) -> None:
            ours = (tmp_path / "async_io.whorl-lock").open("w")
            with pytest.raises(BlockingIOError):
                fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append((self.name, (tmp_path / "async_io" / "lock").exists()))

    (tmp_path / "async_io").mkdir()
    (tmp_path / "async_io" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(op_builder, "AsyncIOBuilder", Builder)
    monkeypatch.setattr(op_builder, "PinMemoryBuilder", Builder)
    disk._build()
    assert found == [("async_io", False)] * 2


def test_a_disk_without_room_is_told_and_kills_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.arange(6.0).view(2, 3)
    mapped = disk._in_file(numbers, tmp_path / "room")
    assert torch.equal(mapped, numbers)
    assert (tmp_path / "room").stat().st_size == 24

    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        StorageError, match=r"no room in .* \(training.offload_path\) .*: No space left on device"
    ):
        disk._in_file(numbers, tmp_path / "none")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 1.5 M parameters: DeepSpeed swaps nothing of less than a MiB."""
    size = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 640}
    return save_llama(tmp_path_factory.mktemp("wide-llama"), **size)


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's operator, compiled before ranks are asked to answer within some minutes: that takes longer."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio's headers are not installed")
    disk._build()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_a_disk_gives_what_the_host_does(
    offload: str, async_io: None, pair: Ranks, wide_llama: Path, tmp_path: Path
) -> None:
    deepspeed = {
        "zero_optimization": {"stage3_param_persistence_threshold": 8, "sub_group_size": 300_000},
    }
    host: dict[str, Any] = {
        "zero_stage": 3,
        "offload": offload,
        "learning_rate": 1e-3,
        "deepspeed": deepspeed,
    }
    swapped = {**host, "offload_path": str(tmp_path / "disk")}
    expected = pair.run(run, Job(wide_llama, WORDS, host, steps=4))
    never = pair.run(run, Job(wide_llama, WORDS, swapped, steps=4, to=tmp_path / "whole"))
    pair.run(run, Job(wide_llama, WORDS, swapped, to=tmp_path / "half", steps=2))
    rest = pair.run(run, Job(wide_llama, WORDS, swapped, came_from=tmp_path / "half", steps=2, first=2))
    for whole, theirs, resumed in zip(never, expected, rest, strict=True):
        assert whole.losses == pytest.approx(theirs.losses, abs=1e-6)
        assert torch.allclose(whole.logits, theirs.logits, atol=1e-5)
        assert resumed.losses == whole.losses[2:]
        assert torch.equal(resumed.logits, whole.logits)
    assert list((tmp_path / "disk").rglob("*.swp")), "nothing was large enough to be swapped"
    # What is exported is read from the same file.
    model = build(wide_llama, WORDS)
    model.load_state_dict(dict(zero.tensors(tmp_path / "whole")))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids(0)).logits
    assert torch.allclose(logits, never[0].logits, atol=1e-5)
