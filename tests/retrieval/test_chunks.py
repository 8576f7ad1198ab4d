"""Passages: nothing lost, no budget broken, whole sentences overlap, headings go along."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lib.encoders import load_tokenizer
from lib.retrieval.chunks import Chunker, Passage
from lib.retrieval.documents import Block, Document
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base, 1 << 30)


def cut(
    tokenizer: Tokenizer, budget: int, overlap: int, *blocks: Block, title: str = "dress"
) -> list[Passage]:
    return list(Chunker(tokenizer, budget, overlap).passages(Document(title, list(blocks))))


def under(*headings: str) -> list[Block]:
    return [Block("fits a size. was soft.", headings, f"paragraph {len(headings)}")]


def test_what_fits_is_one_passage_for_each_heading(tokenizer: Tokenizer) -> None:
    blocks = [*under(), *under("color"), *under("color"), *under("color", "fabric")]
    found = cut(tokenizer, 64, 8, *blocks)
    assert [(p.headings, p.text.count("\n")) for p in found] == [
        ((), 0),
        (("color",), 1),
        (("color", "fabric"), 0),
    ]
    assert found[2].searched == "dress > color > fabric\nfits a size. was soft."
    assert found[1].place == "paragraph 1"


def test_sentences_overlap(tokenizer: Tokenizer) -> None:
    said = [f"the {word} is good." for word in ("dress", "shirt", "fabric", "color", "fit", "size")]
    found = cut(tokenizer, 22, 6, Block(" ".join(said), (), "paragraph 1"))
    assert len(found) > 2
    for before, after in pairwise(found):
        last = before.text.split(". ")[-1].rstrip(".")
        assert after.text.startswith(last)
    without = cut(tokenizer, 22, 0, Block(" ".join(said), (), "paragraph 1"))
    assert " ".join(p.text for p in without) == " ".join(said)


def test_a_paragraph_that_would_be_cut_begins_a_new_passage(tokenizer: Tokenizer) -> None:
    first = Block("the dress is good. the shirt is good.", (), "paragraph 1")
    second = Block("the size is bad. the fit is bad.", (), "paragraph 2")
    found = cut(tokenizer, 19, 0, first, second)
    assert [(p.text, p.place) for p in found] == [(b.text, b.place) for b in (first, second)]


texts = st.lists(
    st.sampled_from([*WORDS, "xyzzy", "a.b", "wörter", ".", "!?", "\u2009"]), min_size=1, max_size=80
)


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(texts.map(" ".join), min_size=1, max_size=4),
    budget=st.integers(16, 60),
    overlap=st.integers(0, 8),
    title=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join),
)
def test_no_passage_is_above_the_budget_and_nothing_is_lost(
    tiny_base: Path, blocks: list[str], budget: int, overlap: int, title: str
) -> None:
    tokenizer = load_tokenizer(tiny_base, 1 << 30)
    given_blocks = [Block(text, ("a heading",), f"paragraph {i}") for i, text in enumerate(blocks, 1)]
    found = cut(tokenizer, budget, overlap, *given_blocks, title=title)
    for passage in found:
        assert len(tokenizer.encode(passage.searched).ids) == passage.tokens <= budget
    if overlap == 0:
        assert "".join("".join(p.text for p in found).split()) == "".join("".join(blocks).split())
