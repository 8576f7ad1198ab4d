"""Who counts what keys use, over all replicas: an actor of the cluster or, by `serving.access.redis`, a Redis server.

Both count as lib/limits.py does. A replica takes a block at a time of a key that may ask much, so that it need not ask
for each request: what is left of one after a second is lost, at most a hundredth of the limit of each. When the counter does not answer, each replica counts for itself for a while: nobody
is refused because of it, and a key may use as much of each replica.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import ray
from ray.exceptions import RayError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from lib.limits import SWEEP_AT, TOLERANCE_S, WINDOW_S, Buckets, Charge, Verdict
from lib.settings import AccessSettings

logger = logging.getLogger("ray.serve")

COUNTER = "whorl-limits"
NAMESPACE = "whorl"
COUNTER_STARTS_S = 30.0
COUNTER_WAITS_S = 1.0
# How long it is not asked again after it did not answer.
COUNTER_AWAY_S = 5.0
PASSWORD = "WHORL_REDIS_PASSWORD"
# Of a minute's worth, and how long it is good.
BLOCK_SHARE, BLOCK_S = 0.01, 1.0


class Limiter(Protocol):
    async def take(self, charges: Sequence[Charge]) -> Verdict:
        """Take all charges or none."""

    async def charge(self, charges: Sequence[Charge]) -> None:
        """Take charges that were known only afterwards."""


@dataclass
class Block:
    """What was taken of a limit and is not used yet."""

    left: float = 0.0
    until: float = 0.0
    remaining: int = 0
    """Of the limit, besides."""
    nearly_used: float = 0.0
    """Until then each request is asked for by itself: there was less than a block."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def use(self, charge: Charge) -> Verdict | None:
        """None when it has not as much."""
        if self.left < charge.cost or time.monotonic() >= self.until:
            return None
        self.left -= charge.cost
        return Verdict(True, remaining=(self.remaining + int(self.left),))


class SharedLimiter(ABC):
    """`Limiter` by a counter that all replicas share; by this process's own while that is away."""

    away: ClassVar[tuple[type[Exception], ...]]
    """What asking raises when it does not answer."""

    def __init__(self) -> None:
        self._own = Buckets()
        self._away_until = 0.0
        self._blocks: dict[str, Block] = {}

    async def take(self, charges: Sequence[Charge]) -> Verdict:
        # A limit that is counted afterwards must be asked each time, since there may be a debt.
        if len(charges) == 1 and charges[0].cost:
            size = int(charges[0].per_minute * BLOCK_SHARE)
            if size > charges[0].cost:
                return await self._take_of_block(charges[0], size)
        return await self._take_now(charges)

    async def _take_of_block(self, charge: Charge, size: int) -> Verdict:
        block = self._blocks.get(charge.name)
        if block is None:
            if len(self._blocks) >= SWEEP_AT:
                now = time.monotonic()
                self._blocks = {n: b for n, b in self._blocks.items() if b.until > now or b.asking.locked()}
            block = self._blocks[charge.name] = Block()
        if verdict := block.use(charge):
            return verdict
        if time.monotonic() < block.nearly_used:
            return await self._take_now([charge])
        async with block.asking:  # whoever waits meanwhile has its part of what comes
            if verdict := block.use(charge):
                return verdict
            verdict = await self._take_now([charge._replace(cost=size)])
            if not verdict.allowed:
                block.nearly_used = time.monotonic() + BLOCK_S
                return await self._take_now([charge])
            block.left, block.until = size, time.monotonic() + BLOCK_S
            (block.remaining,) = verdict.remaining
            return block.use(charge) or verdict

    async def _take_now(self, charges: Sequence[Charge]) -> Verdict:
        if time.monotonic() >= self._away_until:
            try:
                return await self._take(charges)
            except self.away as error:
                self._is_away(error)
        return self._own.take(charges, time.monotonic())

    async def charge(self, charges: Sequence[Charge]) -> None:
        if time.monotonic() >= self._away_until:
            try:
                await self._charge(charges)
                return
            except self.away as error:
                self._is_away(error)
        self._own.charge(charges, time.monotonic())

    def _is_away(self, error: Exception) -> None:
        logger.warning(
            "the counter of limits does not answer (%s); this replica counts for itself for a while",
            type(error).__name__,
        )
        self._away_until = time.monotonic() + COUNTER_AWAY_S

    @abstractmethod
    async def _take(self, charges: Sequence[Charge]) -> Verdict: ...

    @abstractmethod
    async def _charge(self, charges: Sequence[Charge]) -> None: ...


