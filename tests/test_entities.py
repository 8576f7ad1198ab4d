"""Tag schemes and spans, beside seqeval's own answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.entities import iob2, parse, score, spans, tag_names

SENTENCE = [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("ORG", 5, 8)]


@pytest.mark.parametrize(
    "tags",
    [
        "B-PER I-PER O B-LOC B-LOC B-ORG I-ORG I-ORG",  # IOB2
        "I-PER I-PER O I-LOC B-LOC I-ORG I-ORG I-ORG",  # IOB1
        "B-PER E-PER O S-LOC S-LOC B-ORG I-ORG E-ORG",  # BIOES
        "B-PER L-PER O U-LOC U-LOC B-ORG I-ORG L-ORG",  # BILOU
    ],
)
def test_every_scheme_gives_the_same_entities(tags: str) -> None:
    assert spans(tags.split()) == SENTENCE
    assert iob2(tags.split()) == ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "B-ORG", "I-ORG", "I-ORG"]


def test_a_kind_that_changes_begins_another_entity() -> None:
    assert spans(["B-PER", "I-LOC", "I-LOC"]) == [("PER", 0, 1), ("LOC", 1, 3)]
    assert spans([]) == []
    assert spans(["O", "O"]) == []


@pytest.mark.parametrize("tag", ["PER", "X-PER", "B-", "-PER", "", "b-PER"])
def test_what_is_no_tag_is_named(tag: str) -> None:
    with pytest.raises(ValueError, match="give O, or a prefix"):
        parse(tag)


def test_tags_may_name_kinds_with_dashes() -> None:
    assert parse("B-first-name") == ("B", "first-name")
    assert tag_names(["PER", "LOC"]) == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_an_entity_counts_only_whole() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC"]]
    found = score(truth, said)
    assert found[""] == {"rows": 3, "precision": 0.5, "recall": 2 / 3, "f1": pytest.approx(4 / 7)}
    assert found["PER"]["f1"] == 0
    assert found["LOC"]["precision"] == pytest.approx(2 / 3)


TAGS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])


@settings(deadline=None)  # seqeval imports scikit-learn in the first
@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=5))
def test_figures_are_those_of_seqeval(pairs: list[list[tuple[str, str]]]) -> None:
    from seqeval import metrics

    truth = [[a for a, _ in sentence] for sentence in pairs]
    said = [[b for _, b in sentence] for sentence in pairs]
    ours = score(truth, said)[""]
    assert ours["f1"] == pytest.approx(metrics.f1_score(truth, said, zero_division=0))
    assert ours["precision"] == pytest.approx(metrics.precision_score(truth, said, zero_division=0))
    assert ours["recall"] == pytest.approx(metrics.recall_score(truth, said, zero_division=0))


@given(st.lists(TAGS, max_size=15))
def test_iob2_keeps_the_entities(tags: list[str]) -> None:
    assert spans(iob2(tags)) == spans(tags)
    assert iob2(iob2(tags)) == iob2(tags)
