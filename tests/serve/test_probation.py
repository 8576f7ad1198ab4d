"""A version on trial in one replica: mirrored, judged, taken over or dropped. The models are as small as can be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lib import canary, registry
from lib.artifacts import ModelRef
from lib.settings import CanarySettings
from serve import probation
from serve.following import Following
from serve.probation import Probation


class Number:
    """Answers with its own version, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.version = int(folder.name)
        if self.version == 9:
            raise ValueError("nine does not load")
        self.asked: list[list[Any]] = []
        self.closed = False

    async def answer(self, inputs: list[Any]) -> tuple[list[Any], int]:
        self.asked.append(inputs)
        if "break" in inputs and self.version == 2:
            raise RuntimeError("two cannot say that")
        return [self.version for _ in inputs], 0

    def differ(self, one: int, other: int) -> tuple[bool, float]:
        return one != other, abs(one - other) / 10

    def close(self) -> None:
        self.closed = True


LENIENT = {"max_disagreement": 1.0, "max_drift": 1.0, "max_latency_ratio": 1e9}


async def ask(trial: Probation[Number], models: Following[Number], *inputs: str) -> int:
    """As `serve.replica` does it: the version that answered."""
    with models.using() as loaded:
        answers, _ = await loaded.model.answer(list(inputs))
        trial.mirror(list(inputs), answers, 0.001)
    await asyncio.sleep(0)
    return loaded.ref.version


async def settled(models: Following[Number], is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


def run(
    story: Callable[[Probation[Number], Following[Number]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> None:
    async def main() -> None:
        models: Following[Number] = Following(Number)
        chosen = CanarySettings.model_validate({"share": 1, "requests": 5} | LENIENT | settings)
        trial = Probation("shop", chosen, Number, models)
        await models.follow("reviews@1")
        await story(trial, models)
        trial.stop()

    monkeypatch.setattr(probation, "LOOK_S", 0.02)
    asyncio.run(main())


@pytest.fixture(autouse=True)
def trials(store: Path) -> None:
    """No trial is left of another test."""
    from lib import database

    with database.engine().begin() as db:
        db.execute(canary.TRIALS.delete())


def test_a_version_takes_over_after_enough_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(trial: Probation[Number], models: Following[Number]) -> None:
        await trial.follow("reviews@2", "reviews@1")
        first = models.current.model
        assert (trial.told or "").startswith("reviews@2: 0 of 5")
        for _ in range(5):
            assert await ask(trial, models, "a", "b") == 1
        await settled(models, lambda: models.current.ref.version == 2)
        assert first.closed
        assert not models.current.model.closed
        assert trial.told is None
        assert await ask(trial, models, "c") == 2
        found = canary.find("shop", 2)
        assert found is not None
        assert found.passed
        assert (found.compared.requests, found.compared.inputs, found.compared.disagreements) == (5, 10, 10)
        assert found.compared.drift == pytest.approx(1.0)

    run(story, monkeypatch)


def test_a_version_that_answers_otherwise_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(trial: Probation[Number], models: Following[Number]) -> None:
        await trial.follow("reviews@2", "reviews@1")
        for _ in range(5):
            assert await ask(trial, models, "a") == 1
        await settled(models, lambda: models.failed is not None)
        assert models.failed is not None
        assert (
            "reviews@2 did not pass its trial: disagreement above 0.5 (errors 0, disagreement 1"
            in models.failed
        )
        assert await ask(trial, models, "a") == 1
        # A replica that starts later finds the verdict, and does not try it.
        later: Following[Number] = Following(Number)
        other = Probation("shop", CanarySettings(), Number, later)
        await other.follow("reviews@2", "reviews@1")
        assert later.current.ref == ModelRef("reviews", 1)
        assert later.failed == models.failed
        assert other.told is None

    run(story, monkeypatch, max_disagreement=0.5)


def test_errors_are_nobodys_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(trial: Probation[Number], models: Following[Number]) -> None:
        await trial.follow("reviews@2", "reviews@1")
        for text in ("break", "b", "c", "d", "e"):
            assert await ask(trial, models, text) == 1
        await settled(models, lambda: models.failed is not None)
        assert "errors above 0 (errors 0.2" in (models.failed or "")

    run(story, monkeypatch)


def test_a_version_that_does_not_load_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    rolled: list[tuple[str, str]] = []
    monkeypatch.setattr(registry, "champion", lambda name: ModelRef("reviews", 9))
    monkeypatch.setattr(registry, "roll_back", lambda name, why: rolled.append((name, why)))

    async def story(trial: Probation[Number], models: Following[Number]) -> None:
        await trial.follow("reviews@9", "reviews@1")
        assert "reviews@9 did not pass its trial: reviews@9: ValueError: nine does not load" in (
            models.failed or ""
        )
        assert models.current.ref.version == 1
        assert [name for name, _ in rolled] == ["reviews"]
        await trial.follow("reviews@9", "reviews@1")
        assert len(rolled) == 1  # once, for all replicas

    run(story, monkeypatch)


def test_two_replicas_come_to_one_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(trial: Probation[Number], models: Following[Number]) -> None:
        others: Following[Number] = Following(Number)
        second = Probation(
            "shop", CanarySettings.model_validate({"share": 1, "requests": 5} | LENIENT), Number, others
        )
        await trial.follow("reviews@2", "reviews@1")
        await second.follow("reviews@2", "reviews@1")
        assert others.current.ref.version == 1
        for _ in range(3):
            await ask(trial, models, "a")
        for _ in range(2):
            await ask(second, others, "a")
        await settled(models, lambda: models.current.ref.version == others.current.ref.version == 2)
        second.stop()

    run(story, monkeypatch)
