"""A labelled set of texts with personal data, and of texts without: made from a seed, the same every time.

Values are made by the rules of those who give them out (check digits, numbering plans, lengths), put into forms that
people write or hide them in, and into sentences of five languages. Nothing of lib/data/redact has a part in it.
`HELD_OUT` forms and subjects were put together after the rules that were tuned on the others.
"""

from __future__ import annotations

import base64
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

LANGUAGES = ("en", "de", "fr", "es", "zh")


@dataclass(frozen=True)
class Text:
    """A text, and what of it is personal."""

    text: str
    values: tuple[tuple[int, int, str], ...] = ()
    """Start, end and type of each value."""
    form: str = ""
    """How it is written; of a text without a value, what it speaks of."""
    held_out: bool = False


# --- what sentences say around a value, in each language; none of it is a value

SENTENCES = {
    "en": ("Please note {v} for later.", "It says {v} on the form, I think.", "{v} is what I was given",
           "Hello, as discussed ({v}). Thanks, 3 days left!", "My details: {v}; order 20391 is still open."),
    "de": ("Bitte notieren Sie {v} für später.", "Auf dem Formular steht {v}, glaube ich.", "{v} habe ich bekommen",
           "Guten Tag, wie besprochen ({v}). Danke, noch 3 Tage!", "Meine Angaben: {v}; Bestellung 20391 ist offen."),
    "fr": ("Merci de noter {v} pour plus tard.", "Le formulaire indique {v}, je crois.", "{v} est ce que j'ai reçu",
           "Bonjour, comme convenu ({v}). Merci, plus que 3 jours !", "Mes données : {v} ; la commande 20391 reste ouverte."),
    "es": ("Por favor anote {v} para después.", "En el formulario pone {v}, creo.", "{v} es lo que me dieron",
           "Hola, como hablamos ({v}). ¡Gracias, quedan 3 días!", "Mis datos: {v}; el pedido 20391 sigue abierto."),
    "zh": ("请记下{v}，以后要用。", "表格上写的是{v}。", "{v}是我收到的", "您好，按约定（{v}）。谢谢，还有3天！", "我的资料：{v}；订单20391还没到。"),
}  # fmt: skip
ABOUT = {
    "EMAIL": {"en": "Write to {v} please.", "de": "Schreiben Sie an {v} bitte.", "fr": "Écrivez à {v} svp.",
              "es": "Escriba a {v} por favor.", "zh": "邮箱是{v}，谢谢。"},
    "PHONE": {"en": "Call me at {v} after six.", "de": "Telefon: {v}, ab 18 Uhr.", "fr": "Téléphone : {v}, après 18 h.",
              "es": "Llámame al {v} por la tarde.", "zh": "我的手机是{v}，下班后打。"},
    "CARD": {"en": "Charge my card {v} exp 12/27.", "de": "Karte {v}, gültig bis 12/27.", "fr": "Carte {v}, exp. 12/27.",
             "es": "Tarjeta {v}, caduca 12/27.", "zh": "卡号{v}，有效期12/27。"},
    "IBAN": {"en": "Pay to {v} today.", "de": "Überweisung an {v} bis 30.11.2026.", "fr": "Virement sur {v} demain.",
             "es": "Transferencia a {v} hoy.", "zh": "请汇到{v}。"},
}  # fmt: skip


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words(
    "ada alan grace linus maria jose lukas anna chloe hugo lucia pablo wei lei xiaoming yan sofie karl emma noah"
)
LAST = _words(
    "lovelace turing hopper mueller schmidt dubois leroy garcia lopez wang zhang chen weber meyer brown smith o'neil"
)
UMLAUT = _words("jürgen.müller rené.lefèvre josé.peña björn.weiß")
DOMAINS = _words(
    "example.com mail.example.org firma-beispiel.de post.example.fr correo.example.es qq-example.cn corp.example.com.cn"
    " uni.example.ac.uk startup.example.io sub.mail.example.co.uk museum.example.museum 163-example.com x1.example.net"
)  # fmt: skip


def _digits(random: Random, count: int) -> str:
    return "".join(random.choices(string.digits, k=count))


def _letters(random: Random, count: int, of: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.choices(of, k=count))


def _email(random: Random) -> str:
    first, last = random.choice(FIRST), random.choice(LAST)
    local = random.choice(
        (f"{first}.{last}", f"{first[0]}{last}", f"{first}_{last}{random.randint(1, 99)}", f"{first}+shop", first,
         f"{last}-{first}", random.choice(UMLAUT), f"{random.randint(100000, 99999999)}")
    )  # fmt: skip
    return f"{local}@{random.choice(DOMAINS)}"


# Country, prefix, trunk digit, and makers of numbers without it.
PLANS: dict[str, tuple[str, str, tuple[tuple[str, int], ...]]] = {
    "US": ("1", "", (("212 55", 5), ("415 73", 5), ("305 44", 5), ("617 86", 5), ("206 32", 5))),
    "GB": ("44", "0", (("7400 ", 6), ("7911 ", 6), ("7700 ", 6), ("20 7946 ", 4), ("161 496 ", 4))),
    "DE": ("49", "0", (("151 2", 7), ("170 ", 7), ("176 ", 8), ("30 90", 6), ("89 23", 6), ("40 42", 6))),
    "FR": ("33", "0", (("6 ", 8), ("7 5", 7), ("1 42 ", 6), ("4 91 ", 6))),
    "CN": (
        "86",
        "0",
        (("138 ", 8), ("159 ", 8), ("186 ", 8), ("177 ", 8), ("199 ", 8), ("21 6", 7), ("10 8", 7)),
    ),
    "ES": ("34", "", (("612 ", 6), ("655 ", 6), ("91 4", 6))),
    "IT": ("39", "", (("347 ", 7), ("333 ", 7))),
    "JP": ("81", "", (("90 2", 7), ("80 3", 7))),
    "IN": ("91", "", (("98", 8), ("99", 8))),
    "AU": ("61", "", (("412 ", 6), ("423 ", 6))),
    "NL": ("31", "", (("6 1", 7), ("6 2", 7))),
    "CH": ("41", "", (("79 2", 6), ("78 6", 6))),
    "PL": ("48", "", (("501 ", 6), ("601 ", 6))),
}


