"""What is mended in texts, and which rows are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import clean
from lib.data.clean import mend_html, mend_unicode, mend_whitespace, repeating, words
from lib.errors import ConfigError
from lib.samples import sample_path
from lib.settings import CleanSettings, DataSettings, RepetitionSettings
from lib.text import without_controls

NAMES, LISTS = {"text", "messages"}, {"messages"}
ENGLISH = "The dress arrived on Tuesday and I have worn it every day since then."
CHINESE = "裙子星期二就到了，从那以后我每天都穿着它。"
GERMAN = "Das Kleid kam am Dienstag an, und seitdem trage ich es jeden Tag mit Freude."


def cleaned(texts: list[str | None], **settings: Any) -> clean.Cleaned:
    columns = {"text": pa.array(texts, pa.string()), "label": pa.array(["<b>1</b>"] * len(texts))}
    return clean.clean(columns, NAMES, LISTS, CleanSettings.model_validate(settings))


def rejected(texts: list[str], **settings: Any) -> dict[int, str]:
    return {row: name for row, (name, _, _) in cleaned(texts, **settings).rejected.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plain", "plain"),
        ("it fits âœ” no problems", "it fits ✔ no problems"),
        ("cafe\u0301 \ufb01ne", "café fine"),
        ("很好，非常合身！“真的”", "很好，非常合身！“真的”"),  # full-width signs are how Chinese is written
        ("\ud83d\ude00", "😀"),
    ],
)
def test_unicode(before: str, after: str) -> None:
    assert mend_unicode(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<p>It <b>fits</b>&nbsp;well.</p><p>Love&#39;s it</p>", "It fits\xa0well.\nLove's it"),
        ("One<br>two<br/>three", "One\ntwo\nthree"),
        ("<script>alert(1)</script>Good<style>p {}</style><!-- no --> day", "Good day"),
        ("<h1>Size</h1><ul><li>S</li><li>M</li></ul>", "Size\nS\nM"),
        ("<div>裙子<span>很</span>好看</div>", "裙子很好看"),
        ("<p>unclosed <b>bold", "unclosed bold"),
        ("Fish &amp; chips &lt;3", "Fish & chips <3"),
        ("a < b and c > d, 1<2", "a < b and c > d, 1<2"),
        ("I <3 it; mail <EMAIL_1>", "I <3 it; mail <EMAIL_1>"),
        ("<p>List<String> of <EMAIL_1> &lt;b&gt;</p>", "List<String> of <EMAIL_1> <b>"),
        ("AT&T &unknown;", "AT&T &unknown;"),
        ("<!-- alone -->", ""),
        ("<?xml version='1.0' encoding='latin-1'?><p>x</p>", "<?xml version='1.0' encoding='latin-1'?>\nx"),
    ],
)
def test_html(before: str, after: str) -> None:
    assert mend_html(before) == after


def test_controls_and_whitespace() -> None:
    assert without_controls("a\x00b\x1b[31mred\x1b[0m\u200b\ufeff \u202eno") == "abred no"
    # Joiners make one sign of several, and tabs and line ends are white space.
    assert without_controls("👩\u200d💻\tन\u200dम\n") == "👩\u200d💻\tन\u200dम\n"
    assert mend_whitespace("  a \u00a0\u3000 b\t\r\nc  \n\n\n\n    x  = 1\n") == "a b\nc\n\n    x = 1"
    assert mend_whitespace(" \n\t\u3000") == ""
    assert mend_whitespace("line\u2028next\x85third") == "line\nnext\nthird"


def test_steps_are_done_in_order_and_counted() -> None:
    found = cleaned(
        ["<p>a&#x200b;b</p>  <p>c</p>", "plain", None, "x \x01"],
        unicode=True, html=True, controls=True, whitespace=True,
    )  # fmt: skip
    assert found.columns["text"].to_pylist() == ["ab\nc", "plain", None, "x"]
    assert found.columns["label"][0].as_py() == "<b>1</b>"
    assert found.changed == {"html": 1, "controls": 2, "whitespace": 1}
    assert found.rejected == {}


def test_without_steps_nothing_is_touched() -> None:
    columns = {"text": pa.array(["<b>x</b>"])}
    found = clean.clean(columns, NAMES, LISTS, CleanSettings())
    assert found.columns is columns
    assert CleanSettings(samples=9).does_nothing
    assert not CleanSettings(languages=["en"]).does_nothing


def test_messages_are_mended_each_by_itself() -> None:
    turns = [
        {"role": "user", "content": "<p>Hi</p>"},
        {"from": "gpt", "value": "a\x01b", "n": 2},
        {"role": "<b>user</b>", "content": None},
    ]
    given = [
        json.dumps(turns),
        "[broken <b>json",
        "<i>plain</i>",
        '[{"role": "user", "content": "as it is"}]',
    ]
    columns = {"messages": pa.array(given), "question": pa.array(["<b>not ours</b>"] * 4)}
    found = clean.clean(columns, NAMES, LISTS, CleanSettings(html=True, controls=True))
    mended = found.columns["messages"].to_pylist()
    assert json.loads(mended[0]) == [
        {"role": "user", "content": "Hi"},
        {"from": "gpt", "value": "ab", "n": 2},
        {"role": "<b>user</b>", "content": None},
    ]
    assert mended[1:] == ["[broken <b>json", "plain", given[3]]
    assert found.columns["question"] is columns["question"]
    assert found.changed == {"html": 2, "controls": 1}


def test_of_a_text_that_mending_empties_the_row_is_left_out() -> None:
    dialogue = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<!-- -->"}])
    columns = {"messages": pa.array([dialogue, None])}
    found = clean.clean(columns, NAMES, LISTS, CleanSettings(html=True))
    assert {row: name for row, (name, _, _) in found.rejected.items()} == {0: "emptied"}
    assert found.without(np.array([True, False]), NAMES)["messages"].to_pylist() == [None, None]


def test_words_of_both_kinds_of_script() -> None:
    assert words("It's 3 o'clock, naïve_one") == ["It", "s", "3", "o", "clock", "naïve", "one"]
    assert words("我买了iPhone15，很好") == ["我", "买", "了", "iPhone15", "很", "好"]


def test_length_by_characters_and_words() -> None:
    texts = ["", "ok", "one two three", "一二三", "x" * 30]
    assert rejected(texts[1:], length={"characters": {"least": 3, "most": 20}}) == {0: "length", 3: "length"}
    assert rejected(texts[1:], length={"words": {"least": 3}}) == {0: "length", 3: "length"}
    # An empty text is counted as empty, and not here.
    assert rejected(texts[:1], length={"characters": {"least": 3}}) == {}
    (why,) = cleaned(["x" * 300], length={"characters": {"most": 20}}).rejected.values()
    assert why == ("length", "300 characters", "x" * clean.SHOWN_CHARACTERS)


def test_languages() -> None:
    texts = [ENGLISH, CHINESE, GERMAN, "Gut", "👍👍👍", "12345 67890 12345 67890"]
    assert rejected(texts, languages=["en"]) == {1: "languages", 2: "languages"}
    assert rejected(texts, languages=["zh"]) == {0: "languages", 2: "languages"}
    assert rejected(texts, languages=["en", "zh"]) == {2: "languages"}
    assert rejected(texts, languages=["en", "zh", "de"]) == {}
    assert cleaned([GERMAN], languages=["en"]).rejected[0][1].startswith("de (")


def samples(language: str) -> Iterator[str]:
    """What is said in ChatterBot's corpus of this language and is long enough to tell one."""
    folder = sample_path("sample://small-talk", "data").parent.parent / language
    for file in sorted(folder.glob("*.yml")):
        for said in yaml.load(file.read_bytes(), yaml.CBaseLoader)["conversations"]:
            yield from (
                text
                for text in said
                if isinstance(text, str) and len(text) > (12 if language == "chinese" else 40)
            )


