"""Texts as words, and back; what goes and comes leaves the rest as it was written."""

from __future__ import annotations

import pytest

from lib.data.augment.words import Words


def cut(text: str, *keep: str) -> Words:
    return Words.of_text(text, keep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's a well-made dress, size 12!", ["It's", "a", "well-made", "dress", "size", "12"]),
        ("write to <EMAIL_1> or https://a.b/c?d", ["write", "to", "<EMAIL_1>", "or", "https://a.b/c?d"]),
        ("这件衣服 really 好。", ["这", "件", "衣", "服", "really", "好"]),
        ("ผ้านุ่ม", ["ผ้", "า", "นุ่", "ม"]),
        ("…!", []),
    ],
)
def test_a_text_is_words_and_what_stands_between_them(text: str, words: list[str]) -> None:
    found = cut(text)
    assert list(found.words) == words
    assert found.text == text


def test_placeholders_addresses_and_kept_words_are_not_changeable() -> None:
    found = cut("Do NOT write to <PHONE_2a9c> at http://x.y today", "not")
    assert [found.words[i] for i in found.changeable] == ["Do", "write", "to", "at", "today"]


@pytest.mark.parametrize(
    ("text", "gone", "left"),
    [
        ("a soft, warm dress", [1], "a, warm dress"),
        ("a soft, warm dress", [2], "a soft, dress"),
        ("a soft warm dress!", [3], "a soft warm!"),
        ("soft dress", [0], " dress"),
        ("这件衣服好", [1, 2], "这服好"),
        ("(soft) dress", [0], "() dress"),
    ],
)
def test_a_word_goes_with_a_blank(text: str, gone: list[int], left: str) -> None:
    assert cut(text).without(gone).text == left


def test_a_word_comes_to_stand_anywhere() -> None:
    words = cut("a dress.")
    assert [words.inserted(i, "red").text for i in range(3)] == [
        "red a dress.",
        "a red dress.",
        "a dress red.",
    ]
    assert cut("好").inserted(0, "很").text == "很好"


# O, B-PER, I-PER, B-LOC, I-LOC
@pytest.mark.parametrize(
    ("tags", "gone", "left"),
    [
        ([1, 2, 2, 0, 3], [0], [1, 2, 0, 3]),
        ([1, 2, 2, 0, 3], [0, 1], [1, 0, 3]),
        ([1, 2, 2, 0, 3], [1], [1, 2, 0, 3]),
        ([1, 2, 2, 0, 3], [4], [1, 2, 2, 0]),
        ([1, 2, 3, 4, 0], [0, 2], [1, 3, 0]),
        ([1, 1, 2, 0, 0], [0], [1, 2, 0, 0]),
        ([1, 3, 4, 2, 0], [1], [1, 3, 2, 0]),
        ([1, 2, 1, 2, 0], [1, 2], [1, 1, 0]),
    ],
)
def test_what_is_left_of_an_entity_begins_it(tags: list[int], gone: list[int], left: list[int]) -> None:
    words = Words.of_sentence(list("abcde"), tags, ())
    found = words.without(gone)
    assert list(found.tags or ()) == left
    assert list(found.words) == [w for i, w in enumerate("abcde") if i not in gone]
