"""Tokens of a stream, counted as it passes, and what the client sees of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from serve.usage import Usage

TRICKY = ',"usage":{"prompt_tokens":900} "choices":[]'


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def part(index: int, said: int, details: dict[str, int] | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "total_tokens": 7 + said, "completion_tokens": said}
    usage |= {"prompt_tokens_details": details} if details else {}
    choice = {"index": index, "delta": {"content": TRICKY}, "finish_reason": None}
    return {"id": "x", "choices": [choice], "usage": usage, "system_fingerprint": None}


LAST = {"id": "x", "choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 30, "completion_tokens": 23}}


@pytest.mark.parametrize("details", [None, {"cached_tokens": 3}])
def test_a_stream_is_counted_as_far_as_it_came(details: dict[str, int] | None) -> None:
    usage = Usage(asked=False, each=False)
    assert usage.tokens == 0
    for index, said, total in ((0, 0, 7), (0, 2, 9), (1, 3, 12), (0, 5, 15)):
        given = part(index, said, details)
        shown = usage.passed(event(given))
        assert shown == event({name: value for name, value in given.items() if name != "usage"})
        assert usage.tokens == total
    assert usage.passed(event(LAST)) is None
    assert usage.tokens == 30
    assert usage.passed("data: [DONE]\n\n") == "data: [DONE]\n\n"


@pytest.mark.parametrize(("asked", "each"), [(True, False), (True, True)])
def test_whoever_asks_is_told(asked: bool, each: bool) -> None:
    usage = Usage(asked, each)
    first, last = event(part(0, 1)), event(LAST)
    assert ('prompt_tokens":7' in str(usage.passed(first))) is each
    assert usage.passed(last) == last


def test_an_answer_that_is_no_stream_tells_the_total() -> None:
    usage = Usage(asked=False, each=False)
    answer = SimpleNamespace(usage=SimpleNamespace(total_tokens=12))
    assert usage.passed(answer) is answer
    assert usage.tokens == 12
    refusal = SimpleNamespace(error="no")
    assert usage.passed(refusal) is refusal
