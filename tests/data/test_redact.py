"""Personal data is replaced in every form that people write, and what only looks like it stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.redact import Redaction


def redacted(text: str) -> str:
    return Redaction().text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("write to Ada.Lovelace+x@example.co.uk, please", "write to <EMAIL_1>, please"),
        ("ada@example.com and bob@example.com, then ADA@example.com", "<EMAIL_1> and <EMAIL_2>, then <EMAIL_1>"),
        ("call +44 20 7946 0958 now", "call <PHONE_1> now"),
        ("call (212) 555-2368 or 212-555-2368.", "call <PHONE_1> or <PHONE_1>."),
        ("我的手机是13812345678。", "我的手机是<PHONE_1>。"),
        ("ring +49 (30) 901820", "ring <PHONE_1>"),
        ("card 4111 1111 1111 1111 exp 12/27", "card <CARD_1> exp 12/27"),
        ("card 4111-1111-1111-1111, again 4111111111111111", "card <CARD_1>, again <CARD_1>"),
        ("card ４１１１１１１１１１１１１１１１", "card <CARD_1>"),
        ("pay to DE89 3704 0044 0532 0130 00 today", "pay to <IBAN_1> today"),
        ("pay to GB82WEST12345698765432", "pay to <IBAN_1>"),
        ("my SSN is 536-90-4399", "my SSN is <ID_1>"),
        ("身份证 11010519491231002X", "身份证 <ID_1>"),
        ("from 203.0.113.7 and 2001:db8::1", "from <IP_1> and <IP_2>"),
        ("postgres://me:secret@db/x", "postgres://<URL_1>@db/x"),
        ("key sk-abcdefghij0123456789xyz", "key <KEY_1>"),
        ("token eyJhbGciOiJIUzI1.eyJzdWIiOiIx.SflKxwRJSMeKKF2", "token <KEY_1>"),
        ("order 20391 call +1 212 555 2368", "order 20391 call <PHONE_1>"),
    ],
)  # fmt: skip
def test_found(text: str, said: str) -> None:
    assert redacted(text) == said


@pytest.mark.parametrize(
    "text",
    [
        "order 1234567890123456 has not come",  # no card: the check digit is wrong
        "I paid $1,234,567.89 on 2026-11-28 at 10:30",
        "dates 2026.11.28, 28/11/2026 and 2026-11-28 10:30:15",
        "version 1.2.3.4567 and 10.0",
        "SSN 000-12-3456 is none",
        "12345678 items, 100 000 000 people",
        "the ratio is 16:9, the time 12:30:45",
        "size 10-12, rows 100-200, ISO 9001:2015",
        "@ada said so, at 5 @ 3",
        "127.0.0.1 is home",
        "call a::b and std::move",
        "110105194912310021 has a wrong check digit",
        "DE00 3704 0044 0532 0130 00 is no account",
        "parcel 1Z999AA10123456784",
    ],
)
def test_left_alone(text: str) -> None:
    assert redacted(text) == text


def test_one_redaction_keeps_its_placeholders_over_texts_and_in_json() -> None:
    shared = Redaction()
    found = shared.value(
        {
            "messages": [
                {"content": "I am ada@example.com"},
                {"content": "ada@example.com, +44 20 7946 0958"},
            ],
            "n": 3,
        }
    )
    assert found == {"messages": [{"content": "I am <EMAIL_1>"}, {"content": "<EMAIL_1>, <PHONE_1>"}], "n": 3}
    assert shared.counts == {"EMAIL": 1, "PHONE": 1}


@given(st.text(max_size=200))
def test_any_text_is_taken_and_a_second_pass_changes_nothing(text: str) -> None:
    once = redacted(text)
    assert redacted(once) == once


@pytest.mark.timeout(30)  # what backtracks takes minutes
@pytest.mark.parametrize("part", ["1-", "a@", "::", "DE89 ", "1 ", ".", "://a:", "eyJ"])
def test_long_hostile_texts_are_read_once(part: str) -> None:
    text = part * (60_000 // len(part))
    assert redacted(text) == text
