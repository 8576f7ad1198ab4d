"""Keys and limits in front of an application: refusals, what is counted, a database or a counter that is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from lib import keys
from lib.errors import StorageError
from lib.keys import Key
from lib.limits import Buckets, Charge, Verdict
from lib.settings import AccessSettings
from serve.access import Access, KnownKeys

SETTINGS = AccessSettings()


class Own:
    """A limiter of this process alone, on a clock of its own."""

    def __init__(self) -> None:
        self.buckets, self.now = Buckets(), 0.0

    async def take(self, charges: Sequence[Charge]) -> Verdict:
        return self.buckets.take(charges, self.now)

    async def charge(self, charges: Sequence[Charge]) -> None:
        self.buckets.charge(charges, self.now)


def client(limiter: Own | None = None, known: KnownKeys | None = None, prefix: str = "") -> httpx.AsyncClient:
    app = FastAPI()

    @app.get("/who")
    async def who(request: Request, tokens: int = 0) -> dict[str, str]:
        request.state.tokens = tokens
        return {"key": request.state.key.id}

    @app.get("/healthz")
    async def healthz() -> str:
        return "alive"

    guarded = Access(app, "reviews", SETTINGS, known or KnownKeys(SETTINGS), limiter or Own())
    transport = httpx.ASGITransport(app=guarded, root_path=prefix)
    return httpx.AsyncClient(transport=transport, base_url=f"http://test{prefix}")


def run(asked: Callable[[], Any]) -> Any:
    return asyncio.run(asked())


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("prefix", ["", "/reviews"])
def test_who_is_let_in_and_who_is_not(storage: Path, prefix: str) -> None:
    key, secret = keys.create("shop", ["reviews"])
    _, other = keys.create("else", ["support"])
    old, expired = keys.create("old", ["reviews"], days=1e-9)
    ended, revoked = keys.create("ended", ["*"])
    keys.revoke(ended.id)

    async def asked() -> list[httpx.Response]:
        async with client(prefix=prefix) as http:
            headers: list[dict[str, str]] = [
                bearer(secret),
                {},
                {"authorization": f"Basic {secret}"},
                bearer("whorl_nobodys"),
                bearer("sk-other"),
                bearer(other),
                bearer(expired),
                bearer(revoked),
            ]
            return [await http.get("/who", headers=h) for h in headers] + [await http.get("/healthz")]

    answers = run(asked)
    assert [a.status_code for a in answers] == [200, 401, 401, 401, 401, 403, 401, 401, 200]
    assert answers[0].json() == {"key": key.id}
    errors = [a.json()["error"] for a in answers[1:-1]]
    assert [e["code"] for e in errors] == ["invalid_api_key"] * 4 + ["not_in_scope"] + ["invalid_api_key"] * 2
    assert errors[0]["type"] == "authentication_error"
    assert errors[4]["type"] == "permission_error"
    assert "is not for reviews (it is for support)" in errors[4]["message"]
    assert old.id in errors[5]["message"]
    assert answers[1].headers["www-authenticate"] == "Bearer"
    assert not any(other in a.text or revoked in a.text for a in answers)


def test_requests_are_counted_and_told(storage: Path) -> None:
    _, secret = keys.create("shop", ["*"], requests_per_minute=2)
    limiter = Own()

    async def asked() -> list[httpx.Response]:
        async with client(limiter) as http:
            found = [await http.get("/who", headers=bearer(secret)) for _ in range(3)]
            limiter.now += 30
            return [*found, await http.get("/who", headers=bearer(secret))]

    answers = run(asked)
    assert [a.status_code for a in answers] == [200, 200, 429, 200]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0", "0"]
    assert answers[2].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[2].headers["retry-after"] == "30"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"


def test_tokens_are_charged_when_they_are_known(storage: Path) -> None:
    _, secret = keys.create("shop", ["*"], tokens_per_minute=60)
    limiter = Own()

    async def asked() -> list[httpx.Response]:
        async with client(limiter) as http:
            first = await http.get("/who", params={"tokens": 90}, headers=bearer(secret))
            return [first, await http.get("/who", headers=bearer(secret))]

    answers = run(asked)
    assert [a.status_code for a in answers] == [200, 429]
    assert answers[1].headers["retry-after"] == "31"
    assert "60 tokens a minute" in answers[1].json()["error"]["message"]


class Found:
    """A database that counts what it is asked, and may be away."""

    def __init__(self) -> None:
        self.asked, self.away = 0, False
        self.key: Key | None = Key("id", "shop", frozenset("*"), None, None, 0.0)

    def __call__(self, secret: str) -> Key | None:
        self.asked += 1
        time.sleep(0.02)
        if self.away:
            raise StorageError("away")
        return self.key


SECRET = keys.PREFIX + "x"


def test_many_requests_at_once_ask_the_database_once() -> None:
    found = Found()

    async def asked() -> list[Key | None]:
        known = KnownKeys(SETTINGS, found)
        return [*await asyncio.gather(*(known.find(SECRET) for _ in range(50))), await known.find(SECRET)]

    assert set(run(asked)) == {found.key}
    assert found.asked == 1


def test_a_revoked_key_ends_when_it_is_no_longer_believed() -> None:
    found = Found()

    async def asked() -> list[Key | None]:
        known = KnownKeys(AccessSettings(keys_for_s=0.1), found)
        before = [await known.find(SECRET)]
        found.key = None
        before.append(await known.find(SECRET))
        await asyncio.sleep(0.15)
        return [*before, await known.find(SECRET)]

    first, second, third = run(asked)
    assert first is second is not None
    assert third is None


def test_keys_that_were_seen_are_believed_while_the_database_is_away() -> None:
    found = Found()

    async def asked() -> Key | None:
        known = KnownKeys(AccessSettings(keys_for_s=0), found)
        await known.find(SECRET)
        found.away = True
        with pytest.raises(StorageError, match="try again"):
            await known.find(SECRET + "y")
        return await known.find(SECRET)

    assert run(asked) is found.key


def test_a_database_that_is_away_is_503(storage: Path) -> None:
    found = Found()
    found.away = True

    async def asked() -> httpx.Response:
        async with client(known=KnownKeys(SETTINGS, found)) as http:
            return await http.get("/who", headers=bearer(SECRET))

    answer = run(asked)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


@pytest.mark.ray
def test_a_counter_that_was_killed_is_counted_without_and_found_again(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from serve import limiters

    monkeypatch.setattr(limiters, "COUNTER_AWAY_S", 0.2)
    one = [Charge("killed/requests", 1, 2)]

    async def answers(counter: Any) -> bool:
        try:
            await counter.take.remote([])
        except ray.exceptions.RayActorError:
            return False
        return True

    async def asked() -> list[bool]:
        limiter, other = limiters.ActorLimiter(), limiters.ActorLimiter()
        found = [(await limiter.take(one)).allowed, (await other.take(one)).allowed]
        found.append((await limiter.take(one)).allowed)  # two of two are gone, whoever asks
        counter = ray.get_actor(limiters.COUNTER, limiters.NAMESPACE)
        ray.kill(counter, no_restart=True)
        while await answers(counter):  # what was on its way may still be counted
            pass
        found.append((await limiter.take(one)).allowed)  # its own count is whole
        await asyncio.sleep(0.3)
        return [*found, (await limiter.take(one)).allowed]  # a new counter's too

    assert run(asked) == [True, True, False, True, True]
    ray.kill(ray.get_actor(limiters.COUNTER, limiters.NAMESPACE), no_restart=True)
