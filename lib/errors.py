"""Everything a user can get wrong, as one exception tree.

    WhorlError                  exit code 1, HTTP 500
    ├── ConfigError             a key or value of the configuration            exit 2, HTTP 400
    ├── DataError               a source, a file, a row, a column, a label     exit 2, HTTP 400
    ├── StorageError            a URI that cannot be read or written           exit 2, HTTP 503
    ├── ModelError              a model directory that cannot be used          exit 2, HTTP 503
    ├── RegistryError           no such run, version or champion               exit 2, HTTP 503
    ├── ResourceError           CPUs, GPUs, memory, ports                      exit 2, HTTP 503
    ├── RequestError            what a client sent to an endpoint              exit 2, HTTP 400
    └── GateError               a candidate was measured and did not pass      exit 3, HTTP 409

Jobs map an error to its exit code and print its one line (`jobs.main`); applications map it to its
HTTP status. A message names the thing and the mend, and fits on one line. A traceback is for our own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhorlError(Exception):
    """Base of all errors that a user can cause and mend. `str(error)` is always one line."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class ConfigError(WhorlError):
    exit_code = 2
    http_status = 400


class DataError(WhorlError):
    exit_code = 2
    http_status = 400


class StorageError(WhorlError):
    exit_code = 2
    http_status = 503


class ModelError(WhorlError):
    exit_code = 2
    http_status = 503


class RegistryError(WhorlError):
    exit_code = 2
    http_status = 503


class ResourceError(WhorlError):
    exit_code = 2
    http_status = 503


class RequestError(WhorlError):
    """`param` names the part of the request that is at fault, `code` says what is wrong in one word."""

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class GateError(WhorlError):
    exit_code = 3
    http_status = 409


def unwrap(error: BaseException) -> WhorlError | None:
    """The WhorlError inside `error`, or None.

    Ray carries a worker's exception home inside its own (`RayTaskError.cause`, Ray Data's
    `UserCodeException.__cause__`, Ray Train's `WorkerGroupError.worker_failures` and
    `ControllerError.controller_failure`), so the chain is walked without importing ray.
    """
    queue: list[BaseException] = [error]
    seen: set[int] = set()
    found: WhorlError | None = None
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        # Ray makes a class that is both RayTaskError and ours, whose text is a whole traceback:
        # look for the plain one inside first.
        if isinstance(current, WhorlError):
            if not hasattr(current, "cause"):
                return current
            found = found or current
        carried = [getattr(current, name, None) for name in ("cause", "controller_failure")]
        inner = [*carried, current.__cause__, current.__context__]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            inner.extend(failures.values())
        queue.extend(e for e in inner if isinstance(e, BaseException))
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
