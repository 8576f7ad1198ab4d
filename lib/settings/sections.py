"""What every section is made of."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
# Of the files of a source; auto goes by each file's ending. Plain text has a row a line, paragraph or file.
Format = Literal[
    "auto",
    "csv",
    "tsv",
    "json",
    "jsonl",
    "parquet",
    "arrow",
    "conll",
    "text",
    "paragraphs",
    "documents",
    "chatterbot",
]

Item = TypeVar("Item")
# One value or a list of them, as a list: `--plan.workers 8` and `--plan.workers "[4, 8]"`.
Listed = Annotated[
    list[Item], Field(min_length=1), BeforeValidator(lambda v: v if isinstance(v, (list, tuple)) else [v])
]


def _pinned(value: str) -> str:
    name, at, version = value.rpartition("@")
    if at and "/" not in value and not version.isdigit():
        raise ValueError(f"{value!r} is no fixed version; give its number, such as {name}@3")
    return value


# `NAME@VERSION` of a registered model, or what names a base: what a dataset holds must not change with who is champion.
PinnedModel = Annotated[str, Field(min_length=1), AfterValidator(_pinned)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