def _grouped(random: Random, digits: str, sizes: Sequence[int], sign: str = " ") -> str:
    parts, place = [], 0
    for size in sizes:
        if place >= len(digits):
            break
        parts.append(digits[place : place + size])
        place += size
    if place < len(digits):
        parts[-1] += digits[place:]
    return sign.join(parts)


def _phone(random: Random) -> str:
    country = random.choice([*PLANS, "CN", "CN", "US", "DE"])
    prefix, trunk, makers = PLANS[country]
    begin, count = random.choice(makers)
    # Not 0 or 1, with which no subscriber's number begins.
    rest = random.choice("23456789") + _digits(random, count - 1)
    area, _, head = begin.partition(" ")
    local = head + rest
    national = f"{area}{local}"
    if country == "CN":
        mobile = begin.startswith("1") and len(area) == 3
        if random.random() < 0.5:
            if mobile:
                return random.choice(
                    (national, f"{area} {local[:4]} {local[4:]}", f"{area}-{local[:4]}-{local[4:]}")
                )
            return random.choice((f"0{area}-{local}", f"0{area} {local}", f"(0{area}){local}"))
    elif country == "US" and random.random() < 0.5:
        return random.choice((f"({area}) {local[:3]}-{local[3:]}", f"{area}-{local[:3]}-{local[3:]}",
                              f"{area}.{local[:3]}.{local[3:]}", f"1-{area}-{local[:3]}-{local[3:]}"))  # fmt: skip
    elif trunk and random.random() < 0.4:
        if country == "FR":
            return _grouped(random, trunk + national, (2, 2, 2, 2, 2), random.choice((" ", ".", "-")))
        return random.choice(
            (f"0{area} {local}", f"0{area}/{local}", f"(0{area}) {local}", f"0{area}-{local}")
        )
    middle = len(local) // 2
    return random.choice(
        (f"+{prefix} {area} {local}", f"+{prefix}{national}", f"+{prefix}-{area}-{local}",
         f"+{prefix} {area} {local[:middle]} {local[middle:]}", f"(+{prefix}) {area} {local}",
         f"+{prefix} ({trunk or ''}{area}) {local}" if not trunk else f"+{prefix} (0){area} {local}",
         f"00{prefix} {area} {local}" if country != "US" else f"+{prefix} {area} {local[:3]} {local[3:]}")
    )  # fmt: skip


