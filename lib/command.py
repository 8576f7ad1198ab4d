"""How every command starts and ends: arguments, the connection to Ray, errors as one line and an exit code.

    python -m jobs.NAME --config FILE [--dotted.key value ...]
    python -m serve.deploy --config FILE [--dotted.key value ...]

Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 something the user can mend, 3 a gate that did
not hold and was required, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from lib import storage, tracking
from lib.errors import ConfigError, ResourceError, unwrap
from lib.settings import Settings, load_settings

# Logical CPUs for a Ray of our own. On a small box Train workers, an actor pool and the reads that feed
# them must hold slots at the same time; with as many slots as cores they wait for one another for ever.
MIN_LOGICAL_CPUS = 8
# What libraries say on their own account would bury the lines that count.
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# A cluster of one machine is not drained node by node: each run needs no process that looks out for it.
ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Written by `cluster.local up`: how this machine's cluster is reached.
STATE = storage.PROJECT / ".whorl" / "cluster.json"


def main(job: Callable[[Settings], None], arguments: list[str] | None = None) -> None:
    """Run a job on `sys.argv` and leave the process with its exit code.

    `--help` prints the documentation of the module that `job` stands in.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or "-h" in words or "--help" in words:
        print(textwrap.dedent(sys.modules[job.__module__].__doc__ or "").strip())
        sys.exit(0 if words else 2)
    sys.exit(run(job, words))


def run(job: Callable[[Settings], None], words: list[str]) -> int:
    """Run a job; its exit code instead of an exception."""
    try:
        path, overrides = split_arguments(words)
        job(load_settings(path, overrides))
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        ours = unwrap(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        return ours.exit_code


def split_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The value of `--config` and all other arguments."""
    rest = list(words)
    for i, word in enumerate(rest):
        if word.startswith("--config="):
            del rest[i]
            return word.removeprefix("--config="), rest
        if word == "--config" and i + 1 < len(rest):
            path = rest[i + 1]
            del rest[i : i + 2]
            return path, rest
    raise ConfigError("--config FILE is missing, such as --config jobs/configs/reviews.yaml")


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or the local one (`cluster.local up`), or start a small one.

    Raises ResourceError when a cluster is named but does not answer.
    """
    cluster = running_cluster()
    for key, value in cluster.get("environment", {}).items():
        os.environ.setdefault(key, value)
    address = os.environ.get("RAY_ADDRESS") or cluster.get("address")
    for key, value in (QUIET if address else QUIET | ALONE).items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": True}
    # A submitted job has its environment from the head; a driver elsewhere hands its own on.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"env_vars": tracking.places()}
    if not address:
        cores = os.cpu_count() or 1
        # "local": without an address Ray would look for a cluster that `ray start` once wrote down here, and
        # fail where that one is gone.
        ray.init("local", num_cpus=max(MIN_LOGICAL_CPUS, cores), include_dashboard=False, **options)
        return
    if address.startswith("http"):  # the jobs API's address, as `ray job submit` wants it
        address = cluster.get("address") or "auto"
    try:
        _knock(address)
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}; python -m cluster.local up starts one ({error})"
        ) from error


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at HOST:PORT: Ray would go on trying for ten minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def joins_this_machine() -> bool:
    """Whether `connect` joins or starts a Ray on this machine, as far as can be told without asking one."""
    address = os.environ.get("RAY_ADDRESS") or ""
    host = address.rpartition("://")[2].rpartition(":")[0]
    return not address or host in ("127.0.0.1", "localhost")


def running_cluster() -> dict[str, Any]:
    """What `cluster.local up` wrote about the cluster that it keeps running; empty when there is none."""
    with suppress(FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        found: dict[str, Any] = json.loads(STATE.read_text())
        supervisor = psutil.Process(found["pid"])
        # The process number may have been given to another process since; one that was killed stays in the
        # list where nobody asks for its end.
        if supervisor.create_time() == found["started"] and supervisor.status() != psutil.STATUS_ZOMBIE:
            return found
    return {}
