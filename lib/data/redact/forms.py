"""Personal data that its form gives away: e-mail addresses, keys and passwords, addresses of machines.

Each pattern is tried on the whole text once, and none of them looks back over more than a bounded number of
characters, so that a text of any length costs in proportion. What a finder yields are start, end, and the value as it
is compared with others.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

Found = tuple[int, int, str]

# Letters of scripts that put no spaces between words: beside an address they are no part of it.
_DENSE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = rf"[^\W{_DENSE}]"
_LETTER = rf"[^\W\d_{_DENSE}]"

# --- e-mail: with the lengths that RFC 5321, section 4.5.3.1, allows

_LOCAL = (
    rf"(?<![{_DENSE}])[{_DENSE}]{{1,16}}(?=\s?@)|(?<!{_WORD}){_WORD}(?:{_WORD}|[.+%'-]){{0,63}}"
    r'|"[^"\n]{1,62}"'
)
# Endings that stand behind an "@" in names of files and packages.
_NO_DOMAIN = r"(?!(?:[\w-]{1,63}\.){0,3}(?:png|jpe?g|gif|svg|webp|css|js|ts|py)(?![0-9A-Za-z]))"
_DOMAIN = (
    rf"(?:(?:{_WORD}|-){{1,63}}\.){{1,8}}(?:xn--[0-9A-Za-z-]{{2,59}}|{_LETTER}{{2,24}})(?![^\W_{_DENSE}])"
    rf"|(?:[\w-]{{1,63}}\.){{1,8}}[{_DENSE}]{{2,8}}"
    r"|\[\d{1,3}(?:\.\d{1,3}){3}\]"
)
_ENDINGS = (
    "com|org|net|edu|gov|info|biz|io|dev|app|de|at|ch|fr|be|es|mx|it|nl|pl|se|pt|eu|uk|ie|us|ca|au|nz|cn|hk|tw|jp|kr"
    "|in|br|ru|example|test"
)
_EMAIL = re.compile(rf"(?:{_LOCAL})(?:\s?@\s?|%40){_NO_DOMAIN}(?:{_DOMAIN})")
# Where a sign is spelled out, it takes brackets or capitals to tell it from words of a sentence.
_AT = r"\s{0,2}[\[({<]\s?(?i:at|@|ät|arroba|chez|arobase)\s?[\])}>]\s{0,2}|\s{1,2}@\s{1,2}|@|\s{1,2}AT\s{1,2}"
_DOT = r"\s{0,2}[\[({<]\s?(?i:dot|punkt|point|punto|\.)\s?[\])}>]\s{0,2}|\s{1,2}(?:DOT|dot)\s{1,2}|\.| \. "
_SPELLED = re.compile(
    rf"(?<!{_WORD})[A-Za-z0-9_][A-Za-z0-9_+%'-]{{0,63}}(?:(?:{_DOT})[A-Za-z0-9_+%'-]{{1,64}}){{0,3}}(?P<at>{_AT})"
    rf"(?P<domain>[A-Za-z0-9-]{{1,63}}(?:(?:{_DOT})[A-Za-z0-9-]{{1,63}}){{0,4}}(?:{_DOT})(?i:{_ENDINGS}))"
    rf"(?![A-Za-z0-9]|\.[A-Za-z])"
)
# With brackets, or capitals for both signs, any ending will do.
_CLEAR_AT = r"\s{0,2}[\[({<]\s?(?i:at|@|ät|arroba|chez|arobase)\s?[\])}>]\s{0,2}"
_CLEAR_DOT = r"\s{0,2}[\[({<]\s?(?i:dot|punkt|point|punto|\.)\s?[\])}>]\s{0,2}|\s{1,2}DOT\s{1,2}"
_CLEAR = re.compile(
    rf"(?<!{_WORD})[A-Za-z0-9_][A-Za-z0-9_.+%'-]{{0,63}}(?:(?:{_CLEAR_AT})(?:[A-Za-z0-9-]{{1,63}}(?:\.|{_CLEAR_DOT})){{1,6}}"
    rf"|(?:@(?:[A-Za-z0-9-]{{1,63}}(?:{_CLEAR_DOT}| dot )){{1,6}}|\s{{1,2}}AT\s{{1,2}}(?:[A-Za-z0-9-]{{1,63}}(?:{_CLEAR_DOT})){{1,6}}))[A-Za-z0-9-]{{2,63}}"
)
_SPELLED_AT = re.compile(r"[@\[({<A](?:(?<=@)|T\b|\s?(?i:at|ät|arroba|chez|arobase)\s?[\])}>])")
# Each letter on its own: a @ b . c
_LETTERS = re.compile(
    r"(?<![0-9A-Za-z_])[A-Za-z0-9](?: [A-Za-z0-9._+-]){1,40} @(?: [A-Za-z0-9.-]){3,60}(?!\w)"
)


def emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _LETTERS.finditer(text):
            if re.search(rf"\.(?:{_ENDINGS})$", found := match.group().replace(" ", ""), re.I):
                yield match.start(), match.end(), _address(found)
    if _SPELLED_AT.search(text):
        for match in _SPELLED.finditer(text):
            # `write to X @ y . com`: an ending that is known; `MEET AT X.COM` is no address, `a AT x DOT com` is.
            if match["at"].strip() == "AT" and "DOT" not in match["domain"].upper():
                continue
            yield match.start(), match.end(), _address(match.group())
        for match in _CLEAR.finditer(text):
            yield match.start(), match.end(), _address(match.group())
    if "@" in text or "%40" in text:
        for match in _EMAIL.finditer(text):
            yield match.start(), match.end(), _address(match.group())


def _address(said: str) -> str:
    """However the signs are written."""
    said = re.sub(rf"%40|{_AT}", "@", said, count=1)
    said = re.sub(r"\s*[\[({<]\s?(?:dot|punkt|point|punto|\.)\s?[\])}>]\s*|\s+dot\s+", ".", said, flags=re.I)
    return re.sub(r"\s", "", said).lower()


# --- URLs: what stands before the host

_URL = re.compile(r"(?<=://)[^\s/:@?#]{0,256}:[^\s/]{1,256}(?=@)")


def urls(text: str) -> Iterator[Found]:
    if "://" in text:
        for match in _URL.finditer(text):
            yield match.start(), match.end(), match.group()


# --- keys and passwords

_ISSUED = (
    r"whorl_[\w-]{43}"
    r"|sk-(?:proj-|ant-|or-|svcacct-)?[\w-]{20,}|gsk_\w{40,}|xai-\w{60,}|pplx-\w{40,}|r8_\w{30,}|hf_\w{30,}"  # models
    r"|gh[opsur]_\w{36,}|github_pat_\w{50,}|gl(?:pat|rt|dt|ptt|agent|soat|cbt)-[\w-]{20,}|ATBB\w{28,}|ATATT3[\w=-]{60,}"  # code
    r"|npm_\w{36}|pypi-[\w-]{50,}|rubygems_[0-9a-f]{48}|dckr_(?:pat|oat)_[\w-]{24,}|oy2[a-z0-9]{43}"  # packages
    r"|(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[0-9A-Z]{16}|LTAI\w{12,24}|AKID\w{13,32}"  # clouds
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{28}|1//0[\w-]{38,}"
    r"|dop_v1_[0-9a-f]{64}|do[or]_v1_[0-9a-f]{64}|dapi[0-9a-f]{32}(?:-\d)?|hvs\.[\w-]{24,}|HRKU-[\w-]{36,}"
    r"|(?:sk|rk|pk)_(?:live|test)_\w{16,}|whsec_[\w+/=]{24,}|sq0(?:atp|csp|idp)-[\w-]{22,}|EAAA[\w-]{60}"  # payment
    r"|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"
    r"|xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{20,}|\d{8,10}:AA[\w-]{33}|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}"  # chats
    r"|SG\.[\w-]{16,32}\.[\w-]{32,64}|key-[0-9a-f]{32}|SK[0-9a-f]{32}|xkeysib-[0-9a-f]{64}-\w{16}"  # mails and calls
    r"|gl(?:sa|c)_[\w+/=]{32,}|NRAK-[0-9A-Z]{27}|sntry[su]_[\w+/=.-]{40,}|PMAK-[0-9a-f]{24}-[0-9a-f]{34}"  # operations
    r"|lin_api_\w{40}|ntn_\w{40,}|secret_\w{43}|figd_[\w-]{40,}|sbp_[0-9a-f]{40}|dp\.pt\.\w{40,}|pat[\w]{14}\.[0-9a-f]{64}"
    r"|AGE-SECRET-KEY-1[0-9A-Z]{58}|eyJ[\w-]{8,}\.(?:eyJ)?[\w-]{8,}\.[\w-]{8,}"
)
_KEY = re.compile(rf"(?<![0-9A-Za-z_])(?:{_ISSUED})(?![0-9A-Za-z_])")
_HOOK = re.compile(
    r"(?<=hooks\.slack\.com/)(?:services|workflows)/[\w/]{20,}|(?<=/api/webhooks/)\d{16,20}/[\w-]{40,}"
)
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){0,20000}(?:-----END [A-Z0-9 ]{0,50}-----)?"
)
_BEARER = re.compile(
    r"(?i:\b(?P<named>Bearer|Token)|\bAuthorization['\"]?\s?[:=]\s?['\"]?(?:Basic|Digest|ApiKey))\s{1,2}(?P<value>[A-Za-z0-9._~+/-]{16,}={0,2})"
)
_NAMED = (
    r"(?:pass(?:word|wd|phrase|code)|(?<![a-z])pass(?![a-z])|pwd|passwort|kennwort|contrase[nñ]a|mot de passe|密码|口令|密钥|令牌"
    r"|secret|token|(?:api|access|secret|auth|account|private|shared|signing|encryption|master)[ _-]?key|credential)s?"
)
# The name may go on behind: secret_access_key, "password is".
_ASSIGNED = re.compile(
    rf"(?i:{_NAMED})(?:[_-][A-Za-z0-9]{{1,16}}){{0,3}}['\"`]?\]?\s{{0,3}}"
    r"(?P<sign>:=|=>|==?|:|,(?=\s{0,2}['\"])|\bis:?|\blautet:?|\bist:?|\best:?|\bes:?|是)\s{0,3}"
    rf"(?P<quote>['\"`])?(?P<value>[^\s'\"`<>,;&(){{}}\[\]，。；{_DENSE}]{{4,512}}+)(?![(\[])",
)
# --password x, <password>x</password>
_FLAGGED = re.compile(
    rf"(?:--[a-z-]{{0,20}}?(?i:{_NAMED})\s{{1,2}}|<[A-Za-z:]{{0,20}}(?i:{_NAMED})>)(?P<value>[^\s'\"`<>]{{4,512}}+)"
)
_AWS_SECRET = re.compile(
    r"(?i:aws|secret)[^\n]{0,40}?(?<![A-Za-z0-9/+=])(?P<value>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
)
# One of these is in a text that names a secret; looking for each costs a tenth of one pattern for all of them.
_NAMES = [
    "pass",
    "pwd",
    "secret",
    "token",
    "key",
    "kennwort",
    "contrase",
    "credential",
    "bearer",
    "authorization",
    "密码",
    "口令",
    "密钥",
    "令牌",
]
# The shortest key that is known by its form alone.
_SHORTEST = 15
# What stands where a value would: a name of one, a call, a word that says there is none.
_NO_VALUE = re.compile(
    r"\$|%[({\w]|\*+$|[xX.…-]{4,}$|(?:none|null|nil|true|false|undefined|required|optional|string|str|bytes|changeme)$"
    r"|[a-z_]+(?:\.[a-z_]+)+$|https?://",
    re.I,
)
# A word of a sentence: "password: please", "the token is valid"
_PLAIN_WORD = re.compile(r"[^\W\d_]+[.!?:]?")


def keys(text: str) -> Iterator[Found]:
    if max(map(len, text.split()), default=0) >= _SHORTEST:
        for match in _KEY.finditer(text):
            yield match.start(), match.end(), match.group()
    if "PRIVATE KEY" in text:
        for match in _PEM.finditer(text):
            yield match.start(), match.end(), match.group()
    if "hooks" in text:
        for match in _HOOK.finditer(text):
            yield match.start(), match.end(), match.group()
    small = text.lower()
    if not any(name in small for name in _NAMES):
        return
    for match in _BEARER.finditer(text):
        value = match["value"]
        if not match["named"] or any(c.isdigit() for c in value):
            yield match.start("value"), match.end("value"), value
    for match in _ASSIGNED.finditer(text):
        value = match["value"].rstrip(".!?:")
        if _is_secret(value, match["sign"], bool(match["quote"])):
            yield match.start("value"), match.start("value") + len(value), value
    for match in _FLAGGED.finditer(text):
        if not _NO_VALUE.match(value := match["value"]):
            yield match.start("value"), match.end("value"), value
    for match in _AWS_SECRET.finditer(text):
        value = match["value"]
        if all(re.search(kind, value) for kind in ("[0-9]", "[a-z]", "[A-Z]")):  # no commit, no path
            yield match.start("value"), match.end("value"), value


def _is_secret(value: str, sign: str, quoted: bool) -> bool:
    if len(value) < 4 or _NO_VALUE.match(value):
        return False
    kinds = sum(bool(re.search(kind, value)) for kind in (r"\d", r"[a-z]", r"[A-Z]", r"[^\w]|_"))
    if sign in ("=", ":=", "=>", "==") or quoted:
        return not (len(value) < 6 and value.isdigit())
    return len(value) >= 6 and kinds >= 2 and not _PLAIN_WORD.fullmatch(value)


# --- machines

_DOT_OF_IP = r"(?:\.|\s?[\[({]\.[\])}]\s?|[\[({]dot[\])}]| \. )"
_IPV4 = re.compile(
    rf"(?<![0-9A-Za-z_.])(?<!\d,)\d{{1,3}}(?:{_DOT_OF_IP}\d{{1,3}}){{3}}(?![A-Za-z0-9_])(?!\.\d)"
)
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z_.])(?:[0-9A-Fa-f]{1,4}:|:(?=:))(?:[0-9A-Fa-f]{0,4}:){1,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{1,4})?(?![A-Za-z0-9_:])"
)
_FOUR = re.compile(r"\d\D{1,5}\d{1,3}\D{1,5}\d{1,3}\D{1,5}\d")
_SIX = re.compile(r"[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}[:-]| [0-9A-Fa-f]{2} )|\.[0-9A-Fa-f]{4}\.")
# Four numbers with dots may count editions and chapters, too.
_NUMBERED = re.compile(
    r"(?:(?<![a-z])v|version|versión|versione|ver\.|release|build|firmware|driver|section|sección|chapter|kapitel|abschnitt"
    r"|chapitre|clause|§|版本|版|第|章|节)\s{0,2}[:=#]?\s{0,2}v?$",
    re.I,
)
_MAC = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9A-Za-z][.-])(?:[0-9A-Fa-f]{2}(?P<sign>[:-])(?:[0-9A-Fa-f]{2}(?P=sign)){4,9}[0-9A-Fa-f]{2}|[0-9A-Fa-f]{2}(?: [0-9A-Fa-f]{2}){5}"
    r"|[0-9A-Fa-f]{4}(?P<pair>[. ])[0-9A-Fa-f]{4}(?P=pair)[0-9A-Fa-f]{4}|[0-9A-Fa-f]{6}-[0-9A-Fa-f]{6}|[0-9A-Fa-f]{12})(?![0-9A-Za-z_:]|[.-][0-9A-Za-z])"
)
_MAC_GATE = re.compile(r"[Mm][Aa][Cc]|[Ee]thernet|(?i:hwaddr|bssid)|网卡")
_MAC_NAMED = re.compile(r"(?:(?<![a-z])mac(?![a-z])|ethernet|hwaddr|bssid|网卡)[^\n]{0,24}$", re.I)


def machines(text: str) -> Iterator[Found]:
    for match in _IPV4.finditer(text) if _FOUR.search(text) else ():
        numbers = re.findall(r"\d+", match.group())
        if all(int(number) < 256 for number in numbers):
            address = ipaddress.ip_address(".".join(str(int(number)) for number in numbers))
            named = _NUMBERED.search(text[max(0, match.start() - 24) : match.start()])
            if not (named or address.is_loopback or address.is_unspecified):
                yield match.start(), match.end(), str(address)
    if text.count(":") > 1:
        for match in _IPV6.finditer(text):
            if (found := _ipv6(match.group())) is not None:
                yield match.start(), match.end(), found


def _ipv6(value: str) -> str | None:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return None
    # `a::b` is an address too, and more often a name in a program.
    named = not any(c.isdigit() for c in value)
    return None if named or address.is_unspecified or address.is_loopback else str(address)


def cards_of_networks(text: str) -> Iterator[Found]:
    """MAC addresses."""
    if not _SIX.search(text) and not _MAC_GATE.search(text):
        return
    for match in _MAC.finditer(text):
        value = re.sub(r"[^0-9A-Fa-f]", "", match.group()).lower()
        # Bare digits, pairs of them and pairs of letters may be anything: the name has to be there.
        sure = (match["sign"] is not None and not value.isdigit()) or "." in match.group()
        if (
            len(value) == 12
            and len(set(value)) > 1
            and (sure or _MAC_NAMED.search(text[max(0, match.start() - 32) : match.start()]))
        ):
            yield match.start(), match.end(), value
