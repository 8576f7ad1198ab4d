"""Personal data is replaced in every form that people write, and what only looks like it stays."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretBytes, ValidationError

from lib.data.redact import Entity, Redaction, Rules, columns, find_in, names
from lib.data.redact.plain import plain
from lib.errors import ConfigError, ModelError
from lib.settings import DataSettings, NameSettings, RedactionSettings
from lib.settings.loading import describe
from lib.tagger import Answer, Response
from lib.tagger import Entity as Tagged
from lib.text import normalise
from tests.data.personal import TYPES, hard_negatives, negatives, positives

KEYED = Rules(key=SecretBytes(b"a key of sixteen bytes or more"))


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
        ("00:1A:2b:3c:4d:5e is 001a.2b3c.4d5e, MAC 001a2b3c4d5e", "<MAC_1> is <MAC_1>, MAC <MAC_1>"),
        ("redis://:secret@cache, https://me:p@ss@example.com/x", "redis://<URL_1>@cache, https://<URL_2>@example.com/x"),
        ("from 203.0.113.7:8080, [2001:db8::1]:443 or 203.0.113.9.", "from <IP_1>:8080, [<IP_2>]:443 or <IP_3>."),
        ("npm_abcdefghijklmnopqrstuvwxyz0123456789 leaked", "<KEY_1> leaked"),
        ("glpat-abcdefghij0123456789, sk_live_abcdefghij0123456789", "<KEY_1>, <KEY_2>"),
        ("DB_PASSWORD=hunter22 and \"api_key\": \"abc123def456\"", "DB_PASSWORD=<KEY_1> and \"api_key\": \"<KEY_2>\""),
        ("Authorization: Bearer abcdefghij0123456789", "Authorization: Bearer <KEY_1>"),
        ("my password is Tr0ub4dor. 密码：abc123x", "my password is <KEY_1>. 密码：<KEY_2>"),
        ("mysql --password Tr0ub4dor -h db <token>abcdefg1</token>", "mysql --password <KEY_1> -h db <token><KEY_2></token>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----!", "<KEY_1>!"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = <KEY_1>"),
    ],
)  # fmt: skip
def test_found(text: str, said: str) -> None:
    assert redacted(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("请联系ada@example.com谢谢", "请联系<EMAIL_1>谢谢"),
        ("jörg.müller@exämple.de!", "<EMAIL_1>!"),
        ("ada (at) example (dot) com, ada[at]example.com", "<EMAIL_1>, <EMAIL_1>"),
        ("ada AT example DOT com; ada%40example.com", "<EMAIL_1>; <EMAIL_1>"),
        ("a d a @ e x a m p l e . c o m", "<EMAIL_1>"),
        ("ad\u200ba＠example．com", "<EMAIL_1>"),
        ("<a href=mailto:&#97;da&#64;example.com>", "<a href=mailto:<EMAIL_1>>"),
        ("mail 'ada@example.com'. In Berlin", "mail '<EMAIL_1>'. In Berlin"),
        ("card 4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 exp", "card <CARD_1> exp"),
        ("4111·1111·1111·1111 and 4111*1111*1111*1111", "<CARD_1> and <CARD_1>"),
        ("4111\u2011 1111–1111\xa01111 12/27 123", "<CARD_1> 12/27 123"),
        ("4111 1111\n1111 1111 12/27 123", "<CARD_1> 12/27 123"),
        ("٤١١١ ١١١١ ١١١١ ١١١١", "<CARD_1>"),
        ("41\xad11 1111\u2060 1111 1111!", "<CARD_1>!"),
        ("de89-3704-0044-0532-0130-00", "<IBAN_1>"),
        ("D E 8 9 3 7 0 4 0 0 4 4 0 5 3 2 0 1 3 0 0 0", "<IBAN_1>"),
        ("5 3 6 - 9 0 - 4 3 9 9; SSN 536904399", "<ID_1>; SSN <ID_1>"),
        ("110105 19491231 002X, 110105·19491231·002x", "<ID_1>, <ID_1>"),
        ("(+44) 20 7946 0958, +44 (0)20 7946 0958, 020 7946 0958", "<PHONE_1>, <PHONE_1>, <PHONE_1>"),
        ("Tel.0049 30 901820. Móvil: 612 345 678", "Tel.<PHONE_1>. Móvil: <PHONE_2>"),
        ("+44\n20 7946 0958\n+44 20 7946 0999", "<PHONE_1>\n<PHONE_2>"),
        ("10[.]1[.]2[.]3", "<IP_1>"),
    ],
)  # fmt: skip
def test_found_however_it_is_written(text: str, said: str) -> None:
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
        "look at amazon dot com, meet me @ home, icon@2x.png是图标",
        "version 1.2.3.4, v1.2.3.4, Chrome/130.0.9868.113",
        "at 48.137154, 11.576124 or (-0.32350 55.34801)",
        "2.125.552.368 people, 722888.266 kWh, arXiv:0415.83133",
        "ISBN 978-3-16-148410-0, 0-306-40615-2, EAN 4006381333931",
        "order 13812345678, 订单号13812345678, 2025/425871",
        "9400 1000 0000 0000 0000 00 and 4111-1111-1111-1111-4111-1111",
        "550e8400-e29b-41d4-a716-446655440000 and da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "the token: please reset, password = getpass(), max_tokens: 4096, password: required",
        "$PASSWORD, password=${SECRET}, password=********",
        "ff:ff:ff:ff:ff:ff, 12:30:45:10:20:30",
    ],
)
def test_left_alone(text: str) -> None:
    assert redacted(text) == text


def share(texts: list[bool]) -> float:
    return sum(texts) / len(texts)


def readable(text: str, start: int, end: int) -> bool:
    """Whether a letter or a digit of a value is left."""
    hidden = {place for first, last, _, _ in find_in(text, Rules()) for place in range(first, last)}
    return any(text[place].isalnum() and place not in hidden for place in range(start, end))


@pytest.mark.parametrize(
    ("held_out", "twice", "least"), [(False, False, 0.98), (True, False, 0.98), (False, True, 0.95)]
)
def test_a_labelled_set_is_found(held_out: bool, twice: bool, least: float) -> None:
    found: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for one in positives(5, 60, held_out, twice):
        ((start, end, kind),) = one.values
        found[kind].append(not readable(one.text, start, end))
    assert {kind: share(texts) for kind, texts in found.items() if share(texts) < least} == {}


@pytest.mark.parametrize(("held_out", "least"), [(False, 0.995), (True, 0.99)])
def test_texts_without_personal_data_stay(held_out: bool, least: float) -> None:
    assert share([redacted(one.text) == one.text for one in negatives(5, 1500, held_out)]) >= least
    # A number that is a card's in all that can be seen of it is taken for one.
    assert share([redacted(one.text) == one.text for one in hard_negatives(5, 300)]) >= 0.8


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


@given(st.text(alphabet="0123456789 ()-.+@abc:/=＠·\u200b٤&#;\n<>_", max_size=120))
def test_no_digit_is_lost_outside_a_placeholder(text: str) -> None:
    """What is said around values stays as it is, with either kind of placeholder."""
    for rules in (Rules(), KEYED):
        spans = find_in(text, rules)
        assert all(0 <= start < end <= len(text) for start, end, _, _ in spans)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
        once = Redaction(rules).text(text)
        outside, place = [], 0
        for start, end, _, _ in spans:
            outside.append(text[place:start])
            place = end
        outside.append(text[place:])
        pattern = "<[A-Z]+_[0-9a-f]+>".join(map(re.escape, outside))
        assert re.fullmatch(pattern, once)
        assert Redaction(rules).text(once) == once


@given(st.text(max_size=60))
def test_a_plain_text_leads_back_to_its_own(text: str) -> None:
    seen = plain(text)
    for place in range(len(seen.text)):
        start, end = seen.place(place, place + 1)
        assert 0 <= start < end <= len(text)


def test_pseudonyms_are_the_same_in_all_texts_and_follow_the_key() -> None:
    (said, again), other = (
        [Redaction(KEYED).text(text) for text in ("to Ada@example.com", "ada (at) example.com!")],
        Redaction(Rules(key=SecretBytes(b"another key of sixteen bytes"))).text("to ada@example.com"),
    )
    (name,) = re.findall(r"<EMAIL_([0-9a-f]{12})>", said)
    assert again == f"<EMAIL_{name}>!"
    assert other != said
    assert re.fullmatch(r"to <EMAIL_[0-9a-f]{12}>", other)
    # By RFC 2104, and nothing that is shown of the rules has the key in it.
    import hashlib
    import hmac

    key = b"a key of sixteen bytes or more"
    assert name == hmac.new(key, b"EMAIL\0ada@example.com", hashlib.sha256).hexdigest()[:12]
    assert "sixteen" not in repr(KEYED) + str(KEYED)


def test_ray_shows_no_key_of_what_a_task_is_given() -> None:
    from ray.data._internal.metadata_exporter import sanitize_for_struct

    assert "sixteen" not in json.dumps(sanitize_for_struct({"fn_kwargs": {"rules": KEYED}}))


def test_kinds_are_chosen() -> None:
    text = "ada@example.com, +44 20 7946 0958, 4111 1111 1111 1111"
    assert Redaction(Rules(kinds=("EMAIL",))).text(text) == "<EMAIL_1>, +44 20 7946 0958, 4111 1111 1111 1111"
    assert Redaction(Rules(kinds=("CARD",))).text(text) == "ada@example.com, +44 20 7946 0958, <CARD_1>"


def test_regions_say_whose_phones_are_known_without_a_prefix() -> None:
    text = "020 7946 0958 or +44 20 7946 0999"
    assert redacted(text) == "<PHONE_1> or <PHONE_2>"
    assert Redaction(Rules(regions=("US",))).text(text) == "020 7946 0958 or <PHONE_1>"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kinds": ["EMIAL"]}, "no kind 'EMIAL'; did you mean 'EMAIL'?"),
        ({"kinds": ["email"]}, "did you mean 'EMAIL'?"),
        ({"kinds": []}, "at least 1 item"),
        ({"names": {"model": "ner@3", "labels": {"PER": "PERSONS"}}}, "did you mean 'PERSON'?"),
        ({"names": {"model": "ner@champion"}}, "'ner@champion' is no fixed version; give its number, such as ner@3"),
        ({"key_env": "A-B"}, "key_env"),
        ({"kind": []}, "did you mean 'kinds'?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_section_are_told(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        DataSettings.model_validate({"source": "x", "redact": section})
    assert (
        message in describe(raised.value).replace("data.", "")
        or message in str(raised.value)
        or "kind" in message
    )


def test_the_page_that_explains_it_has_a_section_that_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", Path("lib/data/README.md").read_text(), re.S)
    sections = [yaml.safe_load(block)["data"] for block in blocks]
    for section in sections:
        assert DataSettings.model_validate({"source": "x", **section})
    (section,) = [section for section in sections if "redact" in section]
    assert section["redact"].keys() == RedactionSettings.model_fields.keys()


def test_it_is_on_unless_it_is_switched_off() -> None:
    assert DataSettings(source="x").redact == RedactionSettings()
    assert DataSettings.model_validate({"source": "x", "redact": True}).redact == RedactionSettings()
    assert DataSettings.model_validate({"source": "x", "redact": False}).redact is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "the environment has no A_KEY"),
        ("short", "A_KEY has 5 bytes, which can be guessed; give 16 or more"),
    ],
)
def test_a_key_is_there_and_long_enough(
    key: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if key:
        monkeypatch.setenv("A_KEY", key)
    with pytest.raises(ConfigError, match=re.escape(f"data.redact.key_env: {message}")):
        Rules.of(RedactionSettings(key_env="A_KEY"))


def test_another_key_is_another_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for key in ("a key of sixteen bytes or more", "another key of sixteen bytes"):
        monkeypatch.setenv("A_KEY", key)
        found.append(Rules.of(RedactionSettings(key_env="A_KEY")).identity())
    assert found[0] != found[1]
    assert Rules().identity() == {"version": 1}


def test_an_unknown_country_is_told() -> None:
    with pytest.raises(ConfigError, match="no country 'UK'"):
        Rules.of(RedactionSettings(regions=["UK"]))


# --- rows


def table(**values: list[str | None]) -> pa.Table:
    return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})


def test_a_value_has_one_placeholder_in_all_columns_of_its_row() -> None:
    rows = table(
        text=["write ada@example.com", None, "nothing 12345", "bob@example.com"],
        more=["ADA@example.com or bob@example.com", "ada@example.com", "", "x"],
        label=["ada@example.com", "a", "b", "c"],
    )
    said, counts = columns.redact(rows, {"text", "more"}, Rules())
    assert said.to_pydict() == {
        "text": ["write <EMAIL_1>", None, "nothing 12345", "<EMAIL_1>"],
        "more": ["<EMAIL_1> or <EMAIL_2>", "<EMAIL_1>", "", "x"],
        "label": ["ada@example.com", "a", "b", "c"],
    }
    assert counts == Counter({"EMAIL": 4, "rows": 3})


def test_messages_keep_their_form() -> None:
    turns = [
        {"role": "user", "content": "I am ada@example.com\nand 4111 1111 1111 1111"},
        {"role": "assistant", "content": "Hello ada@example.com"},
    ]
    said, _ = columns.redact(table(messages=[json.dumps(turns), "not [json"]), {"messages"}, Rules())
    assert json.loads(said["messages"][0].as_py()) == [
        {"role": "user", "content": "I am <EMAIL_1>\nand <CARD_1>"},
        {"role": "assistant", "content": "Hello <EMAIL_1>"},
    ]
    escaped = json.dumps([{"role": "user", "content": "ada＠example.com"}])
    assert "\\uff20" in escaped
    said, _ = columns.redact(table(messages=[escaped]), {"messages"}, Rules())
    assert json.loads(said["messages"][0].as_py())[0]["content"] == "<EMAIL_1>"


def test_a_sentence_of_words_keeps_their_number() -> None:
    words = ["Call", "+44", "20", "7946", "0958", "(ada@example.com)", "or", "her"]
    said, counts = columns.redact(table(tokens=[json.dumps(words)]), {"tokens"}, Rules())
    assert json.loads(said["tokens"][0].as_py()) == [
        "Call", *["<PHONE_1>"] * 4, "(<EMAIL_1>)", "or", "her",
    ]  # fmt: skip
    assert counts == Counter({"PHONE": 1, "EMAIL": 1, "rows": 1})


def test_nothing_that_is_looked_for_is_passed_over_by_arrow() -> None:
    texts = [one.text for held_out in (False, True) for one in positives(6, 60, held_out)]
    rows = table(text=[text for text in texts if redacted(text) != text])
    said, counts = columns.redact(rows, {"text"}, Rules())
    assert said["text"].to_pylist() == [redacted(text) for text in rows["text"].to_pylist()]
    assert counts["rows"] == rows.num_rows


def test_a_placeholder_is_no_markup() -> None:
    """Codes of characters are resolved beside one as in any other text."""
    assert normalise(pa.array(["Tom &amp; <EMAIL_1>", "<b>&amp;</b>"])).to_pylist() == [
        "Tom & <EMAIL_1>",
        "<b>&amp;</b>",
    ]


# --- names


def says(monkeypatch: pytest.MonkeyPatch, *known: tuple[str, str, float]) -> list[list[str]]:
    """A model that knows some words: text, label, score. Returns what it is asked, as it is asked."""
    asked: list[list[str]] = []

    def predict(_: object, request: names.Request) -> Response:
        asked.append(list(request.inputs))
        return Response(
            results=[
                Answer(
                    entities=[
                        Tagged(label=label, text=word, start=match.start(), end=match.end(), score=score)
                        for match in re.finditer("|".join(word for word, _, _ in known), str(text))
                        for word, label, score in known
                        if word == match.group()
                    ]
                )
                for text in request.inputs
            ]
        )

    monkeypatch.setattr(names, "predict", predict)
    monkeypatch.setattr(names, "_model", lambda place: None)
    return asked


NAMED = Rules(names=NameSettings(model="ner@3", labels={"PER": "PERSON", "LOC": "ADDRESS"}))


def test_a_model_finds_people_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    says(
        monkeypatch,
        ("Ada", "PER", 0.9), ("Maybe", "PER", 0.3), ("Main St 5", "LOC", 0.9), ("Bath", "LOC", 0.8), ("ACME", "ORG", 0.9),
    )  # fmt: skip
    text = "Ada (ada@example.com) of ACME, Main St 5, Bath; Maybe Ada"
    assert Redaction(NAMED).text(text) == "<PERSON_1> (<EMAIL_1>) of ACME, <ADDRESS_1>; Maybe <PERSON_1>"


def test_a_form_is_surer_than_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ("ada", "PER", 0.9), ("PERSON_1", "PER", 0.9))
    assert Redaction(NAMED).text("<PERSON_1> ada@example.com") == "<PERSON_1> <EMAIL_1>"


def test_what_a_model_finds_beside_a_form_is_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ("Ada ada@example.com, Bob", "PER", 0.9))
    assert Redaction(NAMED).text("by Ada ada@example.com, Bob.") == "by <PERSON_1> <EMAIL_1>, <PERSON_2>."


def test_a_model_is_asked_once_for_all_texts_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = says(monkeypatch, ("Ada", "PER", 0.9))
    rows = table(
        text=["Ada said", None, "no name", "Ada said"],
        tokens=[json.dumps(["I", "am", "Ada", "."]), "", json.dumps([]), None],
    )
    said, counts = columns.redact(rows, {"text", "tokens"}, NAMED)
    assert said["text"].to_pylist() == ["<PERSON_1> said", None, "no name", "<PERSON_1> said"]
    assert json.loads(said["tokens"][0].as_py()) == ["I", "am", "<PERSON_1>", "."]
    assert counts == Counter({"PERSON": 2, "rows": 2})
    assert len(asked) == 1


def test_entities_side_by_side_are_one() -> None:
    entities: list[Entity] = [(0, 6, "ADDRESS"), (8, 12, "ADDRESS"), (13, 16, "PERSON"), (20, 24, "PERSON")]
    assert names._joined("Main 5, Bath Ada and Bob.", entities) == [
        (0, 12, "ADDRESS"),
        (13, 16, "PERSON"),
        (20, 24, "PERSON"),
    ]


@pytest.mark.usefixtures("storage")
def test_a_version_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match="no model version ner@3 in storage"):
        Rules.of(RedactionSettings(names=NameSettings(model="ner@3")))


# --- time


def seconds(text: str) -> float:
    """Of the processor, the least of three tries."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        redacted(text)
        taken.append(time.process_time() - start)
    return min(taken)


HOSTILE = ["1-", "a@", "::", "DE89 ", "1 ", ".", "://a:", "eyJ", "4111 ", "+1 ", "a.", "password", "password=", "-----BEGIN PRIVATE KEY-----",
           "&#64;", "\u200b1", "a (at) ", "aa:", "DE", "1.1.", "<EMAIL_1", "secret ", "a b ", "ａ", "token: ", '"', "%40", "--token ", "sk-", "(", "1\n"]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", HOSTILE)
def test_time_grows_with_the_text_and_not_faster(part: str) -> None:
    """Four times the text takes about four times as long; what backtracks takes sixteen times as long and more."""
    short, long = (part * (size // len(part)) for size in (15_000, 60_000))
    assert seconds(long) < 9 * seconds(short) + 0.02


@pytest.mark.timeout(30)  # what backtracks takes minutes
@pytest.mark.parametrize("part", ["1-", "a@", "::", "DE89 ", "1 ", ".", "://a:", "eyJ"])
def test_long_hostile_texts_are_read_once(part: str) -> None:
    text = part * (60_000 // len(part))
    assert redacted(text) == text
