"""Text as the model should see it: mended encoding, NFC, no control characters, single spaces.

Most rows of real data need nothing, and looking is cheaper than mending: one RE2 pass (0.4 µs for a
review of 300 characters) finds the rows that might need something, and only these go through Python and
ftfy (40 to 180 µs each, more than their tokenisation).
"""

from __future__ import annotations

import re

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


_SUSPECT = "|".join([_SPACING, _ENTITY, _mojibake_pattern()])


def normalise(texts: pa.Array) -> pa.Array:
    """Normalised copy of a string array; nulls stay null, and a text may become empty."""
    suspect = pc.match_substring_regex(texts, _SUSPECT)
    if pc.any(suspect).as_py():
        mended = [normalise_text(t) for t in texts.filter(suspect).to_pylist()]
        texts = pc.replace_with_mask(texts, pc.fill_null(suspect, False), pa.array(mended, texts.type))
    return pc.utf8_normalize(texts, "NFC")


def normalise_text(text: str) -> str:
    """One text, normalised all but NFC."""
    if "&" in text and "<" not in text:  # with tags, it is markup, and `&lt;` must stay
        text = ftfy.fixes.unescape_html(text)
    if not text.isascii():
        text = ftfy.fix_encoding(text)
    text = _DELETED.sub("", _TERMINAL.sub("", text))
    return " ".join(text.split())


def is_empty(texts: pa.Array) -> np.ndarray:
    """Bool [rows]: null or without a character."""
    return np.asarray(pc.fill_null(pc.equal(texts, ""), True))
