"""Changes of words: as many as are asked for, the same for the same chance, and none of what must stay."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lib.data.augment.methods import BY_NAME, mistyped
from lib.data.augment.thesaurus import Thesaurus
from lib.data.augment.words import Words

TEXT = (
    "The Dress is soft and warm, it fits me very well; I would buy it again from <EMAIL_1> but not in BLACK"
)
THESAURUS = Thesaurus({"dress": ["gown"], "soft": ["smooth", "gentle"], "black": ["dark"], "not": ["never"]})
CHINESE = Thesaurus({"漂亮": ["好看", "美丽"], "衣服": ["衣裳"], "好": ["棒"]})


def changed(
    method: str, text: str, alpha: float = 0.1, seed: int = 0, by: Thesaurus = THESAURUS
) -> str | None:
    words = BY_NAME[method](Words.of_text(text, ("not",)), alpha, random.Random(seed), by)
    return None if words is None else words.text


@pytest.mark.parametrize("method", BY_NAME)
def test_chance_decides_and_nothing_else(method: str) -> None:
    said = [changed(method, TEXT, 0.1, seed) for seed in range(20)]
    assert said == [changed(method, TEXT, 0.1, seed) for seed in range(20)]
    assert len(set(said)) > 3
    assert all(text and text != TEXT and "<EMAIL_1>" in text and " not " in text for text in said)


def test_as_many_words_become_others_as_alpha_says() -> None:
    words = TEXT.split()
    for alpha, count in ((0.01, 1), (0.1, 2), (0.15, 3), (1.0, 3)):
        said = (changed("synonyms", TEXT, alpha) or "").split()
        assert sum(a != b for a, b in zip(words, said, strict=True)) == count
    every = changed("synonyms", TEXT, 1.0) or ""
    assert "Gown" in every
    assert "DARK" in every
    assert "smooth" in every or "gentle" in every


def test_words_of_a_language_without_spaces_are_looked_up_in_the_text() -> None:
    assert changed("synonyms", "这件衣服很漂亮。", 1.0, by=CHINESE) in (
        "这件衣裳很好看。",
        "这件衣裳很美丽。",
    )
    assert changed("synonyms", "很好", 1.0, by=CHINESE) == "很棒"
    assert changed("synonyms", "漂 亮", 1.0, by=CHINESE) is None


def test_words_change_places_and_signs_stay() -> None:
    said = changed("swap", "one two, three four!") or ""
    assert sorted(said.replace(",", "").replace("!", "").split()) == ["four", "one", "three", "two"]
    assert said.endswith("!")
    assert said.split()[1].endswith(",")
    assert changed("swap", "two <EMAIL_1>") is None
    assert changed("swap", "so so") is None


def test_words_go_with_their_probability_one_at_least_and_one_at_least_stays() -> None:
    text = " ".join(f"w{i}" for i in range(40))
    gone = [40 - len((changed("delete", text, 0.1, seed) or "").split()) for seed in range(300)]
    assert min(gone) == 1
    assert sum(gone) / len(gone) == pytest.approx(4, abs=0.4)
    assert all((changed("delete", "one two", 1.0, seed) or "").strip() in ("one", "two") for seed in range(5))
    assert changed("delete", "word") in (None, "word")
    assert changed("delete", "<EMAIL_1>") is None


def test_synonyms_are_put_in_anywhere() -> None:
    said = [changed("insert", "a soft dress", 0.1, seed) or "" for seed in range(50)]
    assert {len(text.split()) for text in said} == {4}
    assert {text.split().index("gown") for text in said if "gown" in text} == {0, 1, 2, 3}
    assert changed("insert", "nothing known") is None


def test_typing_errors_are_of_four_kinds() -> None:
    rng = random.Random(1)
    said = Counter(mistyped("fits", rng) for _ in range(2000))
    assert "fits" not in said
    assert {"ifts", "ftis", "fist"} <= set(said)  # turned round
    assert {"its", "fts", "fis", "fit"} <= set(said)  # missing
    assert {"ffits", "fiits", "fitts", "fitss"} <= set(said)  # twice
    assert {"gits", "fots", "firs", "fita"} <= set(said)  # the key beside
    assert all(len(word) in (3, 4, 5) for word in said)
    assert changed("spelling", "a be 12 <EMAIL_1> 衣服衣服 not") is None
    assert mistyped("ÖÖÖ", rng) in ("ÖÖ", "ÖÖÖÖ")


def test_in_an_entity_no_word_becomes_another_but_its_letters_may() -> None:
    sentence = Words.of_sentence(["soft", "soft", "Dress"], [0, 1, 2], ())
    for seed in range(10):
        said = BY_NAME["synonyms"](sentence, 1.0, random.Random(seed), THESAURUS)
        assert said is not None
        assert said.words[0] in ("smooth", "gentle")
        assert (said.words[1:], said.tags) == (("soft", "Dress"), (0, 1, 2))
    said = BY_NAME["spelling"](sentence, 1.0, random.Random(0), THESAURUS)
    assert said is not None
    assert all(a != b for a, b in zip(said.words, sentence.words, strict=True))
    assert said.tags == (0, 1, 2)
