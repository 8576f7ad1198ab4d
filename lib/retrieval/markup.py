"""Markdown and HTML as blocks of text under their headings. Markdown is rendered to HTML, so that there is one reader."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lib.errors import DataError
from lib.retrieval.documents import Block

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
# fmt: off
# Around what a page says, not part of it.
SKIPPED = {
    "head", "script", "style", "template", "noscript", "svg", "canvas", "iframe", "object", "nav", "footer", "aside",
    "form", "button", "select", "dialog",
}
BLOCKS = {
    "address", "article", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "header", "hr", "html", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "td",
    "tfoot", "th", "thead", "ul",
}
# fmt: on
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n(?:---|\.\.\.)\s*(?:\n|\Z)", re.S)


def read_html(name: str, content: bytes) -> tuple[str | None, list[Block]]:
    """Title, where there is one, and blocks. Raises DataError for bytes that hold no HTML."""
    import lxml.etree
    import lxml.html

    try:
        content.decode("utf-8")
        # Without a word of the page itself, the parser would take it for Latin-1.
        parser = lxml.html.HTMLParser(encoding="utf-8")
    except UnicodeDecodeError:
        parser = lxml.html.HTMLParser()
    try:
        page = lxml.html.document_fromstring(content, parser=parser)
    except (lxml.etree.LxmlError, ValueError) as error:
        raise DataError(f"{name} is not readable HTML: {error}") from error
    mains = page.xpath("//main") or page.xpath("//article")
    reader = _Reader()
    reader.walk(mains[0] if len(mains) == 1 else page)
    reader.flush()
    title = reader.title or " ".join((page.findtext(".//title") or "").split())
    return title or None, reader.blocks


def read_markdown(content: str) -> tuple[str | None, list[Block]]:
    """Title, of the front matter or the first heading of level 1, and blocks."""
    from markdown_it import MarkdownIt

    given: Any = None
    if front := FRONT_MATTER.match(content):
        content = content[front.end() :]
        try:
            given = yaml.safe_load(front[1])
        except yaml.YAMLError:  # only looks like front matter; what it says of the title is not known
            given = None
    page = MarkdownIt("commonmark").enable("table").render(content)
    title, blocks = read_html("", f"<main>{page}</main>".encode())
    named = given.get("title") if isinstance(given, dict) else None
    return (str(named) if named else title), blocks


class _Reader:
    """Walks a page in its order: inline text gathers until a block begins or ends."""

    def __init__(self) -> None:
        self.title: str | None = None
        self.blocks: list[Block] = []
        self._path: list[tuple[int, str]] = []
        self._held: list[str] = []

    def walk(self, element: Any) -> None:
        if not isinstance(element.tag, str):  # a comment or a processing instruction
            return
        tag = element.tag.lower()
        if tag in SKIPPED or "hidden" in element.attrib or element.get("aria-hidden") == "true":
            return
        if tag in HEADINGS:
            self.flush()
            self._heading(int(tag[1]), " ".join(element.text_content().split()))
        elif tag == "tr":
            self.flush()
            cells = (" ".join(cell.text_content().split()) for cell in element)
            self._held.append(" | ".join(cell for cell in cells if cell))
            self.flush()
        elif tag in BLOCKS:
            self.flush()
            self._inside(element)
            self.flush()
        else:
            if tag == "br":
                self._held.append(" ")
            self._inside(element)

    def flush(self) -> None:
        body = " ".join("".join(self._held).split())
        self._held.clear()
        if body:
            headings = tuple(heading for _, heading in self._path)
            self.blocks.append(Block(body, headings, f"paragraph {len(self.blocks) + 1}"))

    def _inside(self, element: Any) -> None:
        self._held.append(element.text or "")
        for child in element:
            self.walk(child)
            self._held.append(child.tail or "")

    def _heading(self, level: int, heading: str) -> None:
        if not heading:
            return
        if level == 1 and self.title is None:
            self.title, self._path = heading, []
            return
        self._path = [(above, name) for above, name in self._path if above < level] + [(level, heading)]
