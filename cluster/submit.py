"""Run a job of this checkout on a cluster that is somewhere else, as `ray job submit` does, and be told how it ended.

    python -m cluster.submit [--address https://ray.example.com] -- jobs.finetune --config jobs/configs/reviews.yaml --training.resume auto

The working tree goes along as git would take it: neither `.git` nor what `.gitignore` names, such as .venv and .whorl. How
much that is is looked at before anything is sent. The job's words appear here as they come; its exit code is this
command's; Ctrl-C stops it and waits until it has stopped (130). Where the connection is lost the job goes on, and the
command comes back to it. Files and rows are the cluster's own (its WHORL_STORAGE and WHORL_DATABASE): what was cut off goes
on from there when it is submitted again with `--training.resume auto`.

The address is that of the dashboard: `--address`, RAY_ADDRESS, or this machine's cluster. The token is Ray's own:
RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or the file of `ray get-auth-token`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib import storage
from lib.command import running_cluster
from lib.errors import ConfigError, ResourceError, WhorlError

# What never goes along, whatever .gitignore says.
EXCLUDES = (".git/", ".venv/", ".whorl/", "__pycache__/")
# Code is small; Ray itself refuses above 512 MiB, once it has packed that much.
MOST_BYTES = 50 * 2**20
LARGEST_SHOWN = 3
# How long a connection may be away, and a job may take to stop.
AWAY_S, STOPS_S = 60.0, 60.0


def shipped(folder: Path) -> list[Path]:
    """Files of a checkout that go along, as git tells them. Raises ConfigError when it is none."""
    asked = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(asked, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return [
            path
            for path in folder.rglob("*")
            if path.is_file() and not any(f"{part}/" in EXCLUDES for part in path.relative_to(folder).parts)
        ]
    return [folder / name for name in listed.split("\0") if name and (folder / name).is_file()]


def check_size(folder: Path, most: int = MOST_BYTES) -> int:
    """Bytes that go along. Raises ConfigError when they are too many to be code."""
    sizes = {path: path.stat().st_size for path in shipped(folder)}
    total = sum(sizes.values())
    if total > most:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST_SHOWN]
        told = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:,.0f} MB)" for path in largest)
        raise ConfigError(
            f"the working tree has {total / 2**20:,.0f} MB to be sent, {most / 2**20:,.0f} at most: {told}; put data into "
            "storage and its names into .gitignore"
        )
    return total


def connected(address: str | None) -> Any:
    """A client of the jobs API. Raises ResourceError when nothing answers, or refuses."""
    found = running_cluster()
    for key, value in found.get("environment", {}).items():
        os.environ.setdefault(key, value)
    # Without it Ray sends no token, and is refused without a word of why.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    address = address or os.environ.get("RAY_ADDRESS") or found.get("dashboard")
    if not address:
        raise ConfigError("no cluster: name one, --address http://HOST:8265, or start one, cluster.local up")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: the dashboard's URL is wanted, such as http://HOST:8265")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and what its HTTP client does
        said = str(error)
        is_refused = any(sign in said for sign in ("401", "403", "uthentication"))
        why = "the token is missing or wrong: RAY_AUTH_TOKEN" if is_refused else said
        raise ResourceError(f"{address} takes no jobs: {' '.join(why.split())[:300]}") from error
    return client


def entrypoint(words: list[str]) -> str:
    """`jobs.NAME ...` as the command that runs it; any other command as it is. Raises ConfigError for a job that is none."""
    if not words:
        raise ConfigError(
            "nothing to run; say what, such as -- jobs.finetune --config jobs/configs/reviews.yaml"
        )
    if words[0].startswith("jobs."):
        if importlib.util.find_spec(words[0]) is None:
            raise ConfigError(f"there is no {words[0]}; python -m {words[0]} must work here")
        words = ["python", "-m", *words]
    return shlex.join(words)


class Follower:
    """Prints what a job says, each word once, also when the connection was lost meanwhile."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job, self._printed = client, job, 0

    def until_it_ends(self) -> Any:
        """The job's details. Raises ResourceError when the cluster is away for long."""
        away_since: float | None = None
        while True:
            try:
                if self._client.get_job_status(self._job).is_terminal():
                    self._print(self._client.get_job_logs(self._job)[self._printed :])
                    return self._client.get_job_info(self._job)
                away_since = None
                asyncio.run(self._tail())
            except (RuntimeError, OSError) as error:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > AWAY_S:
                    raise ResourceError(
                        f"the cluster does not answer any more ({error}); {self._job} may go on: ray job logs {self._job}"
                    ) from error
                time.sleep(1)

    async def _tail(self) -> None:
        """Of what comes, which is all of it each time, what was not printed."""
        known = self._printed
        async for words in self._client.tail_job_logs(self._job):
            self._print(words[known:])
            known = max(0, known - len(words))

    def _print(self, words: str) -> None:
        sys.stdout.write(words)
        sys.stdout.flush()
        self._printed += len(words)


def stop(client: Any, job: str) -> None:
    """Raises ResourceError when it does not end."""
    print(f"stopping {job}", file=sys.stderr, flush=True)
    client.stop_job(job)
    deadline = time.monotonic() + STOPS_S
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise ResourceError(f"{job} does not stop; see ray job status {job}")
        time.sleep(0.5)


def run(address: str | None, words: list[str], folder: Path = storage.PROJECT) -> int:
    """The job's exit code."""
    command, size = entrypoint(words), check_size(folder)
    client = connected(address)
    with_it = {"working_dir": str(folder), "excludes": list(EXCLUDES)}
    job = client.submit_job(entrypoint=command, runtime_env=with_it)
    print(f"{job}: {command}   ({size / 2**20:.1f} MB of code sent)", file=sys.stderr, flush=True)
    try:
        ended = Follower(client, job).until_it_ends()
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            stop(client, job)
        return 130
    if ended.driver_exit_code:
        return int(ended.driver_exit_code)
    if str(ended.status) != "SUCCEEDED":
        raise ResourceError(f"{job} {str(ended.status).lower()}: {ended.message}")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", help="URL of the cluster's dashboard")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="-- jobs.NAME --config FILE ...")
    given = parser.parse_args()
    words = given.words[1:] if given.words[:1] == ["--"] else given.words
    try:
        sys.exit(run(given.address, words))
    except WhorlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