def luhn_digit(digits: str) -> str:
    """The check digit behind `digits` (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


ISSUERS = (("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("2720", 16), ("34", 15), ("37", 15), ("6011", 16), ("65", 16),
           ("3528", 16), ("3589", 16), ("62", 16), ("62", 19), ("36", 14), ("305", 14), ("5018", 16), ("6759", 16))  # fmt: skip


def _card(random: Random) -> str:
    begin, size = random.choice(ISSUERS)
    digits = begin + _digits(random, size - len(begin) - 1)
    digits += luhn_digit(digits)
    sizes = {15: (4, 6, 5), 14: (4, 6, 4), 19: (4, 4, 4, 4, 3)}.get(size, (4, 4, 4, 4))
    return random.choice((digits, _grouped(random, digits, sizes), _grouped(random, digits, sizes, "-")))


# n: digits, a: capitals, c: either (the SWIFT registry of IBANs).
BANKS = {"DE": "18n", "FR": "10n11c2n", "ES": "20n", "GB": "4a14n", "NL": "4a10n", "IT": "1a10n12c", "CH": "5n12c", "AT": "16n",
         "PL": "24n", "BE": "12n", "SE": "20n", "PT": "21n", "IE": "4a14n", "DK": "14n", "NO": "11n", "FI": "14n",
         "LU": "3n13c", "CZ": "20n", "GR": "7n16c", "TR": "6n16c"}  # fmt: skip


def _iban(random: Random) -> str:
    country = random.choice(list(BANKS))
    account, number = "", ""
    for sign in BANKS[country]:
        if sign.isdigit():
            number += sign
            continue
        of = {
            "n": string.digits,
            "a": string.ascii_uppercase,
            "c": string.digits * 3 + string.ascii_uppercase,
        }[sign]
        account += _letters(random, int(number), of)
        number = ""
    if country == "TR":
        account = account[:5] + "0" + account[6:]
    whole = account + country + "00"
    remainder = int("".join(str(int(c, 36)) for c in whole)) % 97
    value = f"{country}{98 - remainder:02d}{account}"
    return random.choice((value, _grouped(random, value, (4,) * 9)))


def _ssn(random: Random) -> str:
    area = random.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{random.randint(1, 99):02d}-{random.randint(1, 9999):04d}"


REGIONS = _words(
    "110105 310104 440106 510104 330106 420106 320102 610102 350203 210102 370202 430102 500103 120101 410105"
)


def _chinese_id(random: Random) -> str:
    born = f"{random.randint(1940, 2010)}{random.randint(1, 12):02d}{random.randint(1, 28):02d}"
    digits = random.choice(REGIONS) + born + _digits(random, 3)
    # GB 11643-1999: ISO 7064, MOD 11-2
    weights = [2 ** (17 - place) % 11 for place in range(17)]
    rest = sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True)) % 11
    return digits + "10X98765432"[rest]


def _ip(random: Random) -> str:
    if random.random() < 0.6:
        first = random.choice([n for n in range(1, 224) if n != 127])
        return ".".join(
            str(n) for n in (first, *(random.randint(0, 255) for _ in range(2)), random.randint(1, 254))
        )
    groups = [f"{random.randint(0, 0xFFFF):x}" for _ in range(8)]
    return random.choice(
        (":".join(["2001", "db8", *groups[2:]]), f"2001:db8::{groups[0]}", f"fe80::{groups[0]}:{groups[1]}",
         f"2a00:{groups[1]}:{groups[2]}::1", ":".join(g.zfill(4) for g in ["2001", "db8", *groups[2:]]).upper())
    )  # fmt: skip


def _mac(random: Random) -> str:
    pairs = [f"{random.randint(0, 255):02x}" for _ in range(6)]
    pairs[random.randrange(6)] = random.choice(("a4", "3c", "f0", "be", "d9"))
    sign = random.choice(":-")
    value = (
        sign.join(pairs) if random.random() < 0.8 else ".".join("".join(pairs[i : i + 2]) for i in (0, 2, 4))
    )
    return value.upper() if random.random() < 0.4 else value


def _url(random: Random) -> tuple[str, str, str]:
    scheme = random.choice(
        ("https", "http", "postgres", "postgresql+psycopg", "redis", "amqp", "ftp", "mysql", "mongodb+srv")
    )
    user = random.choice((random.choice(FIRST), "admin", "svc-app", "root", "user%40corp"))
    word = random.choice(
        (
            "hunter2",
            _letters(random, 12),
            f"{_letters(random, 6)}!{_digits(random, 3)}",
            "p%40ss%2Fword",
            "s3cr3t$x",
        )
    )
    host = random.choice(
        ("db.internal:5432/app", "example.com/a/b?x=1", "cache:6379/0", "10-0-0-5.host/x", "mq.example.org")
    )
    return f"{scheme}://", f"{user}:{word}", f"@{host}"


HEX = "0123456789abcdef"
UPPER = string.ascii_uppercase + string.digits
URLSAFE = string.ascii_letters + string.digits + "-_"
ISSUED: dict[str, Callable[[Random], str]] = {
    "openai": lambda r: "sk-" + _letters(r, 48),
    "openai project": lambda r: "sk-proj-" + _letters(r, 64, URLSAFE[:-2]),
    "github": lambda r: f"gh{r.choice('pousr')}_" + _letters(r, 36),
    "gitlab": lambda r: "glpat-" + _letters(r, 20),
    "slack": lambda r: f"xoxb-{_digits(r, 12)}-{_digits(r, 13)}-{_letters(r, 24)}",
    "stripe": lambda r: f"{r.choice(('sk', 'rk'))}_live_" + _letters(r, 24),
    "aws": lambda r: r.choice(("AKIA", "ASIA")) + _letters(r, 16, UPPER),
    "google": lambda r: "AIza" + _letters(r, 35),
    "npm": lambda r: "npm_" + _letters(r, 36),
    "pypi": lambda r: "pypi-AgEIcHlwaS5vcmc" + _letters(r, 60),
    "hugging face": lambda r: "hf_" + _letters(r, 34),
    "sendgrid": lambda r: f"SG.{_letters(r, 22)}.{_letters(r, 43)}",
    "jwt": lambda r: ".".join(
        base64.urlsafe_b64encode(part.encode()).decode().rstrip("=")
        for part in (
            '{"alg":"HS256","typ":"JWT"}',
            f'{{"sub":"{_digits(r, 8)}","name":"x"}}',
            _letters(r, 24),
        )
    ),
    "github fine": lambda r: f"github_pat_{_letters(r, 22)}_{_letters(r, 59)}",
    "shopify": lambda r: "shpat_" + _letters(r, 32, HEX),
    "digitalocean": lambda r: "dop_v1_" + _letters(r, 64, HEX),
    "telegram": lambda r: f"{_digits(r, 10)}:AA{_letters(r, 33)}",
    "databricks": lambda r: "dapi" + _letters(r, 32, HEX),
    "vault": lambda r: "hvs." + _letters(r, 24),
}
ISSUED_HELD_OUT: dict[str, Callable[[Random], str]] = {
    "mailgun": lambda r: "key-" + _letters(r, 32, HEX),
    "twilio": lambda r: "SK" + _letters(r, 32, HEX),
    "notion": lambda r: "ntn_" + _letters(r, 46),
    "linear": lambda r: "lin_api_" + _letters(r, 40),
    "atlassian": lambda r: "ATATT3xFfGF0" + _letters(r, 170),
    "grafana": lambda r: f"glsa_{_letters(r, 32)}_{_letters(r, 8, HEX)}",
    "discord": lambda r: f"M{_letters(r, 23)}.{_letters(r, 6)}.{_letters(r, 38)}",
    "anthropic": lambda r: "sk-ant-api03-" + _letters(r, 93, URLSAFE[:-2]),
}
ASSIGNED: tuple[Callable[[Random], tuple[str, str, str]], ...] = (
    lambda r: ("password=", _letters(r, 10), ""),
    lambda r: ("DB_PASSWORD: ", _letters(r, 9) + "7!", ""),
    lambda r: ('"api_key": "', _letters(r, 24), '"'),
    lambda r: ("export SECRET_TOKEN='", _letters(r, 20), "'"),
    lambda r: ("Authorization: Bearer ", _letters(r, 32) + "9", ""),
    lambda r: ("aws_secret_access_key = ", "aB3" + _letters(r, 37), ""),
    lambda r: ("my password is ", _letters(r, 6) + "9x", ""),
    lambda r: ("Passwort: ", _letters(r, 7) + "4z", ""),
    lambda r: ("密码：", _letters(r, 7) + "4z", ""),
    lambda r: (
        "",
        f"-----BEGIN RSA PRIVATE KEY-----\n{_letters(r, 64)}\n{_letters(r, 40)}\n-----END RSA PRIVATE KEY-----",
        "",
    ),
    lambda r: ("mot de passe : ", _letters(r, 7) + "4z", ""),
    lambda r: ("la contraseña es ", _letters(r, 7) + "4z", ""),
    lambda r: ("client_secret=", _letters(r, 30), "&grant_type=x"),
    lambda r: ("Kennwort lautet ", _letters(r, 7) + "4z", ""),
    lambda r: (
        "-H 'Authorization: Basic ",
        base64.b64encode(f"ada:{_letters(r, 12)}".encode()).decode(),
        "'",
    ),
    lambda r: (
        "",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{_letters(r, 70)}\n-----END OPENSSH PRIVATE KEY-----",
        "",
    ),
    lambda r: ('os.environ["API_TOKEN"] = "', _letters(r, 20), '"'),
)
# fmt: off
ASSIGNED_HELD_OUT: tuple[Callable[[Random], tuple[str, str, str]], ...] = (
    lambda r: ("PGPASSWORD=", _letters(r, 12), " psql"),
    lambda r: ("mysql --password ", _letters(r, 8) + "4Z", " -h db"),
    lambda r: ("<password>", _letters(r, 10) + "1", "</password>"),
    lambda r: ("密钥是", _letters(r, 12) + "8", ""),
    lambda r: ("secret_key: ", _letters(r, 24) + "5", ""),
    lambda r: ('{"refresh_token":"', _letters(r, 40), '"}'),
    lambda r: ("x-api-key: ", _letters(r, 32) + "3", ""),
    lambda r: ("", "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n" + _letters(r, 64) + "\n-----END PGP PRIVATE KEY BLOCK-----", ""),
)
# fmt: on


def _key(random: Random, held_out: bool) -> tuple[str, str, str]:
    if random.random() < 0.5:
        return "", random.choice(list((ISSUED_HELD_OUT if held_out else ISSUED).values()))(random), ""
    return random.choice(ASSIGNED_HELD_OUT if held_out else ASSIGNED)(random)


# --- forms in which a value is written, or hidden

Form = Callable[[Random, str], str]


def _in_digits(zero: int) -> Form:
    return lambda random, value: "".join(chr(zero + int(c)) if c in string.digits else c for c in value)


def _full_width(random: Random, value: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in value)


def _with(sign: str, count: int = 2) -> Form:
    def write(random: Random, value: str) -> str:
        for _ in range(count):
            place = random.randrange(1, len(value))
            value = value[:place] + sign + value[place:]
        return value

    return write


def _signs(sign: str) -> Form:
    """What stands between groups, another one; groups of four where there are none."""

    def write(random: Random, value: str) -> str:
        if not set(value) & set(" -"):
            value = _grouped(random, value, (4,) * 12)
        return "".join(sign if c in " -" else c for c in value)

    return write


def _spaced(random: Random, value: str) -> str:
    return " ".join(c for c in value if c != " ")


def _at(at: str, dot: str | None = None) -> Form:
    def write(random: Random, value: str) -> str:
        # With letters that are spelled in ASCII, as who spells out the sign does.
        local, _, domain = value.partition("@")
        local = local if local.isascii() else "jo"
        return local + at + (domain if dot is None else domain.replace(".", dot))

    return write


def _as_is(random: Random, value: str) -> str:
    return value


ZERO_WIDTH, SOFT_HYPHEN, WORD_JOINER = "\u200b", "\xad", "\u2060"
# fmt: off
_NUMBER_FORMS: dict[str, Form] = {
    "full width": _full_width, "zero width": _with(ZERO_WIDTH), "no-break spaces": _signs("\xa0"), "dashes": _signs("–"),
    "middle dots": _signs("·"), "Arabic-Indic digits": _in_digits(0x660), "spaced digits": _spaced,
    "thin spaces": _signs("\u2009"), "non-breaking hyphens": _signs("\u2011"), "minus signs": _signs("\u2212"),
    "Devanagari digits": _in_digits(0x966), "bold digits": _in_digits(0x1D7CE), "soft hyphens": _with(SOFT_HYPHEN),
    "word joiners": _with(WORD_JOINER, 3), "ideographic spaces": _signs("\u3000"), "double spaces": _signs("  "),
}
_NUMBER_HELD_OUT: dict[str, Form] = {
    "Persian digits": _in_digits(0x6F0), "Bengali digits": _in_digits(0x9E6), "double-struck digits": _in_digits(0x1D7D8),
    "narrow spaces": _signs("\u202f"), "figure dashes": _signs("\u2012"), "bullets": _signs("•"), "spaced dashes": _signs(" – "),
    "joiners": _with("\u200d", 3), "byte order marks": _with("\ufeff"), "direction marks": _with("\u200e", 3), "tabs": _signs("\t"),
    "hyphen bullets": _signs("\u2043"), "line breaks": lambda r, v: v.replace(" ", "\n", 1),
}
FORMS: dict[str, dict[str, Form]] = {
    "EMAIL": {
        "capitals": lambda r, v: v.upper(), "full width": _full_width, "zero width": _with(ZERO_WIDTH), "spaces": _at(" @ "),
        "(at)": _at("(at)"), "[at] [dot]": _at(" [at] ", " [dot] "), "&#64;": _at("&#64;"), "mailto": lambda r, v: f"mailto:{v}",
        "in brackets": lambda r, v: f"<{v}>", "quoted": lambda r, v: f"'{v}'",
        "{at} (dot)": _at("{at}", "(dot)"), "AT DOT": _at(" AT ", " DOT "), "spaced letters": lambda r, v: _spaced(r, "ada.b@example.com"),
        "soft hyphens": _with(SOFT_HYPHEN), "small @": _at("﹫"), "(arroba) (punto)": _at(" (arroba) ", " (punto) "), "&#x40;": _at("&#x40;"),
        "[.]": _at("@", "[.]"), "word joiners": _with(WORD_JOINER, 3), "in a query": lambda r, v: f"?email={v}&x=1",
    },
    "PHONE": _NUMBER_FORMS,
    "CARD": {**_NUMBER_FORMS, "dots": _signs("."), "stars": _signs("*"), "underscores": _signs("_"), "slashes": _signs("/"),
             "pairs": lambda r, v: _grouped(r, "".join(filter(str.isdigit, v)), (2,) * 10)},
    "IBAN": {"small": lambda r, v: v.lower(), "zero width": _with(ZERO_WIDTH), "no-break spaces": _signs("\xa0"),
             "dashes": _signs("-"), "dots": _signs("."), "full width": _full_width, "spaced": _spaced, "underscores": _signs("_"),
             "non-breaking hyphens": _signs("\u2011"), "soft hyphens": _with(SOFT_HYPHEN), "slashes": _signs("/")},
    "ID US": {"spaces": _signs(" "), "dashes": _signs("–"), "full width": _full_width, "zero width": _with(ZERO_WIDTH),
              "dots": _signs("."), "minus signs": _signs("\u2212"), "spaced digits": _spaced, "bold digits": _in_digits(0x1D7CE)},
    "ID CN": {"groups": lambda r, v: f"{v[:6]} {v[6:14]} {v[14:]}", "full width": _full_width, "zero width": _with(ZERO_WIDTH),
              "small": lambda r, v: v.lower(), "dashes": lambda r, v: f"{v[:6]}-{v[6:14]}-{v[14:]}", "spaced digits": _spaced,
              "middle dots": lambda r, v: f"{v[:6]}·{v[6:14]}·{v[14:]}", "Thai digits": _in_digits(0xE50),
              "in fours": lambda r, v: _grouped(r, v, (4, 4, 4, 4, 2))},
    "IP": {"with a port": lambda r, v: f"{v}:8080" if "." in v else f"[{v}]:443", "full width": _full_width, "zero width": _with(ZERO_WIDTH),
           "in a URL": lambda r, v: f"http://{v}/" if "." in v else f"http://[{v}]/", "[.]": lambda r, v: v.replace(".", "[.]"),
           "CIDR": lambda r, v: f"{v}/24", "bold digits": _in_digits(0x1D7CE)},
    "MAC": {"full width": _full_width, "zero width": _with(ZERO_WIDTH), "dashes": lambda r, v: v.replace("-", "–"),
            "bare": lambda r, v: "MAC " + "".join(c for c in v if c not in ":-.")},
    "URL": {"no user": lambda r, v: ":" + v.partition(":")[2], "at sign": lambda r, v: v + "@x", "colons": lambda r, v: v + ":y:z"},
    "KEY": {},
}
HELD_OUT: dict[str, dict[str, Form]] = {
    "EMAIL": {
        "full-width @": _at("＠"), "<at> <dot>": _at(" <at> ", " <dot> "), "(ät) (punkt)": _at("(ät)", "(punkt)"), "&commat;": _at("&commat;"),
        "%40": _at("%40"), "a blank before": _at(" @"), "a blank behind": _at("@ "), "in a link": lambda r, v: f"[x](mailto:{v})",
        "joiners": _with("\u200d", 3), "direction marks": _with("\u200e"), "byte order marks": _with("\ufeff"), "AT": _at("[AT]"),
        "dots spelled": _at("@", " dot "), "bold": lambda r, v: f"**{v}**", "underlined": lambda r, v: f"_{v}_",
    },
    "PHONE": _NUMBER_HELD_OUT,
    "CARD": {**_NUMBER_HELD_OUT, "commas": _signs(","), "colons": _signs(":"), "bars": _signs(" | "), "in threes": lambda r, v: _grouped(r, "".join(filter(str.isdigit, v)), (3,) * 7)},
    "IBAN": {"small, in fours": lambda r, v: _signs(" ")(r, v.lower()), "narrow spaces": _signs("\u202f"), "joiners": _with("\u200d", 3), "commas": _signs(", "),
             "bullets": _signs("•"), "in twos": lambda r, v: _grouped(r, v.replace(" ", ""), (2,) * 20), "line breaks": lambda r, v: v.replace(" ", "\n", 1)},
    "ID US": {"spaced dashes": _signs(" - "), "underscores": _signs("_"), "slashes": _signs("/"), "Bengali digits": _in_digits(0x9E6), "joiners": _with("\u200d"),
              "bare": lambda r, v: "SSN " + v.replace("-", "")},
    "ID CN": {"slashes": lambda r, v: f"{v[:6]}/{v[6:14]}/{v[14:]}", "in threes": lambda r, v: _grouped(r, v, (3,) * 6), "Persian digits": _in_digits(0x6F0),
              "joiners": _with("\u200d", 3), "full stops": lambda r, v: f"{v[:6]}.{v[6:10]}.{v[10:12]}.{v[12:14]}.{v[14:]}"},
    "IP": {"zeros": lambda r, v: ".".join(n.zfill(3) for n in v.split(".")) if "." in v else v.zfill(4), "(dot)": lambda r, v: v.replace(".", "(dot)"),
           "mapped": lambda r, v: f"::ffff:{v}" if "." in v else v, "joiners": _with("\u200d"), "spaced dots": lambda r, v: v.replace(".", " . ")},
    "MAC": {"blanks": lambda r, v: "MAC " + " ".join(v.replace(".", ":").replace("-", ":").split(":")), "joiners": _with("\u200d"), "non-breaking hyphens": lambda r, v: v.replace("-", "\u2011"),
            "double-struck digits": _in_digits(0x1D7D8)},
    "URL": {"capitals": lambda r, v: v.upper(), "signs": lambda r, v: v + "#?!", "zero width": _with(ZERO_WIDTH)},
    "KEY": {},
}
# fmt: on
MAKERS: dict[str, Callable[[Random], str]] = {
    "EMAIL": _email,
    "PHONE": _phone,
    "CARD": _card,
    "IBAN": _iban,
    "ID US": _ssn,
    "ID CN": _chinese_id,
    "IP": _ip,
    "MAC": _mac,
}  # fmt: skip
TYPES = (*MAKERS, "URL", "KEY")


# What can be done to what is written in some form already.
SECOND: dict[str, Form] = {
    "full width": _full_width,
    "zero width": _with(ZERO_WIDTH),
    "soft hyphens": _with(SOFT_HYPHEN),
    "joiners": _with("\u200d", 4),
}


def positives(seed: int, count: int = 500, held_out: bool = False, twice: bool = False) -> Iterator[Text]:
    """`count` texts of each type; a third of the values are written plainly. With `held_out` only forms of HELD_OUT;
    with `twice` one of any form and one of SECOND at once."""
    for kind in TYPES:
        random = Random(f"{seed} {kind} {held_out}" + " twice" * twice)
        forms = FORMS[kind] | HELD_OUT[kind] if twice else (HELD_OUT if held_out else FORMS)[kind]
        for number in range(count):
            language = LANGUAGES[number % len(LANGUAGES)]
            plainly = not forms or (random.random() < 1 / 3 and not twice)
            name, form = ("plain", _as_is) if plainly else random.choice(list(forms.items()))
            before, behind = "", ""
            if kind == "KEY":
                before, value, behind = _key(random, held_out)
                name = "issued" if not before + behind else before.strip()
            elif kind == "URL":
                before, value, behind = _url(random)
                value = form(random, value)
            else:
                before, value, behind = _split(form(random, MAKERS[kind](random)))
            if twice:
                then, second = random.choice(list(SECOND.items()))
                name, value = f"{name}, {then}", second(random, value)
            sentences = [*SENTENCES[language]]
            if kind in ABOUT:
                sentences += [ABOUT[kind][language]] * 4
            sentence = random.choice(sentences)
            start = sentence.index("{v}") + len(before)
            text = sentence.replace("{v}", before + value + behind)
            yield Text(text, ((start, start + len(value), kind),), name, held_out)


def _split(written: str) -> tuple[str, str, str]:
    """What stands before the value, the value, and what stands behind it."""
    before, behind = "", ""
    for mark in ("mailto:", "[x](mailto:", "?email=", "http://", "MAC ", "SSN ", "<", "'", "[", "**", "_"):
        if written.startswith(mark):
            before, written = before + mark, written[len(mark) :]
    for mark in ("&x=1", ":8080", ":443", "/24", "/", ">", "'", "]", "**", "_", ")"):
        if written.endswith(mark):
            behind, written = mark + behind, written[: -len(mark)]
    return before, written, behind


# --- texts without personal data


def _isbn(random: Random) -> str:
    digits = "978" + _digits(random, 9)
    check = -sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10
    whole = f"{digits}{check}"
    return random.choice((whole, f"{whole[:3]}-{whole[3]}-{whole[4:8]}-{whole[8:12]}-{whole[12]}"))


def _isbn_10(random: Random) -> str:
    digits = random.choice("0123") + _digits(random, 8)
    check = sum(int(d) * (i + 1) for i, d in enumerate(digits)) % 11
    return f"{digits[0]}-{digits[1:5]}-{digits[5:]}-{'X' if check == 10 else check}"


def _ean(random: Random) -> str:
    digits = random.choice(("40", "50", "30", "84", "69")) + _digits(random, 10)
    return digits + str(-sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10)


def _date(random: Random) -> str:
    y, m, d = random.randint(1950, 2030), random.randint(1, 12), random.randint(1, 28)
    H, M, S = random.randint(0, 23), random.randint(0, 59), random.randint(0, 59)  # noqa: N806
    return random.choice(
        (f"{y}-{m:02d}-{d:02d}", f"{d:02d}.{m:02d}.{y}", f"{d}/{m}/{y}", f"{y}/{m:02d}/{d:02d}", f"{y}年{m}月{d}日",
         f"{y}-{m:02d}-{d:02d} {H:02d}:{M:02d}:{S:02d}", f"{y}-{m:02d}-{d:02d}T{H:02d}:{M:02d}:{S:02d}Z",
         f"{y}{m:02d}{d:02d}", f"{d:02d}-{m:02d}-{y} {H:02d}.{M:02d}", f"{m}/{d}/{y % 100:02d}", f"{y}.{m:02d}.{d:02d}-{y}.12.31")
    )  # fmt: skip


def _price(random: Random) -> str:
    whole, cents = random.randint(1, 9_999_999), random.randint(0, 99)
    english = f"{whole:,}.{cents:02d}"
    german = english.replace(",", "_").replace(".", ",").replace("_", ".")
    return random.choice(
        (f"${english}", f"{german} €", f"{whole} EUR", f"¥{whole:,}", f"£{english}", f"{whole:,}".replace(",", " ") + " €",
         f"CHF {whole:,}".replace(",", "'"), f"{whole}元", f"{german} EUR zzgl. 19 % MwSt.")
    )  # fmt: skip


def _order(random: Random) -> str:
    year, tail = random.randint(2019, 2026), _digits(random, 6)
    return random.choice(
        (_digits(random, random.randint(5, 10)), f"#{_digits(random, 8)}", f"ORD-{year}-{tail}", f"A{_digits(random, 9)}",
         f"{_digits(random, 4)}-{_digits(random, 4)}", f"{year}/{tail}", f"PO{_digits(random, 10)}", f"{_digits(random, 3)}-{_digits(random, 7)}-{_digits(random, 7)}",
         f"SO-{_digits(random, 5)}-{_letters(random, 2, string.ascii_uppercase)}", _digits(random, 12))
    )  # fmt: skip


def _tracking(random: Random) -> str:
    return random.choice(
        ("1Z" + _letters(random, 16, UPPER), "JJD0" + _digits(random, 15), "94" + _digits(random, 20), _digits(random, 12),
         f"RR{_digits(random, 9)}DE", f"SF{_digits(random, 13)}", "9400 1" + " ".join((_digits(random, 3), *(_digits(random, 4) for _ in range(4)))))
    )  # fmt: skip


def _product(random: Random) -> str:
    return random.choice(
        (f"{_letters(random, 3, string.ascii_uppercase)}-{_digits(random, 5)}", f"SM-{_letters(random, 6, UPPER)}", f"{_digits(random, 3)}.{_digits(random, 3)}.{_digits(random, 2)}",
         f"No. {_digits(random, 7)}", f"B0{_letters(random, 8, UPPER)}", f"{_digits(random, 2)}-{_digits(random, 4)}-{_digits(random, 2)}", f"DIN EN ISO {_digits(random, 4)}-{random.randint(1, 9)}:{random.randint(1990, 2026)}")
    )  # fmt: skip


def _version(random: Random) -> str:
    a, b, c, d = (random.randint(0, 30) for _ in range(4))
    return random.choice(
        (f"v{a}.{b}.{c}", f"{a}.{b}.{c}", f"version {a}.{b}.{c}.{d}", f"{a}.{b}.{c}-rc.{d}", f"{a}.{b}.0+build.{_digits(random, 6)}",
         f"Chrome/{100 + a}.0.{_digits(random, 4)}.{100 + b}", f"Python 3.{a}.{b}", f"build {a}.{b}.{_digits(random, 5)}", f"package@{a}.{b}.{c}")
    )  # fmt: skip


def _place(random: Random) -> str:
    lat, lon = random.uniform(-90, 90), random.uniform(-180, 180)
    return random.choice(
        (
            f"{lat:.6f}, {lon:.6f}",
            f"{lat:.4f},{lon:.4f}",
            f"({lat:.5f} {lon:.5f})",
            f"{abs(lat):.4f}° N, {abs(lon):.4f}° E",
            "48°51′29.6″N 2°17′40.2″E",
        )
    )


def _hash(random: Random) -> str:
    return random.choice(
        (_letters(random, 40, HEX), _letters(random, 7, HEX), _letters(random, 32, HEX), _letters(random, 64, HEX),
         str(uuid.UUID(int=random.getrandbits(128), version=4)), f"sha256:{_letters(random, 64, HEX)}", f"#{_letters(random, 6, HEX)}", f"0x{_letters(random, 8, HEX)}")
    )  # fmt: skip


def _statistic(random: Random) -> str:
    return random.choice(
        (f"{random.randint(1, 99_999_999):,} people", f"{random.random():.4f} ± {random.random():.3f}", f"{random.randint(1, 99)}.{random.randint(0, 9)}%",
         f"p = {random.random():.6f}", " ".join(str(random.randint(1, 999)) for _ in range(random.randint(3, 9))), f"{random.uniform(1, 9):.3f}e-{random.randint(2, 12)}",
         "3.14159265358979", f"1 : {random.randint(1000, 9_999_999)}", ", ".join(f"{random.random():.3f}" for _ in range(5)), f"{random.randint(1_000_000, 99_999_999)} rows",
         f"{random.randint(1, 80)}.{random.randint(100, 999)}.{random.randint(100, 999)} Einwohner")
    )  # fmt: skip


def _time(random: Random) -> str:
    H, M, S = random.randint(0, 23), random.randint(0, 59), random.randint(0, 59)  # noqa: N806
    return random.choice((f"{H:02d}:{M:02d}", f"{H:02d}:{M:02d}:{S:02d}", f"{H}h{M:02d}", f"{H:02d}.{M:02d} Uhr", f"{H:02d}:{M:02d}:{S:02d}.{_digits(random, 3)}",
                          f"{H:02d}:{M:02d}-{(H + 1) % 24:02d}:{M:02d}", f"16{_digits(random, 8)}", f"{H}点{M}分"))  # fmt: skip


def _score(random: Random) -> str:
    a, b = random.randint(0, 30), random.randint(0, 30)
    return random.choice((f"{a}:{b}", f"{a}-{b}", f"6-4, 3-6, 7-6 ({a}-{b})", f"{a}/{b + 30}", f"{random.uniform(0, 5):.1f}/5", f"{a}×{b} cm", f"{a}-{a + b} years",
                          f"{random.randint(28, 48)}-{random.randint(20, 40)}-{random.randint(30, 48)}", f"5'{a % 12}\", 1{_digits(random, 2)} lbs"))  # fmt: skip


def _code(random: Random) -> str:
    return random.choice(
        ("std::vector<int>", "a::b::c", "@property def x(self)", "icon@2x.png", "user.name@", "follow @ada_l on it", "5 @ 3.50 each", "http://localhost:8080/x?id=12345678",
         "https://example.com/p/1234567-blue?sku=998877", "127.0.0.1", "foo[at]", "see p. 12-14, 19 (at home)", "max_tokens: 4096", "token = tokenizer.encode(text)",
         "password: please reset it", "the secret is out", "key: value", "password = getpass()", "arr[0:10:2]", "--rows 230000 1000000", "room 12.04.118", "§ 12.3.4.1", "SELECT * FROM t WHERE id = 20391555",
         "token: required", "secret_santa=true", "C4:D5 in the score", "BV1xx411c7mD", "the API key is stored in the vault")
    )  # fmt: skip


NEGATIVES: dict[str, Callable[[Random], str]] = {
    "order numbers": _order, "prices": _price, "dates": _date, "versions": _version, "product codes": _product, "ISBN": _isbn,
    "ISBN-10": _isbn_10, "EAN": _ean, "tracking numbers": _tracking, "coordinates": _place, "statistics": _statistic, "times": _time,
    "hashes": _hash, "scores": _score, "code": _code,
}  # fmt: skip
# fmt: off
NEGATIVES_HELD_OUT: dict[str, Callable[[Random], str]] = {
    "publications": lambda r: r.choice((f"doi:10.{_digits(r, 4)}/j.x.{r.randint(1990, 2026)}.{_digits(r, 5)}", f"arXiv:{_digits(r, 4)}.{_digits(r, 5)}", f"ISSN {_digits(r, 4)}-{_digits(r, 4)}", f"US {r.randint(1, 11)},{_digits(r, 3)},{_digits(r, 3)} B2", f"pp. {r.randint(1, 500)}-{r.randint(501, 900)}")),
    "laws and courts": lambda r: r.choice((f"2 BvR {_digits(r, 4)}/{_digits(r, 2)}", f"Art. {r.randint(1, 99)} Abs. {r.randint(1, 9)} DSGVO", f"C-{_digits(r, 3)}/{_digits(r, 2)}", f"§ {r.randint(1, 999)} BGB", f"Directive 2016/{_digits(r, 3)}/EU")),
    "licences": lambda r: r.choice(("-".join(_letters(r, 5, UPPER) for _ in range(5)), f"B-{_letters(r, 2, string.ascii_uppercase)} {_digits(r, 4)}", f"LH{_digits(r, 3)} / UA{_digits(r, 4)}", f"Boeing 737-{_digits(r, 3)}")),
    "chemistry and medicine": lambda r: r.choice((f"CAS {_digits(r, 4)}-{_digits(r, 2)}-{_digits(r, 1)}", "C8H10N4O2", f"ICD-10 F{_digits(r, 2)}.{_digits(r, 1)}", f"{r.randint(90, 180)}/{r.randint(50, 110)} mmHg", f"PZN {_digits(r, 8)}")),
    "banking": lambda r: r.choice(("COBADEFFXXX", f"-{r.randint(1, 9999)},{_digits(r, 2)} EUR (Saldo)", f"USt-IdNr. DE{_digits(r, 9)}", f"CIK {_digits(r, 10)}", f"Rg.-Nr. {r.randint(2019, 2026)}-{_digits(r, 5)}")),
    "measures": lambda r: r.choice((f"{r.randint(1, 99)} x {r.randint(1, 99)} x {r.randint(1, 99)} mm", f"{r.uniform(0, 1e6):.3f} kWh", f"1:{r.randint(10, 99)}.000", f"{r.randint(1000, 99999)}K @ 60fps", f"+{r.randint(1, 40)} °C", f"Ra 0.{_digits(r, 7)}")),
    "logs": lambda r: r.choice((f"[{r.randint(1e9, 2e9):.0f}.{_digits(r, 6)}] eth0: link up", f"pid={_digits(r, 5)} rss={_digits(r, 9)}", f"0x{_letters(r, 16, HEX)}", f"{_digits(r, 8)}T{_digits(r, 6)}", f"id={_digits(r, 18)}", f"trace {_letters(r, 32, HEX)}", f"req-{_letters(r, 8, HEX)}")),
    "tables": lambda r: r.choice((" | ".join(_digits(r, r.randint(1, 5)) for _ in range(6)), ",".join(str(r.randint(0, 9999)) for _ in range(8)), "\t".join(f"{r.random():.4f}" for _ in range(5)), " ".join(_digits(r, 4) for _ in range(r.randint(2, 6))))),
}
# fmt: on
ORDERED = {
    "en": "Order {v} has not come.",
    "de": "Bestellung {v} ist nicht da.",
    "fr": "La commande {v} n'est pas arrivée.",
    "es": "El pedido {v} no ha llegado.",
    "zh": "订单号{v}还没到。",
}  # fmt: skip


def negatives(seed: int, count: int = 6000, held_out: bool = False) -> Iterator[Text]:
    """Texts without personal data, of all subjects equally; with `held_out` of those that rules are not tuned on."""
    random = Random(f"{seed} negatives {held_out}")
    subjects = NEGATIVES_HELD_OUT if held_out else NEGATIVES
    for number in range(count):
        subject = list(subjects)[number % len(subjects)]
        language = random.choice(LANGUAGES)
        sentence = random.choice(SENTENCES[language])
        if subject == "order numbers":
            sentence = ORDERED[language]
        yield Text(sentence.replace("{v}", subjects[subject](random)), form=subject, held_out=held_out)


def hard_negatives(seed: int, count: int = 500) -> Iterator[Text]:
    """Order numbers whose check digit is that of a card."""
    random = Random(f"{seed} hard")
    for number in range(count):
        digits = random.choice("123456789") + _digits(random, random.randint(11, 17))
        sentence = ORDERED[LANGUAGES[number % len(LANGUAGES)]]
        yield Text(sentence.replace("{v}", digits + luhn_digit(digits)), form="order numbers that pass Luhn")
