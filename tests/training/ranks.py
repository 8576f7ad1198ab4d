"""Processes that are the ranks of a torch.distributed group over gloo, for tests to which Ray is not the point.

They are started once and serve many calls: libraries take longer to load than a tiny model to train.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 280


class Ranks:
    """`size` processes; `run` calls a function of a module in each of them at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        meeting = Path(tempfile.mkdtemp(prefix="whorl-ranks-")) / "meeting"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, self.size, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each rank. Raises AssertionError with the traceback of a rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):  # others take its place: its answer, when it comes, is nobody else's
                self.close()
                self._start()
                raise AssertionError(f"rank {rank} does not answer")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
