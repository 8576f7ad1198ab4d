"""Documents: Markdown, HTML, text and PDF come to titles and blocks under headings; the unreadable is one line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lib.data.redact import Rules, together
from lib.errors import ConfigError, DataError
from lib.retrieval.documents import Document, find_documents, read_document, without_personal_data

MARKDOWN = """---
title: "Sending *back*"
---
# Returns

Within **30 days**,
by [post](https://x.example).

## Refunds

| way | days |
| --- | --- |
| card | 5 |

### Late ones

- call us
- or write

## Costs

`free`
"""
HTML = """<!doctype html><html><head><title>Delivery – Shop</title><style>p{color:red}</style></head><body>
<nav><a href="/">Home</a></nav><header><h1>Delivery</h1></header>
<script>var x = "<p>no</p>";</script>
<p>We ship to <b>Mal</b>mö &amp; Oslo.<!-- soon --><br>Daily.</p><div hidden>secret</div>
<h2>Costs</h2><ul><li>EU: 5&nbsp;€</li><li>US: 9 $</li></ul><footer>Imprint</footer></body></html>"""


def read(path: Path) -> Document:
    (file,) = find_documents([str(path)]).files
    return read_document(file)


def told(document: Document) -> list[tuple[str, str]]:
    return [(" > ".join(block.headings), block.text) for block in document.blocks]


def test_markdown(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(MARKDOWN)
    document = read(tmp_path / "x.md")
    assert document.title == "Sending *back*"
    assert told(document) == [
        ("", "Within 30 days, by post."),
        ("Refunds", "way | days"),
        ("Refunds", "card | 5"),
        ("Refunds > Late ones", "call us"),
        ("Refunds > Late ones", "or write"),
        ("Costs", "free"),
    ]
    assert [block.place for block in document.blocks[:2]] == ["paragraph 1", "paragraph 2"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_html_is_what_the_page_says_and_not_what_is_around_it(tmp_path: Path, encoding: str) -> None:
    page = HTML.replace("–", "-").replace("€", "EUR")
    if encoding != "utf-8":
        page = page.replace("<head>", f'<head><meta charset="{encoding}">')
    (tmp_path / "x.html").write_text(page, encoding=encoding)
    document = read(tmp_path / "x.html")
    assert document.title == "Delivery"
    assert told(document) == [
        ("", "We ship to Malmö & Oslo. Daily."),
        ("Costs", "EU: 5 EUR"),
        ("Costs", "US: 9 $"),
    ]


def test_html_without_a_heading_is_named_by_its_title(tmp_path: Path) -> None:
    (tmp_path / "x.htm").write_text("<title>Our  shops</title><main>Open <i>daily</i></main>")
    document = read(tmp_path / "x.htm")
    assert (document.title, told(document)) == ("Our shops", [("", "Open daily")])


def test_text_is_paragraphs_and_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "opening_hours.txt").write_text("\ufeffMonday\nto Friday\n\n\n  Sunday  \n")
    document = read(tmp_path / "opening_hours.txt")
    assert document.title == "opening hours"
    assert told(document) == [("", "Monday to Friday"), ("", "Sunday")]


def test_pdf_is_read_by_page_under_its_outline(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=make_pdf(tmp_path / "plain.pdf", ["Wool and silk", "Zips", "Seams"]))
    writer.add_metadata({"/Title": "Care"})
    faults = writer.add_outline_item("Faults", 1)
    writer.add_outline_item("Seams", 2, parent=faults)
    writer.write(tmp_path / "x.pdf")
    document = read(tmp_path / "x.pdf")
    assert document.title == "Care"
    assert [(block.place, block.headings, block.text) for block in document.blocks] == [
        ("page 1", (), "Wool and silk"),
        ("page 2", ("Faults",), "Zips"),
        ("page 3", ("Faults", "Seams"), "Seams"),
    ]


def make_pdf(path: Path, pages: list[str]) -> Path:
    """A PDF with one text a page."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(path) as pdf:
        for said in pages:
            figure = Figure()
            figure.text(0.1, 0.5, said)
            pdf.savefig(figure)
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", b"caf\xe9", r"x\.txt, byte 4 \(0xe9\) is not valid UTF-8; convert the file"),
        ("x.md", b"# Only a heading\n", r"x\.md holds no text"),
        ("x.html", b"", r"x\.html is not readable HTML"),
        ("x.html", b"<nav>Home</nav>", r"x\.html holds no text"),
        ("x.pdf", b"no PDF at all", r"x\.pdf is not readable PDF"),
        ("x.pdf", b"%PDF-1.7\n1 0 obj\n<<", r"x\.pdf is not readable PDF"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


def test_a_pdf_with_a_password_and_one_of_pictures(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=make_pdf(tmp_path / "plain.pdf", ["x"]))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(DataError, match=r"locked\.pdf is encrypted; save it without a password"):
        read(tmp_path / "locked.pdf")
    make_pdf(tmp_path / "scan.pdf", [""])
    with pytest.raises(DataError, match=r"scan\.pdf holds no text; a scanned page"):
        read(tmp_path / "scan.pdf")


def test_too_large_a_document_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.txt", "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(DataError, match=r"x\.txt is larger than 64 MiB"):
        read(tmp_path / "x.txt")


def test_folders_globs_and_files_and_what_a_citation_shows(tmp_path: Path) -> None:
    for name in ("help/a.md", "help/deep/b.HTML", "help/logo.png", "help/.hidden.md", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = find_documents([f"{tmp_path}/help", f"{tmp_path}/*.txt", f"{tmp_path}/help/a.md"])
    assert [(file.source, file.kind) for file in found.files] == [
        ("a.md", "markdown"),
        ("deep/b.HTML", "html"),
        ("c.txt", "text"),
    ]
    assert found.others == {".png": 1}
    (file,) = find_documents([f"{tmp_path}/help/**/*.HTML"], "https://shop.example/help/").files
    assert file.source == "https://shop.example/help/deep/b.HTML"
    assert file.name == f"{tmp_path}/help/deep/b.HTML"


def test_any_fsspec_uri() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/whorl-documents/deep/x.txt", b"open daily")
    try:
        (file,) = find_documents(["memory://whorl-documents"]).files
        assert (file.source, read_document(file).blocks[0].text) == ("deep/x.txt", "open daily")
    finally:
        memory.rm("/whorl-documents", recursive=True)


def test_a_source_that_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    for source, says in (
        ("picture", "does not exist; did you mean 'pictures'"),
        ("pictures", r"holds no documents, only .*a\.png and the like"),
        ("empty", "empty holds no files"),
        ("*.md", "no file matches"),
    ):
        with pytest.raises(ConfigError, match=rf"knowledge\.source: .*{says}"):
            find_documents([f"{tmp_path}/{source}"])


def test_personal_data_leaves_title_headings_and_text_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(
        "# Ask ada@example.com\n\nShe answers.\n\n## bob@example.com\n\nOr ada (at) example.com.\n\nSize 38.\n"
    )
    document = read(tmp_path / "x.md")
    said, counts = without_personal_data(document, partial(together, rules=Rules()))
    assert said.title == "Ask <EMAIL_1>"
    assert told(said) == [
        ("", "She answers."),
        ("<EMAIL_2>", "Or <EMAIL_1>."),
        ("<EMAIL_2>", "Size 38."),
    ]
    assert [block.place for block in said.blocks] == [block.place for block in document.blocks]
    assert counts == {"EMAIL": 2}
