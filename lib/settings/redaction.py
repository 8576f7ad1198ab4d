"""Keys of `data.redact`, `score.redact`, `knowledge.redact` and `serving.events.redact`: which personal data is replaced,
and by what."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from lib.errors import nearest
from lib.settings.sections import PinnedModel, Section, Share

# Kind → what it stands for; all of them are known by their form.
KINDS = {
    "EMAIL": "e-mail addresses",
    "PHONE": "phone numbers",
    "CARD": "payment cards",
    "IBAN": "bank accounts",
    "ID": "national ids: United States, China",
    "IP": "addresses of machines",
    "MAC": "addresses of network cards",
    "URL": "names and passwords in URLs",
    "KEY": "keys, tokens and passwords",
}
# Known by a model alone.
NAMES = ("PERSON", "ADDRESS")


def _known(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        near = nearest(str(value).upper(), known)
        raise ValueError(f"no kind {value!r}{near} (known: {', '.join(known)})")
    return str(value)


Kind = Annotated[str, BeforeValidator(lambda value: _known(value, tuple(KINDS)))]
NamedKind = Annotated[str, BeforeValidator(lambda value: _known(value, NAMES))]


class NameSettings(Section):
    """Names of people and postal addresses, which have no form: a tagging model finds them."""

    model: PinnedModel
    """`NAME@VERSION` of a registered tagging model, or a model directory. A version by its number, not an alias: what a
    dataset holds must not change with who is champion."""
    labels: Annotated[dict[str, NamedKind], Field(min_length=1)] = {"PER": "PERSON", "LOC": "ADDRESS"}
    """The model's kind of entity → PERSON or ADDRESS; its other kinds stay."""
    min_score: Share = 0.5
    """Entities that the model is less sure of stay."""


class RedactionSettings(Section):
    """What is replaced."""

    kinds: Annotated[list[Kind], Field(min_length=1)] = list(KINDS)
    regions: list[Annotated[str, Field(pattern="^[A-Z]{2}$")]] = ["US", "GB", "DE", "FR", "ES", "CN"]
    """Countries (ISO 3166) whose phone numbers are known without the prefix of the country; with it, all are."""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Environment variable of a key, 16 bytes or more: a value has the same pseudonym in all rows (HMAC-SHA256), and who
    lacks the key cannot tell which value it is of. None: a number within the row."""
    names: NameSettings | None = None

    @field_validator("kinds")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return [kind for kind in KINDS if kind in value]


def switched(value: Any) -> Any:
    """`redact: true` and `redact: false` as the section and None."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value
