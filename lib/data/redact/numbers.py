"""Personal data that consists of digits: cards, accounts, national ids, phones.

Numbers count only when their check digits or, for phones, the numbering plan of a country hold: order numbers, prices
and dates stay. Check digits are python-stdnum's, numbering plans phonenumbers' (Google's libphonenumber).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import phonenumbers
from stdnum import ean, iban, isbn, luhn
from stdnum.cn import ric
from stdnum.exceptions import ValidationError
from stdnum.us import ssn

# What people, and forms that were filled in, put between digits.
_SIGN = r"[ \t\n().\-/,:|*_~#\\]"
_BEFORE = r"(?<![0-9A-Za-z_])(?<![0-9A-Za-z_][-+])(?<![0-9][.,])"
_RUN = re.compile(
    rf"{_BEFORE}(?:\( ?)?(?:\+ ?)?(?:\( ?)?\d(?:{_SIGN}{{0,4}}\d){{6,}}(?:{_SIGN}{{0,4}}[Xx])?(?![0-9A-Za-z_])"
)
# Begins with a set of characters, for which Python looks quickly.
_MANY = re.compile(rf"\d(?:{_SIGN}{{0,4}}\d){{6}}")
_SOME = re.compile(rf"\d(?:{_SIGN}{{0,3}}\d){{4}}")
_GROUP = re.compile(r"\d+(?:[Xx])?|[Xx]")

# Digits of the longest card, and as many groups.
_MOST = 19
# Issuers' first digits and lengths (ISO/IEC 7812).
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720|220[0-4])\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}(?:\d{2})?|35(?:2[89]|[3-8]\d)\d{12}(?:\d{3})?|62\d{14,17}|(?:5[0678]|6\d|81)\d{14}(?:\d{3})?"
)
# Lengths of a card's groups as it is printed.
_CARD_GROUPS = {
    (4, 4, 4, 4),
    (4, 6, 5),
    (4, 6, 4),
    (4, 4, 4, 4, 3),
    (4, 4, 4, 4, 2),
    (4, 4, 4, 3),
    (4, 4, 4, 2),
    (6, 13),
    (8, 8),
}
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-/. ])\d{1,2}\1\d{1,2}|\d{1,2}([-/. ])\d{1,2}\2(?:19|20)\d\d)(?!\d)"
)
_DECIMAL = re.compile(r"(?:0|[1-9]\d*)\.\d+|\d+\.\d{1,5}")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:([., ])\d{3})(?:\1\d{3})+")
_PHONE_NAMED = re.compile(
    r"(?:(?<![a-z])(?:tel|mobile|cell|fax|call|ring|dial|text me|sms)|phone|whatsapp|handy|telefon|mobil|rufnummer|erreichbar"
    r"|portable|téléphone|appel|joign|móvil|movil|teléfono|telefono|llam|电话|手机|号码|致电|拨打|传真|联系|微信)[^\n\d]{0,24}$",
    re.I,
)
_COUNT_NAMED = re.compile(
    r"(?:order|invoice|tracking|ticket|case|serial|parcel|shipment|reference|(?<![a-z])ref|sku|isbn|ean|imei|article|item|part|transaction"
    r"|bestell\w*|rechnung\w*|sendung\w*|auftrag\w*|artikel\w*|vorgang\w*|commande|facture|colis|référence|suivi"
    r"|pedido|factura|referencia|envío|订单\w*|单号|发票\w*|编号|运单\w*|快递\w*)[^\n\d]{0,12}$",
    re.I,
)
_SSN_NAMED = re.compile(r"(?:(?<![a-z])ssn(?![a-z])|social security|社会安全)[^\n\d]{0,24}$", re.I)
_PROVINCE = re.compile(r"1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_CHINESE_MOBILE = {(11,), (3, 4, 4), (3, 8), (3, 3, 5), (4, 4, 3)}
_AMERICAN = {(3, 3, 4), (1, 3, 3, 4), (3, 7), (1, 3, 7), (6, 4), (1, 10)}
# Where no digit comes before the area's: in threes they would be thousands.
_UNPREFIXED = {(3, 2, 2, 2), (2, 3, 2, 2), (2, 2, 2, 2, 1), (2, 3, 4), (2, 2, 2, 2)}
# Digits from which on a number with a plus is a phone's even where the country's plan, as it was released, lacks it.
_ABROAD = 10
_PHONE_SIGNS = set(" ().-/")
# Characters before a number that may say what it is.
_CONTEXT = 40


@dataclass(frozen=True)
class Run:
    """Digits with signs between, as long as it goes on."""

    text: str
    """Of the whole."""
    start: int
    end: int
    groups: list[tuple[int, int]]
    """Start and end of what stands between two signs."""

    def sign(self, group: int) -> str:
        """What stands before a group, without blanks where it is more than they; empty before the first."""
        if not 0 < group < len(self.groups):
            return ""
        return self.text[self.groups[group - 1][1] : self.groups[group][0]].strip() or " "

    def is_broken(self, first: int, last: int) -> bool:
        """Whether a line ends between some groups."""
        return "\n" in self.text[self.groups[first][0] : self.groups[last][0]]

    def digits(self, first: int, last: int) -> str:
        return "".join(self.text[start:end] for start, end in self.groups[first : last + 1]).upper()

    def lengths(self, first: int, last: int) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.groups[first : last + 1])

    def shape(self, first: int, last: int) -> tuple[int, ...]:
        """The same; of single digits with blanks between, those between other signs together."""
        lengths = self.lengths(first, last)
        if set(lengths) != {1}:
            return lengths
        ends = [group for group in range(first + 1, last + 1) if self.sign(group) != " "] + [last + 1]
        return tuple(end - start for start, end in zip([first, *ends], ends, strict=False))

    def signs(self, first: int, last: int) -> set[str]:
        return {self.sign(group) for group in range(first + 1, last + 1)}

    def before(self) -> str:
        return self.text[max(0, self.start - _CONTEXT) : self.start]


def numbers(
    text: str, kinds: Collection[str], regions: tuple[str, ...]
) -> Iterator[tuple[int, int, str, str]]:
    """Start, end, kind and the value as it is compared, of ids, cards and phones."""
    if not _MANY.search(text):
        return
    for match in _RUN.finditer(text):
        groups = [found.span() for found in _GROUP.finditer(text, match.start(), match.end())]
        yield from _in_run(Run(text, match.start(), match.end(), groups), kinds, regions)


def _in_run(
    run: Run, kinds: Collection[str], regions: tuple[str, ...]
) -> Iterator[tuple[int, int, str, str]]:
    first, count = 0, len(run.groups)
    sizes = [end - start for start, end in run.groups]
    while first < count:
        # Digits that stand alone are looked at from the first of them.
        if first and sizes[first] == sizes[first - 1] == 1:
            first += 1
            continue
        for last in range(min(count, first + _MOST) - 1, first - 1, -1):
            if sum(sizes[first : last + 1]) > _MOST:
                continue
            found = _kind(run, first, last, kinds, regions)
            if found is not None:
                start = run.start if first == 0 else _opening(run, first)
                yield start, run.groups[last][1], *found
                first = last + 1
                break
        else:
            first += 1


def _opening(run: Run, group: int) -> int:
    """Where a group begins, with the bracket or plus before it."""
    start = run.groups[group][0]
    before = re.search(r"[(+ ]*$", run.text[run.groups[group - 1][1] : start])
    return start - len(before.group().lstrip()) if before else start


def _kind(
    run: Run, first: int, last: int, kinds: Collection[str], regions: tuple[str, ...]
) -> tuple[str, str] | None:
    """Kind and value of some groups of a run."""
    size = run.groups[last][1] - run.groups[first][0]
    if size < 7:
        return None
    digits = run.digits(first, last)
    if len(digits) < 7:
        return None
    whole = first == 0 and last == len(run.groups) - 1
    if "X" in digits and not (len(digits) == 18 and digits.index("X") == 17):
        return None
    if "ID" in kinds and _is_id(run, first, last, digits):
        return "ID", digits
    if "X" in digits:
        return None
    if "CARD" in kinds and _is_card(run, first, last, digits, whole):
        return "CARD", digits
    if "PHONE" in kinds and len(digits) <= 15:
        phone = _phone(run, first, last, digits, regions)
        return ("PHONE", phone) if phone else None
    return None


def _stands_alone(run: Run, first: int, last: int) -> bool:
    """Whether some groups are no part of a longer number: what stands around them is another sign, or a blank beside
    groups of another length."""
    inside = run.signs(first, last)
    lengths = set(run.lengths(first, last))
    for group, beside in ((first, first - 1), (last + 1, last + 1)):
        if not 0 < group < len(run.groups):
            continue
        sign = run.sign(group)
        start, end = run.groups[beside]
        if sign in inside and (sign != " " or end - start in lengths):
            return False
        if not inside and sign not in (" ", ",", ":", "/", "|", ")", "("):
            return False
    return True


def _is_card(run: Run, first: int, last: int, digits: str, whole: bool) -> bool:
    if len(digits) < 13 or not _ISSUED.fullmatch(digits):
        return False
    lengths, signs = run.lengths(first, last), run.signs(first, last)
    one = len(lengths) == 1 or set(lengths) == {1}
    even = whole and len(set(lengths[:-1])) == 1 and signs <= {" ", "-", "."}
    if not (one or even or lengths in _CARD_GROUPS):
        return False
    if len(signs) > 1 and set(lengths) != {1} and not signs <= {" ", "-", "."}:
        return False
    if not whole and not _stands_alone(run, first, last):
        return False
    if len(digits) == 13 and ean.is_valid(digits):
        return False
    return bool(luhn.is_valid(digits))


def _is_id(run: Run, first: int, last: int, digits: str) -> bool:
    if len(digits) == 18:
        return _is_chinese_id(digits)
    if len(digits) != 9 or not _stands_alone(run, first, last):
        return False
    lengths, signs = run.lengths(first, last), run.signs(first, last)
    written = f"{digits[:3]}-{digits[3:5]}-{digits[5:]}"
    if lengths == (3, 2, 4):
        return len(signs) == 1 and signs != {","} and bool(ssn.is_valid(written))
    if set(lengths) == {1}:  # 5 3 6 - 9 0 - 4 3 9 9
        wide = [i for i in range(1, 9) if run.sign(first + i) != " "]
        return wide == [3, 5] and bool(ssn.is_valid(written))
    return len(lengths) == 1 and bool(_SSN_NAMED.search(run.before())) and bool(ssn.is_valid(written))


def _is_chinese_id(digits: str) -> bool:
    """Province, birthday and check digit (GB 11643-1999). Not `ric.is_valid`, which asks where the county of birth was
    in that year, and lacks some."""
    try:
        born = ric.get_birth_date(digits)
    except ValidationError:
        return False
    return born.year >= 1900 and bool(_PROVINCE.match(digits)) and ric.calc_check_digit(digits) == digits[-1]


def _phone(run: Run, first: int, last: int, digits: str, regions: tuple[str, ...]) -> str | None:
    """The number in E.164, of groups that are a phone number."""
    opening = _opening(run, first) if first else run.start
    value = run.text[opening : run.groups[last][1]]
    if run.is_broken(first, last):  # goes on in the next line, unless it is whole before
        begun, _, _ = value.partition("\n")
        if "+" not in begun or _valid(begun, None):
            return None
        value = value.replace("\n", " ")
    value = value.replace("\t", " ")
    marks = set(value) - set("0123456789")
    if "+" in marks:
        if value.lstrip("( ").startswith("+") and marks <= _PHONE_SIGNS | set("+_~*|"):
            return _valid(re.sub(r"[_~*|]", " ", value), None, len(digits) >= _ABROAD)
        return None
    named = bool(_PHONE_NAMED.search(run.before()))
    if not marks <= (_PHONE_SIGNS | set("_~*|") if named else _PHONE_SIGNS):
        return None
    grouped = last > first
    if not (_is_apart(run, first, last) or (named and first == 0)) or _DATE.search(value):
        return None
    if not named:
        if _DECIMAL.fullmatch(value) or _THOUSANDS.fullmatch(value):
            return None
        if not grouped and _COUNT_NAMED.search(run.before()):
            return None
        if (len(digits), last - first) in ((10, 3), (13, 4)) and isbn.is_valid(digits):
            return None
    plain = re.sub(r"[_~*|]", " ", value)
    for region in regions:
        if named or _is_written_so(digits, run.shape(first, last), region):
            found = _valid(plain, region, grouped and digits.startswith("00") and len(digits) > _ABROAD)
            if found:
                return found
    return None


def _is_apart(run: Run, first: int, last: int) -> bool:
    """Whether groups hang together more than with what stands around them."""
    ends = [
        group
        for group in (first, last + 1)
        if 0 < group < len(run.groups) and not run.is_broken(group - 1, group)
    ]
    around = {run.sign(group) for group in ends} - {",", ":", "|"}
    return not around or (around == {" "} and " " not in run.signs(first, last))


def _is_written_so(digits: str, lengths: tuple[int, ...], region: str) -> bool:
    """Whether people of a country write a phone number so: bare digits may count anything."""
    grouped = len(lengths) > 1
    if region == "CN" and re.fullmatch(r"1[3-9]\d{9}", digits):
        return lengths in _CHINESE_MOBILE
    if digits.startswith("00") and len(digits) >= 11:
        return True
    prefix = phonenumbers.ndd_prefix_for_region(region, True)
    if prefix == "1":  # North America leaves it out
        return lengths in _AMERICAN
    if prefix:
        if not grouped:  # what is filled up with zeros begins with one, too
            return digits.startswith(prefix) and len(digits) >= 10 and _is_mobile(digits, region)
        # Eight digits with a zero before them are a part's number more often.
        return digits.startswith(prefix) and len(digits) >= 9 and lengths[0] > 1
    return lengths in _UNPREFIXED


def _is_mobile(digits: str, region: str) -> bool:
    kind = phonenumbers.number_type(phonenumbers.parse(digits, region))
    return bool(kind == phonenumbers.PhoneNumberType.MOBILE)


@functools.lru_cache(maxsize=4096)
def _valid(value: str, region: str | None, possible: bool = False) -> str | None:
    """E.164 of a number that is given out, or with `possible` one whose length would do."""
    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None
    holds = phonenumbers.is_possible_number if possible else phonenumbers.is_valid_number
    if not holds(number):
        return None
    return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))


# Country and check digits, whatever stands between; how long it goes on is the country's to say.
_IBAN = re.compile(
    rf"(?<![0-9A-Za-z_])[A-Za-z]{_SIGN}{{0,2}}[A-Za-z]{_SIGN}{{0,3}}\d{_SIGN}{{0,2}}\d(?={_SIGN}{{0,3}}[0-9A-Za-z])"
)
_ALNUM = re.compile(r"[0-9A-Za-z]")


def ibans(text: str) -> Iterator[tuple[int, int, str]]:
    place = 0 if _SOME.search(text) else len(text)
    while match := _IBAN.search(text, place):
        place = match.end()
        size = _iban_length(re.sub(r"[^A-Za-z]", "", match.group()).upper())
        if size is None:
            continue
        found = re.compile(rf"(?:{_SIGN}{{0,3}}[0-9A-Za-z]){{{size - 4}}}(?![0-9A-Za-z_])").match(text, place)
        if found is None:
            continue
        value = "".join(_ALNUM.findall(text[match.start() : found.end()])).upper()
        if iban.is_valid(value, check_country=False):
            yield match.start(), found.end(), value
            place = found.end()


@functools.cache
def _iban_length(country: str) -> int | None:
    """Characters of a country's accounts; None where it has none (ISO 13616)."""
    from stdnum import numdb

    info = numdb.get("iban").info(country)[0][1]
    parts = re.findall(r"(\d+)!?[nac]", info.get("bban", ""))
    return 4 + sum(map(int, parts)) if parts else None
