"""Personal data in texts, replaced by what it was: `<EMAIL_1>`, `<PHONE_1>`, `<CARD_1>` and so on.

    plain     a text as a reader sees it, and the way back to its own places
    forms     what its form gives away: addresses, keys, machines
    numbers   what check digits and numbering plans tell: cards, accounts, ids, phones
    names     people and postal addresses, by a tagging model
    columns   the texts of a source's rows

The same value has the same placeholder within a text (or within all texts of one call), however it is written, so that
what is said about it stays readable. With a key it is the same in all texts: `<EMAIL_3f9a2c…>`, HMAC-SHA256.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
import phonenumbers
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import SecretBytes

from lib.data.redact import forms, numbers
from lib.data.redact.plain import plain
from lib.errors import ConfigError, nearest
from lib.settings.redaction import KINDS, NAMES, NameSettings, RedactionSettings

# Part of the fingerprint of every dataset that is redacted. Raise it when other values are found.
VERSION = 1
LEAST_KEY_BYTES = 16
# Of a pseudonym; a million values share one with a probability of 0.2%.
PSEUDONYM_DIGITS = 12
# A text without any of these holds nothing that has a form. RE2, for Arrow, whose one look costs 4 µs a review; the
# finders, which are Python's, have gates of their own.
WORTH = (
    r"[^\x00-\x7f]|\\u|@|://|::|&#|[0-9](?:[^A-Za-z0-9]{0,6}[0-9]){5}|(?:[0-9A-Fa-f]{1,4}[.:-]){2}[0-9A-Fa-f]{2}"
    r"|[0-9A-Fa-f]{2}(?: [0-9A-Fa-f]{2}){5}|\bAT\b|[\[({<] ?(?:[Aa][Tt]|arroba|chez|arobase) ?[\])}>]"
    r"|[A-Za-z/+-]{8}[0-9_]|[0-9_][0-9A-Za-z_/+-]{8}|PRIVATE KEY|(?i:bearer|authorization)"
    r"|(?i:pass|pwd|secret|token|key|kennwort|contrase|credential)[^\n]{0,24}(?:[=:,>]|is|ist|est|es)"
    r"|--[a-z-]{0,20}(?i:pass|pwd|secret|token|key)|[0-9] ?[\[({](?:\.|dot)|(?i:\bmac\b|ethernet|hwaddr|bssid)"
)
PLACEHOLDER = re.compile(rf"<(?:{'|'.join([*KINDS, *NAMES])})_[0-9a-f]{{1,16}}>")
# Stands where something was found already: no part of a word or a number.
_TAKEN = "\ufffe"

Span = tuple[int, int, str, str]
"""Start, end, kind, and the value as it is compared."""
Entity = tuple[int, int, str]
"""Start, end and kind of what a model found."""


@dataclass(frozen=True)
class Rules:
    """What is looked for, and what stands in its place."""

    kinds: tuple[str, ...] = tuple(KINDS)
    regions: tuple[str, ...] = tuple(RedactionSettings().regions)
    """Countries whose phone numbers are known without the prefix of the country (ISO 3166)."""
    key: SecretBytes | None = None
    """Of pseudonyms; nothing that prints or logs it shows it."""
    names: NameSettings | None = None

    @classmethod
    def of(cls, settings: RedactionSettings, where: str = "data.redact") -> Rules:
        """With the key from the environment. Raises ConfigError where it is missing or short, and for a country that
        there is not."""
        for region in settings.regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                near = nearest(region, phonenumbers.SUPPORTED_REGIONS)
                raise ConfigError(f"{where}.regions: no country {region!r}{near} (ISO 3166)")
        key = _key(settings.key_env, where) if settings.key_env else None
        names = settings.names
        if names is not None:
            from lib.data.redact.names import placed

            names = placed(names)
        return cls(tuple(settings.kinds), tuple(settings.regions), key, names)

    def identity(self) -> dict[str, object]:
        """What a dataset's fingerprint says of it, beside the settings: another key or model gives other rows. Raises
        ConfigError or ModelError for a model that cannot be used."""
        found: dict[str, object] = {"version": VERSION}
        if self.key:
            found["key"] = _digest(self.key, b"which key is it")
        if self.names:
            from lib.data.redact.names import check

            found["model"] = check(self.names)
        return found


def _key(name: str, where: str) -> SecretBytes:
    key = os.environ.get(name, "").encode()
    if not key:
        raise ConfigError(
            f"{where}.key_env: the environment has no {name}; set it to {LEAST_KEY_BYTES} bytes or more"
        )
    if len(key) < LEAST_KEY_BYTES:
        raise ConfigError(
            f"{where}.key_env: {name} has {len(key)} bytes, which can be guessed; give {LEAST_KEY_BYTES} or more"
        )
    return SecretBytes(key)


def _digest(key: SecretBytes, said: bytes) -> str:
    return hmac.new(key.get_secret_value(), said, hashlib.sha256).hexdigest()[:PSEUDONYM_DIGITS]


@dataclass
class Redaction:
    """The placeholders of texts that belong together."""

    rules: Rules = Rules()
    counts: dict[str, int] = field(default_factory=dict)
    """Kind → different values that were found."""
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def text(self, text: str, entities: Iterable[Entity] | None = None) -> str:
        """`text` with placeholders; `entities` are what the model of the rules found, where it was asked before."""
        spans = self.spans(text, entities)
        parts, end = [], 0
        for start, stop, kind, value in spans:
            parts += [text[end:start], self.placeholder(kind, value)]
            end = stop
        return "".join([*parts, text[end:]]) if spans else text

    def spans(self, text: str, entities: Iterable[Entity] | None = None) -> list[Span]:
        """What is found, in order and without overlap."""
        if entities is None and self.rules.names:
            from lib.data.redact.names import find

            (entities,) = find([text], self.rules.names)
        return find_in(text, self.rules, entities or ())

    def value(self, value: object) -> object:
        """A JSON value with all its strings redacted; keys stay."""
        texts = list(dict.fromkeys(_strings(value)))
        # One look at all of them, and none that holds nothing is asked further; what a model finds has no form.
        worth = None if self.rules.names else set(compress(texts, may_hold(pa.array(texts, pa.string()))))
        return self._value(value, worth)

    def _value(self, value: object, worth: set[str] | None) -> object:
        if isinstance(value, str):
            return self.text(value) if worth is None or value in worth else value
        if isinstance(value, list):
            return [self._value(item, worth) for item in value]
        if isinstance(value, dict):
            return {key: self._value(item, worth) for key, item in value.items()}
        return value

    def placeholder(self, kind: str, value: str) -> str:
        known = (kind, value)
        if known not in self._known:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            name = str(self.counts[kind])
            if self.rules.key:
                name = _digest(self.rules.key, f"{kind}\0{value}".encode())
            self._known[known] = f"<{kind}_{name}>"
        return self._known[known]


def together(texts: list[str], rules: Rules) -> tuple[list[str], dict[str, int]]:
    """Texts of one document, the same value under the same placeholder; kind → different values that were found."""
    redaction = Redaction(rules)
    worth = np.ones(len(texts), bool) if rules.names else may_hold(pa.array(texts, pa.string()))
    said = [redaction.text(text) if look else text for text, look in zip(texts, worth, strict=True)]
    return said, redaction.counts


def told(counts: Mapping[str, int]) -> str:
    """Kinds and how many values of each, for people; `rows`, where they are counted, come last."""
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in counts.items() if kind != "rows")
    rows = f", in {counts['rows']:,} rows" if "rows" in counts else ""
    return f"{kinds}{rows}" if kinds else "nothing"


def may_hold(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Bool [texts]: which may hold something that has a form."""
    return np.asarray(pc.fill_null(pc.match_substring_regex(texts, WORTH), False))


