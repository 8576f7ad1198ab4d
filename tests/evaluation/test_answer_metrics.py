"""Figures of answers, against the libraries and the definitions that they come from."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from lib.evaluation import answer_metrics
from lib.evaluation.answer_metrics import (
    Words,
    bits_per_byte_of,
    chrf_score,
    distinct,
    figures,
    perplexity_of,
    repetition,
)
from lib.evaluation.intervals import bootstrap_sums, interval
from lib.settings import REFUSALS

ANSWERS = [
    "Restart the router, then wait a minute.",
    "I'm sorry, but I can't help with that.",
    "Open settings and click on network. Open settings and click on network.",
    "",
]
REFERENCES = [
    "Please restart your router and wait for a minute.",
    "Delete the cache of the browser.",
    "Open settings, choose network.",
    "Call us.",
]


@pytest.fixture
def measured():
    return figures(ANSWERS, REFERENCES, REFUSALS, [9, 12, 15, 0], [False, False, True, False])


def test_rouge_l_and_chrf_are_those_of_their_libraries(measured):
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    assert measured.rouge_l == pytest.approx(theirs)
    assert measured.additive("chrf").value == pytest.approx(CHRF().corpus_score(ANSWERS, [REFERENCES]).score)
    part = measured.part([2, 0])
    ours = part.additive("chrf").value
    assert ours == pytest.approx(
        CHRF().corpus_score([ANSWERS[2], ANSWERS[0]], [[REFERENCES[2], REFERENCES[0]]]).score
    )
    assert part.words[1] == Words().tokenize(ANSWERS[0])


def test_words_of_other_scripts_count():
    said = "Перезагрузите роутер"
    assert figures([said], [said], [], [3], [False]).rouge_l.tolist() == [1.0]
    assert (
        RougeScorer(["rougeL"]).score(said, said)["rougeL"].fmeasure == 0
    )  # why its own tokeniser is not used


def test_summary(measured):
    summary = measured.summary()
    assert summary["refusals"] == 0.25
    assert summary["cut"] == 0.25
    assert summary["exact_match"] == 0
    assert summary["tokens_mean"] == 9
    assert summary["tokens_median"] == 10.5
    assert figures(["Call  US."], ["call us."], [], [3], [False]).exact_match.tolist() == [1.0]


def test_an_answer_is_held_against_its_passages():
    assert "grounded" not in figures(["x"], ["x"], [], [1], [False]).summary()
    said = ["You have 30 days, days!", "I do not know.", "Pay by card.", ""]
    passages = ["[1] Returns\nYou have 30 days.", "", "", "Cards"]
    found = figures(said, said, REFUSALS, [5, 4, 3, 0], [False] * 4, passages)
    # "days" is in the passage once; who says nothing says nothing wrong; without passages it is not measured.
    assert found.grounded.tolist() == pytest.approx([4 / 5, np.nan, np.nan, 1], nan_ok=True)
    assert found.abstained.tolist() == pytest.approx([np.nan, 1, 0, np.nan], nan_ok=True)
    assert found.summary()["grounded"] == pytest.approx(0.9)
    assert found.summary()["abstained"] == 0.5
    assert found.part([1, 2]).of_some == ["abstained"]
    with pytest.raises(KeyError):
        found.part([1, 2]).additive("grounded")


def test_distinct_is_over_all_answers_and_repetition_inside_each():
    words = [["a", "b", "a"], ["a", "b"]]
    assert distinct(words, 1) == 2 / 5
    assert distinct(words, 2) == 2 / 3
    assert distinct([[]], 2) == 0
    assert repetition(["one", "two", "three", "four"]) == 0
    assert repetition(["x", "y", "x", "y", "x", "y", "x", "y"]) == 1 - 2 / 5
    assert repetition(["short"]) == 0


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("I’m sorry, I cannot".replace("’", "'"), True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I have no router.", True),
        ("I don't have access to your account.", True),
        ("I do not know what you mean.", True),
        ("You know what to do: restart it.", False),
        ("Sorry to hear that! Restart it.", False),
        ("You cannot delete this folder, but you can empty it.", False),
        ("If it cannot help, call us.", False),
    ],
)
def test_refusals(text, is_one):
    assert bool(figures([text], ["x"], REFUSALS, [1], [False]).refusals[0]) is is_one


def test_perplexity_is_a_mean_over_tokens_not_over_answers():
    losses, tokens = np.array([1.0, 30.0]), np.array([1.0, 10.0])
    assert perplexity_of(losses, tokens).value == pytest.approx(np.exp(31 / 11))
    assert bits_per_byte_of(losses, np.array([4.0, 40.0])).value == pytest.approx(31 / np.log(2) / 44)


def test_bootstrap_of_sums_equals_resampling_rows():
    random = np.random.default_rng(1)
    tokens = random.integers(1, 40, 120).astype(float)
    losses = tokens * random.gamma(2.0, 1.0, 120)
    figure = perplexity_of(losses, tokens)
    ours = bootstrap_sums({"a": figure, "b": perplexity_of(losses * 0.9, tokens)}, 2000)
    rows = [random.integers(0, 120, 120) for _ in range(2000)]
    plain = np.array([np.exp(losses[r].sum() / tokens[r].sum()) for r in rows])
    assert ours["a"].mean() == pytest.approx(plain.mean(), rel=0.02)
    assert ours["a"].std() == pytest.approx(plain.std(), rel=0.1)
    # Paired: b is better in every resample, although the intervals of a and b overlap.
    assert (ours["a"] > ours["b"]).all()
    assert interval(ours["a"])[0] < interval(ours["b"])[1]
    with pytest.raises(ValueError, match="the same rows"):
        bootstrap_sums({"a": figure, "c": perplexity_of(losses[:5], tokens[:5])}, 10)


def test_chrf_of_resamples_is_computed_for_each(measured):
    weights = np.array([[1, 0, 0, 0], [0, 0, 2, 1]])
    scores = chrf_score(weights @ measured.chrf)
    assert scores[0] == pytest.approx(CHRF().corpus_score(ANSWERS[:1], [REFERENCES[:1]]).score)
    twice = [ANSWERS[2], ANSWERS[2], ANSWERS[3]], [[REFERENCES[2], REFERENCES[2], REFERENCES[3]]]
    assert scores[1] == pytest.approx(CHRF().corpus_score(*twice).score)


def test_distinct_has_no_sum(measured):
    with pytest.raises(KeyError):
        measured.additive("distinct_1")
    assert answer_metrics.MEANS


def test_rows_of_one_group_are_drawn_together():
    random = np.random.default_rng(2)
    per_group = random.normal(5, 2, 30)
    groups = np.repeat(np.arange(30), 10)
    repeated = answer_metrics.mean_of(per_group[groups])
    alone = bootstrap_sums({"a": answer_metrics.mean_of(per_group)}, 2000)["a"].std()
    together = bootstrap_sums({"a": repeated}, 2000, groups=groups)["a"].std()
    assert together == pytest.approx(alone, rel=0.1)
    # Ten copies of a row tell no more than one: without the groups the interval would be too narrow.
    assert bootstrap_sums({"a": repeated}, 2000)["a"].std() < alone / 2
