"""Text as the model should see it: mended encoding, NFC, no control characters, single spaces.

Most rows of real data need nothing, and looking is cheaper than mending: one RE2 pass (0.4 µs for a
review of 300 characters) finds the rows that might need something, and only these go through Python and
ftfy (40 to 180 µs each, more than their tokenisation).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.chardata import CHARMAP_ENCODINGS

# Blanks other than single inner spaces, controls, soft hyphens, zero-width and direction marks.
_SPACING = (
    r"[\x00-\x1f\x7f-\xa0\xad\x{1680}\x{2000}-\x{200b}\x{200e}\x{200f}\x{2028}-\x{202f}\x{205f}-\x{2064}"
    r"\x{2066}-\x{206f}\x{3000}\x{feff}\x{fff9}-\x{fffc}]|  |^ | $"
)
_ENTITY = r"&#?\w{1,24};"
_DELETED = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffc]"
)
# Not what redaction put there: <EMAIL_1>.
_MARKUP = re.compile(r"<(?![A-Z]{2,8}_[0-9a-f]{1,16}>)")
_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _mojibake_pattern() -> str:
    """RE2 for what UTF-8 looks like when it was read as a single-byte encoding.

    A lead byte (C2 to F4) is followed by a continuation byte (80 to BF); seen through each encoding that
    ftfy mends, these are two small sets of characters. ftfy also mends sequences in which the byte A0, a
    no-break space in most encodings, became a plain space: hence the optional space and the last part.
    """
    leads: set[str] = set()
    continuations: set[str] = set()
    for encoding in ["latin-1", *CHARMAP_ENCODINGS]:
        leads.update(bytes(range(0xC2, 0xF5)).decode(encoding, errors="ignore"))
        continuations.update(bytes(range(0x80, 0xC0)).decode(encoding, errors="ignore"))
    classes = ["".join(sorted(f"\\x{{{ord(c):x}}}" for c in chars)) for chars in (leads, continuations)]
    return rf"[{classes[0]}] ?[{classes[1]}]|[\xc2\xc3\xc5\xce\xd0\xd9] "


# NFC leaves everything below the first combining mark as it is.
_COMPOSABLE = r"[\x{300}-\x{10ffff}]"
_SUSPECT = "|".join([_SPACING, _ENTITY, _mojibake_pattern()])


def normalise(texts: pa.Array) -> pa.Array:
    """Normalised copy of a string array; nulls stay null, and a text may become empty."""
    texts = _apply(_mend, texts, _SUSPECT)
    # Not Arrow's utf8_normalize: in version 25 its NFC gives NFD.
    return _apply(lambda text: unicodedata.normalize("NFC", text), texts, _COMPOSABLE)


def _apply(change: Callable[[str], str], texts: pa.Array, pattern: str) -> pa.Array:
    """`texts` with `change` applied to those that match the RE2 pattern."""
    matching = pc.fill_null(pc.match_substring_regex(texts, pattern), False)
    if not pc.any(matching).as_py():
        return texts
    changed = [change(text) for text in texts.filter(matching).to_pylist()]
    return pc.replace_with_mask(texts, matching, pa.array(changed, texts.type))


def _mend(text: str) -> str:
    if "&" in text and not _MARKUP.search(text):  # with tags, it is markup, and `&lt;` must stay
        # Scraped text is often escaped more than once (&amp;#39;); each round makes it shorter.
        while (plain := ftfy.fixes.unescape_html(text)) != text:
            text = plain
    if not text.isascii():
        text = ftfy.fix_encoding(text)
    return " ".join(without_controls(text).split())


def without_controls(text: str) -> str:
    """Without control characters other than tabs and line ends, terminal escapes, soft hyphens, zero-width and direction
    marks. Joiners stay: Persian, the scripts of India and emoji are written with them."""
    return _DELETED.sub("", _TERMINAL.sub("", text))


def is_empty(texts: pa.Array) -> np.ndarray:
    """Bool [rows]: null or without a character."""
    return np.asarray(pc.fill_null(pc.equal(texts, ""), True))
