"""Which model version a replica serves, and the swap to another one without losing a request.

Ray Serve hands a replica its `user_config` (`{"model": "reviews@3"}`, or `"reviews@champion"`) and calls
`reconfigure` when that changes. The new version is loaded beside the old one, which goes on answering;
then requests that begin from now on get the new one, and the old one is closed when its last request is
answered. A version that does not load leaves the old one in place, says why, and is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lib import registry
from lib.artifacts import ModelRef
from lib.errors import RegistryError, unwrap
from lib.registry import parse_reference

logger = logging.getLogger("ray.serve")

RETRY_S = 5.0


class Closable(Protocol):
    def close(self) -> None:
        """Called once, when no request uses the model any more."""


M = TypeVar("M", bound=Closable)


@dataclass
class Loaded(Generic[M]):
    """A model version in memory and the number of requests that are using it."""

    ref: ModelRef
    model: M
    users: int = 0
    retired: bool = False


class Following(Generic[M]):
    """Belongs to one event loop; only `load` runs in a thread."""

    def __init__(self, load: Callable[[Path], M]) -> None:
        self.failed: str | None = None
        """Why the version that was asked for last is not served; None when it is."""
        self._load = load
        self._loaded: Loaded[M] | None = None
        self._retry: asyncio.Task[None] | None = None

    async def follow(self, reference: str) -> None:
        """Serve this version from now on. Returns when it is loaded or has failed to.

        Raises ConfigError when the reference is not of the form NAME@VERSION or NAME@ALIAS.
        """
        parse_reference(reference)
        self.stop()
        if self._loaded is not None and str(self._loaded.ref) == reference:
            self.failed = None
            return
        if not await self._try(reference):
            self._retry = asyncio.create_task(self._keep_trying(reference))

    def stop(self) -> None:
        """Try no more to load what did not load."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def take(self, loaded: Loaded[M]) -> None:
        """Serve what is loaded already, from now on."""
        old, self._loaded, self.failed = self._loaded, loaded, None
        if old is not None:
            old.retired = True
            _close_if_unused(old)
        logger.info("serving %s", loaded.ref)

    @property
    def current(self) -> Loaded[M]:
        """Raises RegistryError when no version was loaded yet."""
        if self._loaded is None:
            raise RegistryError(self.failed or "the model is still loading")
        return self._loaded

    @contextmanager
    def using(self) -> Iterator[Loaded[M]]:
        """The version for one request, which stays open until the request is done."""
        loaded = self.current
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            _close_if_unused(loaded)

    async def _keep_trying(self, reference: str) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if await self._try(reference):
                return

    async def _try(self, reference: str) -> bool:
        try:
            ref, model = await asyncio.to_thread(self._fetch, reference)
        except Exception as error:
            ours = unwrap(error)
            if ours is None:
                logger.exception("loading %s failed", reference)
            self.failed = str(ours) if ours else f"{reference}: {type(error).__name__}: {error}"
            logger.error("%s", self.failed)
            return False
        self.take(Loaded(ref, model))
        return True

    def _fetch(self, reference: str) -> tuple[ModelRef, M]:
        ref = registry.resolve(*parse_reference(reference))
        with registry.open_version(ref) as folder:
            return ref, self._load(folder)


def _close_if_unused(loaded: Loaded[M]) -> None:
    if loaded.retired and loaded.users == 0:
        loaded.model.close()
