"""Personal data in texts, replaced by what it was: `<EMAIL_1>`, `<PHONE_1>`, `<CARD_1>` and so on.

The same value has the same placeholder within a text (or within all texts of one call), so that what is said about
it stays readable. Found are e-mail addresses, phone numbers, payment cards, IBANs, national ids (United States,
China), IP addresses, passwords in URLs, and keys and tokens. Numbers count only when their check digits or, for
phones, the numbering plan of a country hold: order numbers, prices and dates stay. Check digits are python-stdnum's,
numbering plans phonenumbers' (Google's libphonenumber).
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import phonenumbers
from stdnum import iban, luhn
from stdnum.cn import ric
from stdnum.us import ssn

# Where a language puts no spaces between words, a letter of it may stand before and behind.
_BEFORE, _BEHIND = r"(?<![0-9A-Za-z_.+-])", r"(?![0-9A-Za-z_-])"
# A number as people write it: digits with single spaces, dots, dashes, slashes or brackets between.
_DIGITS = rf"{_BEFORE}\+?\(?\d(?:[ ().\-/]{{0,2}}\d){{6,22}}{_BEHIND}"
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("URL", r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),
    # With the lengths that RFC 5321, section 4.5.3.1, allows: a run of any length costs no more.
    ("EMAIL", r"(?<![\w.+%'-])[\w.+%'-]{1,64}\s?@\s?(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b"),
    (
        "KEY",
        r"\b(?:whorl_[\w-]{43}|sk-[\w-]{20,}|gh[pousr]_\w{36,}|github_pat_\w{50,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
        r"|AIza[\w-]{35}|hf_\w{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})\b",
    ),
    ("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b"),
    ("IP", r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w.:])"),
    ("ID", rf"{_BEFORE}(?:\d{{17}}[\dXx]|\d{{3}}[- ]\d{{2}}[- ]\d{{4}}){_BEHIND}"),
    ("NUMBER", _DIGITS),
)
_ANY = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS))
# Phones of these countries are known without a country's prefix.
REGIONS = ("US", "GB", "DE", "FR", "CN")
# A text without any of these holds nothing that is looked for.
_WORTH = re.compile(r"[@\d_]|eyJ|://")


@dataclass
class Redaction:
    """The placeholders of texts that belong together."""

    regions: tuple[str, ...] = REGIONS
    """Countries whose phone numbers are known without the prefix of the country (ISO 3166)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Kind → different values that were found."""
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def text(self, text: str) -> str:
        """`text` with placeholders."""
        # Full-width digits and signs are the same characters to a reader; one for one, so that places hold.
        plain = "".join(_plain(c) for c in text) if not text.isascii() else text
        if not _WORTH.search(plain):
            return text
        parts, end = [], 0
        for start, stop, kind, value in _found(plain, self.regions):
            parts += [text[end:start], self._placeholder(kind, value)]
            end = stop
        return "".join([*parts, text[end:]]) if end else text

    def value(self, value: object) -> object:
        """A JSON value with all its strings redacted; keys stay."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        return value

    def _placeholder(self, kind: str, value: str) -> str:
        key = (kind, value)
        if key not in self._known:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self._known[key] = f"<{kind}_{self.counts[kind]}>"
        return self._known[key]


def _plain(character: str) -> str:
    same = unicodedata.normalize("NFKC", character)
    return same if len(same) == 1 else character


def _found(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int, str, str]]:
    """Start, end, kind and the value as it is compared, in order and without overlap."""
    place = 0
    while match := _ANY.search(text, place):
        name, value = str(match.lastgroup), match.group()
        kinds = _NUMBERS if name in ("NUMBER", "ID") else {name: _OTHERS[name]}
        kind = next((kind for kind, holds in kinds.items() if holds(value, regions)), None)
        if kind is None:
            # A number inside may be one, such as a phone behind an order number.
            inside = len(value.split(" ", 1)[0]) if name == "NUMBER" else len(value)
            place = match.start() + inside
            continue
        place = match.end()
        yield match.start(), match.end(), kind, _compared(kind, value)


def _compared(kind: str, value: str) -> str:
    if kind in ("EMAIL", "IP"):
        return re.sub(r"\s", "", value).lower()
    return re.sub(r"[^0-9A-Za-z+]", "", value) if kind not in ("KEY", "URL") else value


def _is_card(value: str, _: tuple[str, ...]) -> bool:
    digits = re.sub(r"\D", "", value)
    # Lengths and first digits of the networks (ISO/IEC 7812): 3 to 6, Mastercard's 2221 to 2720.
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and luhn.is_valid(digits) and "/" not in value


def _is_iban(value: str, _: tuple[str, ...]) -> bool:
    return bool(iban.is_valid(value, check_country=False))


def _is_id(value: str, _: tuple[str, ...]) -> bool:
    if re.fullmatch(r"\d{17}[\dXx]", value):
        return bool(ric.is_valid(value))
    return bool(re.fullmatch(r"\d{3}[- ]\d{2}[- ]\d{4}", value) and ssn.is_valid(value.replace(" ", "-")))


def _is_ip(value: str, _: tuple[str, ...]) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    # `a::b` is an address too, and more often a name in a program.
    named = address.version == 6 and not any(c.isdigit() for c in value)
    return not (named or address.is_unspecified or address.is_loopback)


def _is_phone(value: str, regions: tuple[str, ...]) -> bool:
    digits = re.sub(r"\D", "", value)
    if not 7 <= len(digits) <= 15 or _DATE.match(value):
        return False
    if value.lstrip("(").startswith("+"):
        return _is_valid(value, None)
    grouped = re.search(r"\d[ ().\-/]+\d", value) is not None
    return any(
        _is_written_so(digits, grouped, region, phonenumbers.ndd_prefix_for_region(region, True))
        and _is_valid(value, region)
        for region in regions
    )


_DATE = re.compile(r"\d{4}([-/. ])\d{1,2}\1\d{1,2}(?!\d)|\d{1,2}([-/. ])\d{1,2}\2\d{4}(?!\d)")


def _is_written_so(digits: str, grouped: bool, region: str, prefix: str | None) -> bool:
    """Whether people of a country write a phone number so: bare digits may count anything."""
    if region == "CN" and re.fullmatch(r"1[3-9]\d{9}", digits):
        return True
    if prefix == "1":  # North America leaves it out
        return grouped and len(digits.removeprefix("1")) == 10
    if prefix:
        return digits.startswith(prefix) and (grouped or len(digits) >= 10)
    return grouped


def _is_valid(value: str, region: str | None) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(value, region)))
    except phonenumbers.NumberParseException:
        return False


_Check = Callable[[str, tuple[str, ...]], bool]
_NUMBERS: dict[str, _Check] = {"ID": _is_id, "CARD": _is_card, "PHONE": _is_phone}
_OTHERS: dict[str, _Check] = {
    "EMAIL": lambda value, _: True,
    "URL": lambda value, _: True,
    "KEY": lambda value, _: True,
    "IBAN": _is_iban,
    "IP": _is_ip,
}
