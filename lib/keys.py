"""API keys: who may call which application, and how much of it.

A key is `whorl_` and 43 characters that hold 256 random bits. The database has its SHA-256 alone: what nobody can
guess needs no slow hash (NIST SP 800-63B, section 5.1.2.2, on look-up secrets of 112 bits and more). It is shown
once, when it is made.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Column, Float, Integer, String, Table, insert, select, update

from lib import database
from lib.errors import ConfigError, RegistryError

PREFIX = "whorl_"
ALL = "*"
"""The scope that holds every application."""
NAME, SCOPES = 100, 1000
KEYS = Table(
    "whorl_keys",
    database.TABLES,
    Column("id", String(12), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("name", String(NAME), nullable=False),
    Column("scopes", String(SCOPES), nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)


@dataclass(frozen=True)
class Key:
    """What is known of a key; not the key itself. Times are seconds since 1970."""

    id: str
    name: str
    scopes: frozenset[str]
    """Names of applications, or `*`."""
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: float
    expires: float | None = None
    revoked: float | None = None

    def opens(self, application: str) -> bool:
        return ALL in self.scopes or application in self.scopes

    def is_valid(self, now: float | None = None) -> bool:
        now = time.time() if now is None else now
        return self.revoked is None and (self.expires is None or now < self.expires)


def create(
    name: str,
    scopes: Sequence[str],
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    days: float | None = None,
) -> tuple[Key, str]:
    """A new key, and the secret that its holder sends. Raises ConfigError for an empty name, no scope or a limit
    below 1."""
    scopes = sorted({scope.strip() for scope in scopes} - {""})
    if not name.strip():
        raise ConfigError("--name is empty; say whose key it is")
    if not scopes:
        raise ConfigError(f"--scopes is empty; name applications, such as support,reviews, or {ALL} for all")
    for option, text, most in (("name", name.strip(), NAME), ("scopes", " ".join(scopes), SCOPES)):
        if len(text) > most:
            raise ConfigError(f"--{option} has {len(text):,} characters; at most {most:,} are kept")
    given = (
        ("requests-per-minute", requests_per_minute),
        ("tokens-per-minute", tokens_per_minute),
        ("days", days),
    )
    for option, value in given:
        if value is not None and value <= 0:
            raise ConfigError(f"--{option} {value} must be above 0; leave it out for no limit")
    secret, now = PREFIX + secrets.token_urlsafe(32), time.time()
    key = Key(
        secrets.token_hex(6),
        name.strip(),
        frozenset(scopes),
        requests_per_minute,
        tokens_per_minute,
        now,
        now + days * 86_400 if days is not None else None,
    )
    values = {**vars(key), "scopes": " ".join(scopes), "sha256": digest(secret)}
    with database.engine().begin() as connection:
        connection.execute(insert(KEYS).values(values))
    return key, secret


def find(secret: str) -> Key | None:
    """The key of a secret, valid or not; None when there is none."""
    found = _select(KEYS.c.sha256 == digest(secret))
    return found[0] if found else None


def listed() -> list[Key]:
    """All keys, the oldest first."""
    return _select()


def revoke(key_id: str) -> Key:
    """End a key. Raises RegistryError for an id that does not exist."""
    with database.engine().begin() as connection:
        connection.execute(
            update(KEYS).where(KEYS.c.id == key_id, KEYS.c.revoked.is_(None)).values(revoked=time.time())
        )
    found = _select(KEYS.c.id == key_id)
    if not found:
        raise RegistryError(f"no key {key_id!r}; python -m serve.keys list shows them")
    return found[0]


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _select(*conditions: object) -> list[Key]:
    columns = [column for column in KEYS.c if column.name != "sha256"]
    query = select(*columns).where(*conditions).order_by(KEYS.c.created)  # type: ignore[arg-type]
    with database.engine().connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [Key(**{**row, "scopes": frozenset(row["scopes"].split())}) for row in rows]
