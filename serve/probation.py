"""A new version's trial: it is asked what the champion is asked, and nobody waits for it or sees what it says.

With `serving.canary` a replica loads the new version beside the one that answers. Of a share of the requests a copy
goes to it; errors, time, other answers and how far the scores lie apart are summed up in the database over all
replicas (lib/canary.py). When enough was compared the new version takes over, or goes: then the registry's champion is
rolled back, if it is that version. A version that does not load has failed.
"""

# Without `from __future__ import annotations`: Ray Serve reads the annotations of what holds this.

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from lib import canary, registry
from lib.artifacts import ModelRef
from lib.canary import Compared
from lib.errors import WhorlError
from lib.registry import parse_reference
from lib.settings import CanarySettings
from serve.following import Following, Loaded

logger = logging.getLogger("ray.serve")

AWAY = (WhorlError, SQLAlchemyError)
LOOK_S = 1.0
"""How often a replica writes down what it compared, and looks for the verdict."""


class Comparable(Protocol):
    """A model on trial."""

    def close(self) -> None: ...

    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int]: ...

    def differ(self, one: Any, other: Any) -> tuple[bool, float]:
        """Whether two answers to one input disagree, and how far they lie apart, from 0 to 1."""


M = TypeVar("M", bound=Comparable)


class Probation(Generic[M]):
    """One replica's part in a trial. Belongs to one event loop."""

    def __init__(
        self, application: str, settings: CanarySettings, load: Callable[[Path], M], models: Following[M]
    ) -> None:
        self._application = application
        self._settings = settings
        self._load = load
        self._models = models
        self._ref: ModelRef | None = None
        self._loaded: Loaded[M] | None = None
        self._compared, self._total = Compared(), 0
        self._asking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def told(self) -> str | None:
        """How far the trial is; None without one."""
        if self._ref is None:
            return None
        return f"{self._ref}: {self._total} of {self._settings.requests} requests compared"

    async def follow(self, reference: str, instead_of: str) -> None:
        """Put `reference` on trial while `instead_of` answers, or do what an earlier verdict says."""
        self.stop()
        name, version = parse_reference(reference)
        ref = ModelRef(name, int(version))
        try:
            trial = await asyncio.to_thread(self._begin, ref)
        except AWAY as error:  # it is begun when the database is back
            logger.warning("%s, on trial: %s", ref, error)
            trial = canary.Trial(Compared(), None, None)
        await self._models.follow(reference if trial.passed else instead_of)
        if trial.passed:
            return
        if trial.passed is False:
            self._models.failed = failed(ref, trial.why)
            return
        fresh: Following[M] = Following(self._load)
        await fresh.follow(reference)
        if fresh.failed is not None:
            fresh.stop()
            with contextlib.suppress(*AWAY):
                await asyncio.to_thread(self._settle, ref, False, fresh.failed)
            self._models.failed = failed(ref, fresh.failed)
            return
        self._ref, self._loaded = ref, fresh.current
        self._watching = asyncio.create_task(self._watch(ref))

    def stop(self) -> None:
        """End this replica's part, whatever came of it."""
        for task in (self._asking, self._watching):
            if task is not None:
                task.cancel()
        if self._loaded is not None:
            self._loaded.model.close()
        self._ref = self._loaded = self._asking = self._watching = None
        self._compared, self._total = Compared(), 0

    def mirror(self, inputs: list[Any], answers: list[Any], seconds: float) -> None:
        """Ask the version on trial too, perhaps; returns at once. One at a time, so that no queue grows."""
        is_free = self._asking is None or self._asking.done()
        if self._loaded is not None and is_free and random.random() < self._settings.share:
            self._asking = asyncio.create_task(self._ask(self._loaded.model, inputs, answers, seconds))

    async def _ask(self, model: M, inputs: list[Any], answers: list[Any], seconds: float) -> None:
        began = time.perf_counter()
        try:
            given, _ = await model.answer(inputs)
        except Exception as error:
            logger.warning("%s, on trial: %s: %s", self._ref, type(error).__name__, error)
            self._compared.add(Compared(requests=1, errors=1))
            return
        took = time.perf_counter() - began
        found = [model.differ(one, other) for one, other in zip(answers, given, strict=True)]
        self._compared.add(
            Compared(
                requests=1,
                inputs=len(found),
                disagreements=sum(other for other, _ in found),
                drift=sum(drift for _, drift in found),
                seconds=took,
                champion_seconds=seconds,
            )
        )

    async def _watch(self, ref: ModelRef) -> None:
        while True:
            found, self._compared = self._compared, Compared()
            try:
                trial = await asyncio.to_thread(self._look, ref, found)
            except AWAY as error:
                # What was compared is not lost with a database that is away.
                self._compared.add(found)
                logger.warning("%s, on trial: %s", ref, error)
            else:
                self._total = trial.compared.requests
                if trial.passed is not None:
                    self._end(ref, trial)
                    return
            await asyncio.sleep(LOOK_S)

    def _end(self, ref: ModelRef, trial: canary.Trial) -> None:
        self._watching = None  # it is this task, which stop() would cancel
        if trial.passed and self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            if self._asking is not None:
                self._asking.cancel()
            self._models.take(loaded)
        elif not trial.passed:
            self._models.failed = failed(ref, trial.why)
            logger.error("%s", self._models.failed)
        self.stop()

    def _begin(self, ref: ModelRef) -> canary.Trial:
        canary.begin(self._application, ref.version)
        found = canary.find(self._application, ref.version)
        assert found is not None
        return found

    def _look(self, ref: ModelRef, found: Compared) -> canary.Trial:
        if found.requests:
            canary.add(self._application, ref.version, found)
        trial = self._begin(ref)
        verdict = canary.judge(trial.compared, self._settings) if trial.passed is None else None
        if verdict is None:
            return trial
        self._settle(ref, *verdict)
        return self._begin(ref)

    def _settle(self, ref: ModelRef, passed: bool, why: str) -> None:
        if not canary.settle(self._application, ref.version, passed, why) or passed:
            return
        # Whoever starts later, or deploys the champion, gets the one before it.
        with contextlib.suppress(*AWAY):
            if registry.champion(ref.name) == ref:
                registry.roll_back(ref.name, f"trial: {why}")


def failed(ref: ModelRef, why: str | None) -> str:
    return f"{ref} did not pass its trial: {why}"
