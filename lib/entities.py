"""Tag schemes and entities: any scheme in, IOB2 out, spans as conlleval and seqeval find them.

A tag is `O`, or a prefix and a kind of entity: `B-PER`. Prefixes: IOB1 and IOB2 use B and I, BIOES also E and S
(BILOU calls them L and U), IO only I. A span is (kind, first, last + 1), places counted in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUTSIDE = "O"
PREFIXES = frozenset("BIESLU")
Span = tuple[str, int, int]


def parse(tag: str) -> tuple[str, str]:
    """Prefix and kind; ("O", "") for a word outside. Raises ValueError for anything else."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if not dash or prefix not in PREFIXES or not kind:
        raise ValueError(
            f"has the tag {tag!r}; give O, or a prefix (B, I, E, S, L, U) and a kind, such as B-PER"
        )
    return prefix, kind


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence, whatever the scheme.

    An entity goes on until another kind, a word outside, or a prefix that ends or begins one: the rules of
    conlleval (Tjong Kim Sang and Buchholz 2000), which are seqeval's default too. A span that begins with I, as
    in IOB1 or in a model's answer, counts.
    """
    found: list[Span] = []
    open_kind, began, previous = "", 0, OUTSIDE
    for i, tag in enumerate(tags):
        prefix, kind = parse(tag)
        continues = open_kind == kind and prefix in "IEL" and previous not in "ESLU"
        if open_kind and not continues:
            found.append((open_kind, began, i))
            open_kind = ""
        if prefix != OUTSIDE and not continues:
            open_kind, began = kind, i
        previous = prefix
    if open_kind:
        found.append((open_kind, began, len(tags)))
    return found


def iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2: B on the first word of each, I on the others."""
    written = [OUTSIDE] * len(tags)
    for kind, first, end in spans(tags):
        written[first:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - first - 1)
    return written


def tag_names(kinds: Sequence[str]) -> list[str]:
    """The classes of an IOB2 tagger: O, then B and I of each kind."""
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def score(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Kind → `rows` (true entities), `precision`, `recall`, `f1`; under "" over all entities (micro-average).

    An entity is right when its kind and both ends are (Tjong Kim Sang and De Meulder 2003).
    """
    tally: dict[str, list[int]] = {"": [0, 0, 0]}
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        real, said = set(spans(true_tags)), set(spans(predicted_tags))
        for place, some in enumerate((real & said, said, real)):
            for kind, _, _ in some:
                tally.setdefault(kind, [0, 0, 0])[place] += 1
                tally[""][place] += 1
    return {kind: _figures(*counts) for kind, counts in sorted(tally.items())}


def _figures(right: int, said: int, real: int) -> dict[str, Any]:
    return {
        "rows": real,
        "precision": right / said if said else 0.0,
        "recall": right / real if real else 0.0,
        "f1": 2 * right / (said + real) if said + real else 0.0,
    }
