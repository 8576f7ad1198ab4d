"""The judge against a real HTTP server that answers in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lib.errors import ConfigError
from lib.evaluation import judge
from lib.evaluation.judge import Judge, Pair
from lib.settings import JudgeSettings
from tests.endpoints import Answering, Endpoint

KEY = "secret-key-of-the-judge"


class Server(Endpoint):
    """Prefers the answer that says `good`; where both do or neither does, the first. Wants the key."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.failures: list[int] = []
        self.speaks_openai = True
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(Answering):
    server: Server

    def do_POST(self) -> None:  # noqa: N802 -- its base calls it so
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append({"path": self.path, **body})
        if self.headers["authorization"] != f"Bearer {KEY}":
            return self.answer(401, {"error": {"message": "no"}})
        if self.server.failures:
            return self.answer(self.server.failures.pop(0), {"error": {"message": "later"}})
        if not self.server.speaks_openai:
            return self.answer(200, {"text": "hello"})
        text = body["messages"][-1]["content"]
        first, _, second = text.partition("<answer B>")
        good = ["good" in first.partition("<answer A>")[2], "good" in second]
        said = "Both were read.\n[[B]]" if good == [False, True] else "[[A]]"
        if "mute" in text:
            said = "I would rather not say."
        return self.answer(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("WHORL_JUDGE_KEY", KEY)
    with Server().up() as running:
        yield running


def judging(server: Server, **values: object) -> Judge:
    return Judge(JudgeSettings(url=server.url, model="umpire", **values), pause=lambda _: None)


def test_both_orders_are_asked_and_a_preference_for_the_first_is_a_tie(server: Server) -> None:
    pairs = [
        Pair("user: why?", "because", *both) for both in (("good", "bad"), ("bad", "good"), ("bad", "bad"))
    ]
    found = judging(server).compare(pairs, resamples=200)
    assert found["outcomes"] == ["win", "loss", "tie"]
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 1)
    assert found["win_rate"] == 0.5
    assert found["consistent"] == pytest.approx(2 / 3)
    assert found["interval"][0] <= 0.5 <= found["interval"][1]
    assert len(server.seen) == 6
    assert {request["path"] for request in server.seen} == {"/v1/chat/completions"}
    assert {request["model"] for request in server.seen} == {"umpire"}
    assert all(request["temperature"] == 0 for request in server.seen)


def test_a_reply_without_a_verdict_is_counted(server: Server) -> None:
    found = judging(server).compare([Pair("mute", "r", "good", "bad")], resamples=0)
    assert found["unreadable"] == 2
    assert found["outcomes"] == ["tie"]
    assert found["consistent"] == 0
    assert found["interval"] == []


def test_a_busy_endpoint_is_asked_again(server: Server) -> None:
    server.failures = [429, 503]
    assert judging(server).reply([{"role": "user", "content": "hello"}]) == "[[A]]"
    assert len(server.seen) == 3


def test_what_a_user_can_get_wrong_is_one_line_without_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.failures = [500] * 10
    with pytest.raises(
        ConfigError, match=r"judge: http://.*/chat/completions does not answer .* \(status 500\)"
    ):
        judging(server).check()
    server.failures, server.speaks_openai = [], False
    with pytest.raises(ConfigError, match="not in the form of OpenAI's"):
        judging(server).check()
    monkeypatch.setenv("WHORL_JUDGE_KEY", "another-key")
    seen = len(server.seen)
    with pytest.raises(
        ConfigError, match=r"\(status 401\); check url, model and the key in WHORL_JUDGE_KEY"
    ) as caught:
        judging(server).check()
    assert len(server.seen) == seen + 1  # asking again would not help
    assert "another-key" not in str(caught.value)
    monkeypatch.delenv("WHORL_JUDGE_KEY")
    with pytest.raises(ConfigError, match="the environment variable WHORL_JUDGE_KEY is empty"):
        judging(server)
    away = JudgeSettings(url="http://127.0.0.1:1/v1", model="umpire", key_variable="")
    with pytest.raises(ConfigError, match="ConnectError"):
        Judge(away, pause=lambda _: None).check()


def test_a_judge_that_fails_late_costs_only_its_own_figures(server: Server) -> None:
    asked = judging(server)
    server.failures = [404] * 10
    found = judge.compare(asked, [Pair("p", "r", "good", "bad")], resamples=10)
    assert "status 404" in found["error"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("[[a]]", "A"), ("not [[A]], rather\n[[B]]", "B"), ("[[ TIE ]]", "tie"), ("A", None), ("", None)],
)
def test_the_last_mark_is_the_verdict(text: str, said: str | None) -> None:
    assert judge.verdict(text) == said