@pytest.mark.parametrize(("language", "code"), [("english", "en"), ("chinese", "zh")])
def test_languages_of_the_sample_texts(language: str, code: str) -> None:
    texts = sorted(set(samples(language)))[:200]
    assert len(texts) == 200
    assert len(rejected(texts, languages=[code])) <= 4
    assert len(rejected(texts, languages=["fr"])) >= 190


def test_an_unknown_language_is_one_line() -> None:
    data = DataSettings.model_validate({"source": "a.csv", "clean": {"languages": ["en", "eng"]}})
    with pytest.raises(ConfigError, match=r"data\.clean\.languages: 'eng' is not known"):
        clean.check(data, NAMES, "sentiment")
    with pytest.raises(ConfigError, match=r"data\.clean: the rows of tagging are no texts"):
        clean.check(data, set(), "tagging")
    clean.check(DataSettings.model_validate({"source": "a.csv"}), set(), "tagging")


MOST = RepetitionSettings()


def test_repetition() -> None:
    prose = " ".join(f"word{n * n}" for n in range(400))
    assert repeating(prose, MOST) is None
    assert repeating("Buy now!\n" * 5, MOST) == "0.80 of the lines are repeated"
    long, short = "a long line of many words that comes again", "\n".join(f"l{i}" for i in range(8))
    assert repeating(f"{long}\n{short}\n{long}", MOST) == "0.42 of the characters are in repeated lines"
    loop = "I do not know what to say. " * 12
    assert repeating(loop, MOST) == "one run of 2 words takes 0.42 of the characters"
    assert repeating(f"{prose} {prose}", MOST) == "repeated runs of 5 words take 1.00 of the characters"
    assert repeating("so good " * 30 + prose[:50], MOST).startswith("one run of 2 words takes 0.8")  # type: ignore[union-attr]
    assert repeating(CHINESE * 3, MOST) == "one run of 4 words takes 0.21 of the characters"
    # A short text repeats some by nature.
    assert repeating("so so so so", MOST) is None
    assert repeating("so so so so", RepetitionSettings(least_words=2)) is not None