def _strings(value: object) -> Iterator[str]:
    """Those of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value if isinstance(value, list) else value.values():
            yield from _strings(inner)


Finder = Callable[[str, Rules], Iterator[Span]]


def _by(kind: str, find: Callable[[str], Iterator[tuple[int, int, str]]]) -> tuple[set[str], Finder]:
    return {kind}, lambda text, rules: ((start, end, kind, value) for start, end, value in find(text))


# In this order: what an earlier one has found is not looked at again.
_FINDERS: tuple[tuple[set[str], Finder], ...] = (
    _by("URL", forms.urls),
    _by("KEY", forms.keys),
    _by("EMAIL", forms.emails),
    _by("IBAN", numbers.ibans),
    _by("MAC", forms.cards_of_networks),
    _by("IP", forms.machines),
    ({"ID", "CARD", "PHONE"}, lambda text, rules: numbers.numbers(text, rules.kinds, rules.regions)),
)


def find_in(text: str, rules: Rules, entities: Iterable[Entity] = ()) -> list[Span]:
    """What is found in a text, in order and without overlap."""
    found: list[Span] = []
    seen = plain(text)
    left = seen.text
    if "<" in left:  # what an earlier pass put there
        left = PLACEHOLDER.sub(lambda match: _TAKEN * len(match.group()), left)
    for kinds, finder in _FINDERS:
        if kinds.isdisjoint(rules.kinds):
            continue
        taken = 0
        parts: list[str] = []
        for start, end, kind, value in sorted(finder(left, rules), key=_longest_first):
            if start < taken:
                continue
            found.append((*seen.place(start, end), kind, value))
            parts += [left[taken:start], _TAKEN * (end - start)]
            taken = end
        if taken:
            left = "".join([*parts, left[taken:]])
    found += _named(text, entities, found)
    return sorted(found)


def _longest_first(span: Span) -> tuple[int, int]:
    return span[0], -span[1]


def _named(text: str, entities: Iterable[Entity], found: list[Span]) -> Iterator[Span]:
    """A model's entities, as far as nothing else was found in them, nor by an earlier pass."""
    if not entities:
        return
    taken = sorted([span[:2] for span in found] + [match.span() for match in PLACEHOLDER.finditer(text)])
    for start, end, kind in entities:
        for first, last in [*taken, (end, end)]:
            if last <= start or start >= end:
                continue
            letters = [place for place in range(start, min(first, end)) if text[place].isalnum()]
            if letters:
                place, stop = letters[0], letters[-1] + 1
                yield place, stop, kind, _same_name(text[place:stop])
            start = max(start, last)


@functools.lru_cache(maxsize=1024)
def _same_name(said: str) -> str:
    return " ".join(plain(said).text.split()).casefold()
