"""Rules: what they match, how they are weighed, what is told of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from lib.data.labelling import rules
from lib.data.labelling.rules import Tally, Voters
from lib.errors import ConfigError
from lib.heads import laid_out
from lib.settings import RuleSettings

HEAD = laid_out([("", ["bad", "fine", "good"], 1.0)])[0]


def rule(label: str = "good", name: str = "rule", **values: object) -> RuleSettings:
    given = values if "pattern" in values else {"keywords": ["x"], **values}
    return RuleSettings.model_validate({"name": name, "label": label, **given})


@pytest.mark.parametrize(
    ("words", "matching", "other"),
    [
        (["love"], ["I LOVE it", "love", "(love)", "such love!"], ["glove", "lovely", "love_it", "löve"]),
        (["too small"], ["it is too  small.", "Too\nsmall"], ["tool small", "too smaller"]),
        (["c++", "é"], ["in C++ or", "c++", "É"], ["c+", "café"]),
        (["退货"], ["我要退货。", "已经退货了"], ["退 货"]),
        (["XL号"], ["要xl号的", "XL号"], ["XXL号"]),
        (["a.b"], ["a.b"], ["axb"]),
    ],
)
def test_keywords_are_whole_words_where_words_are_apart(
    words: list[str], matching: list[str], other: list[str]
) -> None:
    found = rules.spoken(pa.array([*matching, *other, None, ""]), [rule(keywords=words)])[:, 0]
    assert found.tolist() == [True] * len(matching) + [False] * (len(other) + 2)


def test_patterns_are_re2() -> None:
    found = rules.spoken(
        pa.array(["Refund", "refunded 3", "none"]), [rule(pattern="(?i)refund"), rule(pattern=r"\d")]
    )
    assert found.tolist() == [[True, False], [True, True], [False, False]]
    with pytest.raises(
        ConfigError, match=r"pattern of 'x' is no regular expression of RE2 \(.*\); correct it"
    ):
        rules.check([rule(name="x", pattern="(?=ahead)")])
    with pytest.raises(ConfigError, match="'x' matches an empty text, and so all"):
        rules.check([rule(name="x", pattern="a*")])


def test_votes_weigh_as_their_rules_are_right() -> None:
    some = [rule("good", accuracy=0.9), rule("bad", accuracy=0.6), rule("bad", accuracy=0.6), rule("fine")]
    voters = Voters.of(some, HEAD)
    found = voters.probabilities(
        np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool), voters.given
    )
    assert found[0] == pytest.approx(1 / 3)
    assert found[1] == pytest.approx([0.05, 0.05, 0.9])
    # Bayes' rule by hand: bad .6 · .6 · .05, fine .2 · .2 · .05, good .2 · .2 · .9.
    assert found[2] == pytest.approx(np.array([0.018, 0.002, 0.036]) / 0.056)
    assert found[3].argmax() == 0


def planted(rows: int, accuracies: list[float], classes: int = 3) -> tuple[np.ndarray, np.ndarray, Voters]:
    """Truth int [rows], which rules speak, and the rules: two for each label, each right as often as `accuracies` say."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, classes, rows)
    votes = np.arange(len(accuracies)) % classes
    speaks = np.zeros((rows, len(accuracies)), bool)
    for place, (vote, accuracy) in enumerate(zip(votes, accuracies, strict=True)):
        # It speaks of 40% of its own label's rows, and of as many others as its accuracy leaves.
        own = truth == vote
        elsewhere = 0.4 * own.mean() * (1 - accuracy) / accuracy / (1 - own.mean())
        speaks[:, place] = rng.random(rows) < np.where(own, 0.4, elsewhere)
    return truth, speaks, Voters(list(range(len(votes))), votes, np.full(len(votes), 0.8), classes)


def test_accuracies_are_found_from_agreement_alone() -> None:
    accuracies = [0.9, 0.85, 0.9, 0.9, 0.45, 0.85, 0.5, 0.9, 0.9]
    truth, speaks, voters = planted(30_000, accuracies)
    found = voters.by_agreement(speaks)
    weak, good = found[[4, 6]], np.delete(found, [4, 6])
    assert weak.max() < good.min() - 0.15
    covered = speaks.any(1)

    def right(weighed: np.ndarray) -> float:
        chosen = voters.probabilities(speaks[covered], weighed).argmax(1)
        return float((chosen == truth[covered]).mean())

    assert right(found) > right(voters.given) + 0.01
    assert right(found) > right(np.array(accuracies)) - 0.01
    # In any order of the rows, and as far as it is known before, it is the same.
    assert voters.by_agreement(speaks[::-1]) == pytest.approx(found)


def test_what_nothing_is_known_of_stays_as_it_was_thought_before() -> None:
    _, speaks, voters = planted(3000, [0.9, 0.85, 0.9, 0.9, 0.6, 0.85])
    speaks[:, 4] = False
    found = voters.by_agreement(speaks)
    assert found[4] == voters.given[4]
    assert (np.delete(found, 4) != 0.8).all()
    two = Voters([0, 1], np.array([0, 1]), np.array([0.7, 0.8]), 2)
    assert two.by_agreement(speaks[:, :2]) is two.given
    right, spoke = np.array([30, 0]), np.array([40, 0])
    assert two.by_gold(right, spoke) == pytest.approx([37 / 50, 0.8])


def test_what_is_told_of_rules_adds_up_over_blocks() -> None:
    speaks = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]], bool)
    votes, gold = np.array([2, 2, 0]), np.array([2, 0, 1, -1, 2])
    whole = Tally.of(speaks, votes, gold)
    assert (whole.rows, whole.covered) == (5, 4)
    assert whole.spoke == [3, 2, 2]
    assert whole.overlaps == [2, 2, 2]
    assert whole.conflicts == [1, 1, 2]
    assert (whole.judged, whole.right) == ([2, 2, 2], [1, 2, 1])
    parts = Tally()
    for start, end in ((0, 2), (2, 2), (2, 5)):
        parts.add(Tally.of(speaks[start:end], votes, gold[start:end]))
    assert parts == whole
