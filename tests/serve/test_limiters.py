"""Limits that a Redis server counts: as lib/limits.py does, for all at once, and what happens while it is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from redis import Redis

from lib.limits import Buckets, Charge
from lib.settings import AccessSettings
from serve import limiters
from serve.limiters import ActorLimiter, RedisLimiter, shared
from tests.servers import RedisServer

# Instead of the server's clock, in tests of what is decided when.
SET_CLOCK = "local now = tonumber(redis.call('GET', 'now'))"
CHARGES = st.lists(
    st.builds(
        Charge,
        st.sampled_from(["one/requests", "one/tokens"]),
        st.one_of(st.just(0), st.integers(1, 50), st.floats(0.5, 200)),
        st.sampled_from([1, 7, 60, 1000]),
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda charge: charge.name,
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "charge"]),
        CHARGES,
        st.one_of(st.just(0.0), st.floats(0.001, 90), st.integers(1, 60).map(float)),
    ),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    started = RedisServer()
    yield started
    started.stop()


@pytest.fixture
def redis(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Redis:
    """A client of the server, which is empty."""
    monkeypatch.setenv(limiters.PASSWORD, server.password)
    client = Redis.from_url(server.url, password=server.password)
    client.flushall()
    return client


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_the_script_decides_as_the_buckets_do(server: RedisServer, redis: Redis, steps: Any) -> None:
    redis.flushall()

    async def compared() -> None:
        limiter, buckets, now = RedisLimiter(server.url, SET_CLOCK), Buckets(), 1_764_000_000.0
        for what, charges, later in steps:
            now += later
            redis.set("now", f"{now:.17g}")
            if what == "charge":
                await limiter._charge(charges)
                buckets.charge(charges, now)
                continue
            found, expected = await limiter._take(charges), buckets.take(charges, now)
            assert (found.allowed, found.stopped_by) == (expected.allowed, expected.stopped_by)
            assert found.wait_s == pytest.approx(expected.wait_s, abs=1e-5)
            for one, other in zip(found.remaining, expected.remaining, strict=True):
                assert abs(one - other) <= 1

    asyncio.run(compared())


def test_many_replicas_at_once_take_what_there_is_and_no_more(server: RedisServer, redis: Redis) -> None:
    charge = [Charge("shop/requests", 1, 40)]

    async def asked() -> list[bool]:
        replicas = [RedisLimiter(server.url) for _ in range(8)]
        found = await asyncio.gather(*(replicas[i % 8].take(charge) for i in range(120)))
        return [verdict.allowed for verdict in found]

    # One comes back each 1.5 s.
    assert 40 <= sum(asyncio.run(asked())) <= 45
    (name,) = redis.keys("*")
    assert name == b"whorl:limits:{shop}:requests"
    assert 0 < redis.pttl(name) <= 60_000, "what is whole again is forgotten"


def test_who_may_ask_much_is_asked_for_in_blocks_and_gets_no_more(server: RedisServer, redis: Redis) -> None:
    charge = [Charge("shop/requests", 1, 3000)]
    before = redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]

    async def asked() -> tuple[list[bool], list[int]]:
        replicas = [RedisLimiter(server.url) for _ in range(4)]
        found, began = [], time.monotonic()
        for start in range(0, 3600, 40):
            found += await asyncio.gather(*(replicas[i % 4].take(charge) for i in range(start, start + 40)))
        back = (time.monotonic() - began) * 50
        allowed = sum(verdict.allowed for verdict in found)
        assert 2880 <= allowed <= 3000 + back, "of four replicas' blocks no more than one each is lost"
        return [v.allowed for v in found], [v.remaining[0] for v in found if v.allowed]

    allowed, remaining = asyncio.run(asked())
    assert all(allowed[:2800])
    assert max(remaining) == 2999
    calls = redis.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert calls < 3000 / 30 + 4 + 2 * (3600 - sum(allowed)), (
        "one question for each block, two for what is refused"
    )


def test_a_block_is_lost_after_a_while_and_a_debt_is_asked_for_each_time(
    server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiters, "BLOCK_S", 0.05)

    async def asked() -> list[Any]:
        limiter, other = RedisLimiter(server.url), RedisLimiter(server.url)
        requests, tokens = Charge("shop/requests", 1, 1000), Charge("shop/tokens", 0, 1000)
        found: list[Any] = [(await limiter.take([requests])).remaining]
        await asyncio.sleep(0.1)
        # Of the first ten nine are lost; one or two have come back.
        found.append((await limiter.take([requests])).remaining[0])
        await other.charge([tokens._replace(cost=5000)])
        return [*found, (await limiter.take([requests, tokens])).stopped_by]

    first, second, stopped = asyncio.run(asked())
    assert first == (999,)
    assert 989 <= second <= 992
    assert stopped == "shop/tokens"


def test_while_it_is_away_each_counts_for_itself(
    server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limiters, "COUNTER_AWAY_S", 0.2)
    one = [Charge("shop/requests", 1, 2)]

    async def asked() -> list[bool]:
        limiter, other = RedisLimiter(server.url), RedisLimiter(server.url)
        found = [(await limiter.take(one)).allowed, (await other.take(one)).allowed]
        found.append((await limiter.take(one)).allowed)
        server.stop()
        found.append((await limiter.take(one)).allowed)  # its own count is whole
        await limiter.charge(one)
        found.append((await limiter.take(one)).allowed)  # and kept
        server.start()
        await asyncio.sleep(0.3)
        return [*found, (await limiter.take(one)).allowed]

    assert asyncio.run(asked()) == [True, True, False, True, False, True]
    assert "counts for itself" in caplog.text


def test_a_wrong_password_is_told_and_stops_nobody(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(limiters.PASSWORD, "wrong")

    async def asked() -> bool:
        return (await RedisLimiter(server.url).take([Charge("shop/requests", 1, 2)])).allowed

    assert asyncio.run(asked())
    assert "AuthenticationError" in caplog.text
    assert "wrong" not in caplog.text


def test_who_counts_is_configured() -> None:
    assert isinstance(shared(AccessSettings()), ActorLimiter)
    assert isinstance(shared(AccessSettings(redis="rediss://host:6380/1")), RedisLimiter)
    for wrong, said in (("redis://:secret@host", "WHORL_REDIS_PASSWORD"), ("host:6379", "pattern")):
        with pytest.raises(ValidationError, match=said):
            AccessSettings(redis=wrong)
