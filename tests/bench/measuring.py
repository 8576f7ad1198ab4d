"""A program as it runs: what it says last, and the memory and processor time of all its processes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lib import storage

MIB = 1 << 20

# A dataset of a configuration, on a Ray of its own.
OUR_PROGRAM = """
import json, sys, time
from lib.command import connect
from lib.data.plan import plan
from lib.settings import load_settings

connect()
from lib.data.build import build

start = time.perf_counter()
manifest = build(plan(load_settings(sys.argv[1])), say=lambda line: None)
print(json.dumps({"seconds": time.perf_counter() - start, "manifest": manifest}))
"""


def measure(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a program; the JSON of its last line, the peaks of its processes' memory in bytes, and their
    processor time in seconds."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, env=environment, cwd=storage.PROJECT, stdout=subprocess.PIPE, stderr=log, text=True
        )
        peak = {"process": 0.0, "all": 0.0, "cpu": 0.0}
        sampler = threading.Thread(target=sample, args=(process, peak))
        sampler.start()
        out, _ = process.communicate()
        sampler.join()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{words[0]} failed ({process.returncode}):\n{out}\n{log.read()[-3000:]}")
    return {**json.loads(out.splitlines()[-1]), **peak}


def sample(process: subprocess.Popen[str], peak: dict[str, float], every_s: float = 0.5) -> None:
    """Keep the peaks of memory, and the processor time, of a process and all that it started, until it ends."""
    root = psutil.Process(process.pid)
    cpu: dict[int, float] = {}
    while process.poll() is None:
        private, proportional = [0], [0]
        with suppress(psutil.NoSuchProcess):
            for member in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error, OSError):  # it has just ended
                    times = member.cpu_times()
                    cpu[member.pid] = times.user + times.system
                    private.append(kilobytes(member.pid, "status", "RssAnon") << 10)
                    proportional.append(kilobytes(member.pid, "smaps_rollup", "Pss") << 10)
        peak["process"] = max(peak["process"], *private)
        peak["all"] = max(peak["all"], sum(proportional))
        peak["cpu"] = sum(cpu.values())
        time.sleep(every_s)


def kilobytes(pid: int, file: str, key: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0