class Counter:
    """The actor that counts for all replicas of the cluster."""

    def __init__(self) -> None:
        self._buckets = Buckets()

    def take(self, charges: list[Charge]) -> Verdict:
        return self._buckets.take(charges, time.monotonic())

    def charge(self, charges: list[Charge]) -> None:
        self._buckets.charge(charges, time.monotonic())


class ActorLimiter(SharedLimiter):
    """By the cluster's `Counter`, which Ray starts anew when it is lost."""

    away = (RayError, TimeoutError, ValueError)

    def __init__(self) -> None:
        super().__init__()
        self._counter: Any = None
        self._has_answered = False

    async def _take(self, charges: Sequence[Charge]) -> Verdict:
        # The first who ask wait until it has started.
        patience = COUNTER_WAITS_S if self._has_answered else COUNTER_STARTS_S
        verdict: Verdict = await asyncio.wait_for(self._found().take.remote(list(charges)), patience)
        self._has_answered = True
        return verdict

    async def _charge(self, charges: Sequence[Charge]) -> None:
        self._found().charge.remote(list(charges))  # nobody waits for it

    def _is_away(self, error: Exception) -> None:
        super()._is_away(error)
        self._counter, self._has_answered = None, False

    def _found(self) -> Any:
        if self._counter is None:
            self._counter = (
                ray.remote(Counter)
                .options(
                    name=COUNTER,
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=-1,
                )
                .remote()
            )
        return self._counter


# `Buckets` in Lua, which Redis runs as one step. Numbers come and go as texts: Redis would cut what is behind the point.
CLOCK = "local time = redis.call('TIME') local now = time[1] + time[2] / 1e6"
SCRIPT = f"""
local window, tolerance = {WINDOW_S}, {TOLERANCE_S}
local whole = {{}}
for i, key in ipairs(KEYS) do
    whole[i] = math.max(tonumber(redis.call('GET', key) or now), now)
end
local function told(wait, stopped)
    local found = {{string.format('%.9f', wait), stopped}}
    for i = 1, #KEYS do
        local left = (now + window - whole[i]) * tonumber(ARGV[2 * i + 1]) / window
        table.insert(found, math.max(0, math.floor(left + tolerance)))
    end
    return found
end
for i = 1, #KEYS do
    local cost, rate = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
    local wait = whole[i] + math.min(cost, rate) * window / rate - (now + window)
    if cost == 0 then wait = wait + window / rate end
    if ARGV[1] == 'take' and wait > tolerance then return told(wait, i) end
end
for i = 1, #KEYS do
    local cost, rate = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
    if cost > 0 then
        whole[i] = whole[i] + cost * window / rate
        local lasts = math.ceil((whole[i] - now) * 1000)
        redis.call('SET', KEYS[i], string.format('%.17g', whole[i]), 'PX', string.format('%d', lasts))
    end
end
return told(0, 0)
"""


class RedisLimiter(SharedLimiter):
    """By a Redis server, whose clock is everybody's.

    The password is `WHORL_REDIS_PASSWORD` in the replicas' environment, since configurations are written down.
    """

    away = (RedisError, OSError, TimeoutError)

    def __init__(self, url: str, clock: str = CLOCK) -> None:
        super().__init__()
        client = Redis.from_url(
            url,
            password=os.environ.get(PASSWORD),
            socket_timeout=COUNTER_WAITS_S,
            socket_connect_timeout=COUNTER_WAITS_S,
            retry=Retry(NoBackoff(), 1),  # a connection that was kept may have been closed meanwhile
        )
        self._run = client.register_script(f"{clock}\n{SCRIPT}")

    async def _take(self, charges: Sequence[Charge]) -> Verdict:
        wait, stopped, *remaining = await self._ask("take", charges)
        if stopped:
            return Verdict(False, float(wait), charges[int(stopped) - 1].name, tuple(remaining))
        return Verdict(True, remaining=tuple(remaining))

    async def _charge(self, charges: Sequence[Charge]) -> None:
        await self._ask("charge", charges)

    async def _ask(self, what: str, charges: Sequence[Charge]) -> list[Any]:
        numbers = [number for charge in charges for number in (float(charge.cost), charge.per_minute)]
        found: list[Any] = await self._run(keys=[_key(c.name) for c in charges], args=[what, *numbers])
        return found


def _key(name: str) -> str:
    """Of a limit ID/KIND. In braces stands what decides on which node of a Redis cluster it lies: one for each id."""
    owner, _, kind = name.rpartition("/")
    return f"whorl:limits:{{{owner}}}:{kind}"


def shared(settings: AccessSettings) -> SharedLimiter:
    """The limiter that the configuration asks for."""
    return RedisLimiter(settings.redis) if settings.redis else ActorLimiter()