def test_repetition_is_looked_for_in_each_message() -> None:
    told = [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": "no no yes no " * 20}]
    columns = {"messages": pa.array([json.dumps(told), json.dumps(told[:1])])}
    found = clean.clean(columns, NAMES, LISTS, CleanSettings(repetition=MOST))
    assert list(found.rejected) == [0]


def test_symbols() -> None:
    texts = ["Fine, thanks!", "#### $$$ --> !!!", "👍👍👍👍 ok", CHINESE, "हिन्दी में लिखा है", "", "   "]
    assert rejected(texts, symbols=0.4) == {1: "symbols", 2: "symbols"}
    assert rejected(texts[:1], symbols=0.0) == {0: "symbols"}


def test_a_row_is_counted_for_its_first_filter_alone() -> None:
    assert rejected(["###"], symbols=0.1, length={"characters": {"least": 5}}) == {0: "length"}


@settings(deadline=None)  # the first text waits for the detector
@given(st.text(max_size=300))
def test_any_text_is_taken_and_what_is_mended_stays(text: str) -> None:
    wanted = CleanSettings(
        unicode=True, html=True, controls=True, whitespace=True, languages=["en"], symbols=0.5,
        repetition=RepetitionSettings(least_words=2),
    )  # fmt: skip
    first = clean.clean({"text": pa.array([text])}, NAMES, LISTS, wanted)
    assert first.columns["text"][0].as_py() == mend_whitespace(first.columns["text"][0].as_py())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", ["<b>", "<", "&lt;", "<div", "a\n", "\u200b ", "<!--", "word ", "</p>"])
def test_long_hostile_texts_are_read_once(part: str) -> None:
    cleaned(
        [part * (1_000_000 // len(part))],
        unicode=True, html=True, controls=True, whitespace=True, languages=["en"], symbols=0.9, repetition={},
        length={"words": {"least": 1}},
    )  # fmt: skip
