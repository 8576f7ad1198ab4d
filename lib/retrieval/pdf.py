"""PDF as blocks of text by page, under the headings of its outline."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

from lib.errors import DataError
from lib.retrieval.documents import Block

# A word that was divided at a line's end.
DIVIDED = re.compile(r"(\w)-\n(\w)")


def read(name: str, content: bytes) -> tuple[str | None, list[Block]]:
    """Title of the metadata, where there is one, and blocks. Raises DataError for a file that cannot be read."""
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each flaw that it can read past
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{name} is encrypted; save it without a password")
        title = (reader.metadata.title if reader.metadata else None) or None
        headings = _headings(reader)
        blocks: list[Block] = []
        for number, page in enumerate(reader.pages, 1):
            above = max((first for first in headings if first <= number), default=0)
            said = DIVIDED.sub(r"\1\2", page.extract_text())
            for paragraph in re.split(r"\n\s*\n", said):
                if body := " ".join(paragraph.split()):
                    blocks.append(Block(body, headings.get(above, ()), f"page {number}"))
    except DataError:
        raise
    except Exception as error:  # a damaged file makes pypdf raise anything
        raise DataError(f"{name} is not readable PDF: {type(error).__name__}: {error}") from error
    return title, blocks


def _headings(reader: Any) -> dict[int, tuple[str, ...]]:
    """Page → the outline's entries that it is under: the last ones that begin on it."""
    found: dict[int, tuple[str, ...]] = {}

    def walk(entries: list[Any], above: tuple[str, ...]) -> None:
        last = above
        for entry in entries:
            if isinstance(entry, list):
                walk(entry, last)
                continue
            last = (*above, " ".join(str(entry.title).split()))
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                found.setdefault(page + 1, last)

    walk(reader.outline, ())
    return found
