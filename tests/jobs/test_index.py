"""`python -m jobs.index`: what it makes and says, that it skips what is there, and what ends it in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.index import index
from lib.artifacts import IndexRef
from lib.command import run
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import Index, current
from lib.retrieval.search import search
from lib.settings import SearchSettings, ServingSettings

pytestmark = pytest.mark.usefixtures("storage")


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:
    """A configuration whose documents are in `help/`: three that can be read, one that cannot, one that is none."""
    folder = tmp_path / "help"
    folder.mkdir()
    (folder / "sizes.md").write_text(
        "# Sizes\n\nThe dress fits.\n\n## Shirts\n\n" + "The shirt was soft. " * 40
    )
    (folder / "fabric.html").write_text("<h1>Fabric</h1><p>The fabric is great.</p>")
    (folder / "colors.txt").write_text("Good color.")
    (folder / "wrong.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "logo.png").write_bytes(b"x")
    values = {
        "name": "shop",
        "task": "chat",
        "data": {"source": "nowhere.jsonl"},
        "model": {"base": "nowhere"},
        "knowledge": {"source": str(folder), "base": str(tiny_base), "chunk_tokens": 64, "overlap": 8},
    }
    path = tmp_path / "shop.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_documents_become_an_index_and_only_what_changed_is_made_again(
    config: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config)]
    assert run(index, words) == 2
    error = capsys.readouterr().err
    assert "error: 1 of 4 documents cannot be read: " in error
    assert "wrong.txt, byte 1 (0xff) is not valid UTF-8" in error
    assert list((tmp_path / "whorl" / "indexes" / "shop").iterdir()) == []

    only = ["--knowledge.source", str(tmp_path / "help" / "wrong.txt"), "--knowledge.max_unreadable", "1"]
    assert run(index, words + only) == 2
    assert "no document holds text: " in capsys.readouterr().err

    words += ["--knowledge.max_unreadable", "0.3"]
    assert run(index, words) == 0
    said = capsys.readouterr().out
    ref = current("shop")
    assert f"fingerprint  {ref.fingerprint}\n" in said
    assert "documents    3; files of other kinds left out: 1 .png" in said
    assert "unreadable   " in said
    assert "--serving.knowledge shop" in said
    manifest = ref.manifest()
    assert manifest["width"] == 32
    assert f"passages     {manifest['passages']}, vectors of 32" in said
    assert manifest["passages"] > 4  # one section was cut

    reader, embedder = Index(ref), Embedder(str(tiny_base), ServingSettings(threads=1))
    question = "Sizes\nThe dress fits."
    (hit,) = search(reader, [question], embedder.vectors([question]), SearchSettings(top_k=1))
    assert (hit.title, hit.text, hit.source) == ("Sizes", "The dress fits.", "sizes.md")
    assert hit.cosine > 0.98

    assert run(index, words) == 0
    assert f"index {ref.fingerprint} is there already" in capsys.readouterr().out
    (tmp_path / "help" / "colors.txt").write_text("Bad color.")
    assert run(index, words) == 0
    assert current("shop") != ref
    assert IndexRef("shop", ref.fingerprint).exists()  # for those who still read it

    (tmp_path / "help" / "colors.txt").write_text("Bad color. Ask ada@example.com.")
    assert run(index, words) == 0
    assert "redacted" not in capsys.readouterr().out
    assert "Bad color. Ask ada@example.com." in texts()
    assert run(index, [*words, "--knowledge.redact", "true"]) == 0
    assert "redacted     EMAIL 1\n" in capsys.readouterr().out
    assert current("shop").manifest()["redacted"] == {"EMAIL": 1}
    assert "Bad color. Ask <EMAIL_1>." in texts()


def texts() -> list[str]:
    """Of the passages of the current index that say something of colours."""
    return [row["text"] for row in Index(current("shop")).matching("color", 10)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--knowledge.source", "null"], "knowledge.source is missing"),
        (["--knowledge.chunk_tokens", "127"], "chunk_tokens 127 is above the 126 tokens that"),
        (["--knowledge.overlap", "33"], "overlap 33 is more than half of chunk_tokens 64"),
        (["--knowledge.base", "sample://minilm"], "did you mean 'minilm-l6'"),
        (["--knowledge.source", "nosuch://x"], "nosuch"),
    ],
)
def test_mistakes_are_told_before_ray_is_started(
    config: Path,
    words: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.index.connect", lambda: pytest.fail("Ray was started"))
    assert run(index, ["--config", str(config), *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
