"""Keys of `data.near` and `data.clean`: which rows say the same, what is mended in texts, and which are left out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.settings.embedding import EmbedderSettings
from lib.settings.sections import Positive, Section, Share


class SemanticSettings(EmbedderSettings):
    """Near duplicates by what texts mean: rows whose vectors point the same way (`lib.data.alike.semantic`)."""

    threshold: Annotated[float, Field(ge=0.7, le=1)] = 0.95
    """Cosine of two texts' vectors from which on they are near duplicates."""


class QuarantineSettings(Section):
    """Rows and files that cannot be used: up to a share they are set aside, with the reason, and the job goes on."""

    share: Share = 0.0
    """Of the rows, and of the bytes by files that are damaged. 0: the first problem ends the job."""


class NearSettings(Section):
    """Near duplicates: texts that share so much that one of them is as good as all (`lib.data.alike.near`).

    The leakage check goes by the same keys, whether near duplicates are dropped or kept.
    """

    duplicates: Literal["drop", "keep"] = "keep"
    """drop: one row of each cluster of near duplicates stays."""
    threshold: Annotated[float, Field(ge=0.3, le=1)] = 0.8
    """Jaccard similarity of two texts' shingles from which on they are near duplicates."""
    unit: Literal["words", "characters"] = "words"
    """What a shingle is made of. In a language without spaces between words, each character counts as a word."""
    size: Annotated[int, Field(ge=1, le=16)] = 2
    """Units in a shingle: the larger, the more of them an edit changes."""
    keep: Literal["first", "longest", "best"] = "first"
    """Which row of a cluster stays: the first in source order, that of the longest text, or that of the largest `column`."""
    column: str | None = None
    """Of the source: numbers by which a row is the best; an empty one is below all others."""
    semantic: SemanticSettings | None = None
    """Texts that say the same in other words are near duplicates too; an encoder reads every row once."""

    @model_validator(mode="after")
    def _column(self) -> NearSettings:
        if (self.keep == "best") != (self.column is not None):
            raise ValueError(
                "keep: best goes with column, the column of numbers that it goes by; give both or none"
            )
        return self


class Bounds(Section):
    """The least and the most of something; None: any number."""

    least: Annotated[int, Field(ge=0)] = 0
    most: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"least must not be above most, and {self.least} is above {self.most}")
        return self

    def hold(self, count: int) -> bool:
        return self.least <= count and (self.most is None or count <= self.most)


class LengthSettings(Section):
    """How long a row's texts may be together."""

    characters: Bounds = Bounds()
    words: Bounds | None = None
    """In a language without spaces between words, each character counts as one."""


class RepetitionSettings(Section):
    """How much a text may repeat itself: shares of its lines or characters, by default those of Gopher's web pages
    (Rae et al. 2021, table A1)."""

    lines: Share = 0.3
    """Lines that are there already."""
    line_characters: Share = 0.2
    """Characters in such lines."""
    top: dict[Positive, Share] = {2: 0.2, 3: 0.18, 4: 0.16}
    """n → characters in the run of n words that takes most of them, where it occurs more than once."""
    duplicate: dict[Positive, Share] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """n → characters in runs of n words that occur more than once."""
    least_words: Positive = 50
    """Runs of words are looked at in texts of so many words or more: a short one repeats some by nature, and Gopher's
    pages have 50 at least."""


class CleanSettings(Section):
    """What is mended in texts, in this order, and which rows are left out, by the first filter that they do not pass.

    Nothing by default. Every text is in Unicode's composed form, without control characters and with its encoding
    mended, whatever stands here.
    """

    unicode: bool = False
    """Beside that: surrogates and ligatures (ftfy)."""
    html: bool = False
    """Tags, comments, scripts and styles removed, entities resolved."""
    controls: bool = False
    """Control, zero-width and direction characters and terminal escapes removed."""
    whitespace: bool = False
    """Blanks joined, line ends unified, at most one empty line."""
    length: LengthSettings | None = None
    languages: list[str] = []
    """ISO 639-1 codes, such as [en, zh], of what stays. A text of fewer than 20 letters tells no language and stays."""
    least_language: Share = 0.2
    """How probable these languages have to be together."""
    repetition: RepetitionSettings | None = None
    symbols: Share | None = None
    """Most that characters other than letters, digits and blanks may make up."""
    samples: Annotated[int, Field(ge=0, le=20)] = 3
    """Rows that the manifest shows of those that each filter has left out."""

    @property
    def does_nothing(self) -> bool:
        return self.model_copy(update={"samples": 3, "least_language": 0.2}) == CleanSettings()
