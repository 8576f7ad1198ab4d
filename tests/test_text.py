"""Normalised text: what changes, what must not, and that the quick check misses nothing that ftfy mends."""

from __future__ import annotations

import ftfy
import pyarrow as pa
import pytest
from ftfy.chardata import CHARMAP_ENCODINGS

from lib.text import is_empty, normalise


def clean(text: str | None) -> str | None:
    # Beside a row that needs nothing, so that only the right rows are replaced.
    first, result, last = normalise(pa.array(["Fine as it is.", text, "So is this."])).to_pylist()
    assert (first, last) == ("Fine as it is.", "So is this.")
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  two  spaces\r\n\r\nand a\tbreak ", "two spaces and a break"),
        ("no\u00a0break\u2003space\u3000wide", "no break space wide"),
        (
            "bell\x07, escape \x1b[31mred\x1b[0m, soft\u00adhyphen, \ufeffmark",
            "bell, escape red, softhyphen, mark",
        ),
        ("cafe\u0301", "caf\u00e9"),
        ("I&amp;amp;#39;d say 5&#39;2", "I'd say 5'2"),
        ("J&apos;adore &amp; more", "J'adore & more"),
        ("&lt;b&gt; stays in <b>markup</b>", "&lt;b&gt; stays in <b>markup</b>"),
        ("AT&T, R&D; fish & chips", "AT&T, R&D; fish & chips"),
        ("schÃ¶n, itâ€™s dÃ©jÃ\xa0 vu", "schön, it’s déjà vu"),
        ("“curly” – don’t… 😀👍🏽", "“curly” – don’t… 😀👍🏽"),
        ("这件衣服很好", "这件衣服很好"),
        ("family 👨\u200d👩\u200d👧", "family 👨\u200d👩\u200d👧"),
        (" \t\u00a0\u200b ", ""),
        ("", ""),
        (None, None),
    ],
)
def test_normalise(text: str | None, expected: str | None) -> None:
    assert clean(text) == expected


def test_normalise_again_changes_nothing() -> None:
    texts = pa.array(["a  b", "schÃ¶n", "x\x00y", "caf\u00e9 \u2028 z", "&amp;amp;#39;"])
    once = normalise(texts)
    assert normalise(once.slice(0, 4)).to_pylist() == once.slice(0, 4).to_pylist()


LANGUAGES = {
    "French": "J’ai adoré cette robe, à porter là où il faut; elle coûte 30 € « voilà ».",
    "German": "Das Kleid ist wunderschön, die Größe paßt – für den Sommer.",
    "Russian": "Отличное платье, очень мягкая ткань, размер подошёл.",
    "Polish": "Sukienka jest śliczna, materiał miękki, świetnie leży.",
    "Turkish": "Bu elbise çok güzel. Şıklığı müthiş. İyi.",
    "Greek": "Το φόρεμα είναι υπέροχο.",
    "Arabic": "الفستان رائع والقماش ناعم",
    "Chinese": "这件衣服的质量非常好，面料舒适",
    "Portuguese": "Ótimo, não é? São João está à mão.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_mojibake_is_mended_wherever_ftfy_can(language: str) -> None:
    text = LANGUAGES[language]
    words = text.split()
    pieces = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    broken = set()
    for piece in pieces:
        for encoding in ["latin-1", *CHARMAP_ENCODINGS]:
            wrong = piece.encode().decode(encoding, errors="ignore")
            broken |= {wrong, wrong.replace("\xa0", " ")}
    broken_list = sorted(broken)
    mended = normalise(pa.array(broken_list)).to_pylist()
    missed = [
        (was, now)
        for was, now in zip(broken_list, mended, strict=True)
        if ftfy.fix_encoding(was) != was and now == was
    ]
    assert not missed
    # And what was never broken stays.
    assert clean(text) == text


def test_is_empty() -> None:
    assert is_empty(pa.array(["a", "", None, " "])).tolist() == [False, True, True, False]
