"""Behavioural tests: what is done to texts, and what counts as a failure."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from lib.artifacts import TaskFile
from lib.errors import ConfigError, RegistryError
from lib.evaluation import behaviours
from lib.registry import gate
from lib.settings import Behaviour, PromotionSettings
from tests.trained import make_measured

LABELS = ["negative", "positive"]
INFO = TaskFile("sentiment", LABELS, 32, "base", "0" * 16)
TEXTS = ["I do not like it.", "it's great, Anna!", "size 10 or 12", "ok"]


class Model:
    """Stands where the actors do: answers by a rule, so that each failure is known."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def map(self, call: Any, parts: Any) -> Any:
        for part in parts:
            column = part[1].column(0).to_pylist()
            yield np.array([row for value in column for row in self.rule(value)], np.float64)


def by_word(word: str) -> Any:
    """Positive exactly where a text holds the word."""
    return lambda text: [[0.0, 2.0]] if word in text else [[2.0, 0.0]]


def measured(
    behaviour: dict[str, Any], rule: Any, info: TaskFile = INFO, rows: pa.Table | None = None
) -> Any:
    wanted = Behaviour.model_validate({"name": "it", **behaviour})
    rows = rows if rows is not None else pa.table({"text": TEXTS})
    column = rows.column_names[0]
    behaviours._check(wanted, behaviours.heads.of_model(info), column)
    cases = behaviours._cases(wanted, rows, column)
    (found,) = behaviours.measure([cases], Model(rule), info)  # type: ignore[arg-type]
    return found


def changed(text: str, **behaviour: Any) -> str | None:
    change = behaviours.changes(Behaviour.model_validate({"name": "it", "kind": "invariance", **behaviour}))
    words = change(text.split(" "), np.random.default_rng(0))
    return " ".join(words) if words is not None else None


def test_what_is_done_to_a_text() -> None:
    assert changed("Great fit", change="upper_case") == "GREAT FIT"
    assert changed("Great fit", change="lower_case") == "great fit"
    assert changed("Great fit", change="swapped_case") == "gREAT FIT"
    assert changed("I do not like it's colour", change="contractions") == "I don't like it is colour"
    assert changed("Cannot say", change="contractions") == "Can't say"
    assert changed("nothing here", change="contractions") is None
    assert changed("fits", change="add", append="https://example.com 🙂") == "fits https://example.com 🙂"
    names = [["Anna", "Maria"], ["London", "Paris"]]
    assert changed("Anna, in London", change="replace", replace=names) == "Maria, in Paris"
    assert changed("nobody", change="replace", replace=names) is None
    number = changed("size 10", change="numbers")
    assert number is not None
    assert number != "size 10"
    assert len(number) == 7
    assert all(a != b for a, b in zip("10", number[5:], strict=True))
    misspelt = changed("comfortable", change="typos")
    assert misspelt is not None
    assert misspelt != "comfortable"
    assert sorted(misspelt) == sorted("comfortable")
    assert (misspelt[0], misspelt[-1]) == ("c", "e")
    assert changed("it is ok", change="typos") is None


def test_templates_are_filled_with_every_combination() -> None:
    texts = behaviours.filled(
        ["I {verb} the {thing}", "{verb}!"], {"verb": ["love", "like"], "thing": ["hat"]}
    )
    assert texts == ["I love the hat", "I like the hat", "love!", "like!"]


def test_invariance_fails_where_the_prediction_changes() -> None:
    found = measured({"kind": "invariance", "change": "upper_case"}, by_word("great"))
    assert (found["cases"], found["failures"], found["failure_rate"]) == (4, 1, 0.25)
    assert found["examples"] == [
        {"text": "IT'S GREAT, ANNA!", "before": "it's great, Anna!", "answer": "positive → negative"}
    ]
    assert (
        measured({"kind": "invariance", "change": "upper_case"}, lambda text: [[1.0, 0.0]])["failures"] == 0
    )


def test_direction_is_a_bound_on_the_change_of_a_score() -> None:
    given = {"kind": "directional", "append": "It is great.", "label": "positive"}
    up = measured({**given, "change_of_score": [0.3, 1]}, by_word("great"))
    assert up["failures"] == 1  # the text that was positive already
    assert measured({**given, "change_of_score": [-0.1, 1]}, by_word("great"))["failures"] == 0
    assert measured({**given, "change_of_score": [-1, 0.1]}, by_word("great"))["failures"] == 3


def test_minimum_fails_where_the_label_is_another() -> None:
    given = {"kind": "minimum", "templates": ["{it} great", "{it} bad"], "slots": {"it": ["a", "b"]}}
    found = measured({**given, "label": "positive"}, by_word("great"))
    assert (found["cases"], found["failures"]) == (4, 2)
    assert found["examples"][0]["answer"] == "negative 0.88, not positive"
    assert measured({**given, "label": "positive", "rows": 2}, by_word("great"))["cases"] == 2


def test_a_head_is_chosen_by_its_name() -> None:
    info = TaskFile(
        "sentiment",
        ["a/x", "a/y", "b/negative", "b/positive"],
        32,
        "base",
        "0" * 16,
        heads={
            "a": {"labels": ["x", "y"], "temperature": 1.0},
            "b": {"labels": LABELS, "temperature": 2.0},
        },
    )
    rule = lambda text: [[0.0, 1.0, *by_word("great")(text)[0]]]  # noqa: E731
    given = {"kind": "minimum", "templates": ["great"], "label": "positive", "head": "b"}
    assert measured(given, rule, info)["failures"] == 0
    wrong = measured({**given, "label": "negative"}, rule, info)
    assert wrong["examples"][0]["answer"] == "positive 0.73, not negative"  # at a temperature of 2
    with pytest.raises(ConfigError, match="no label 'x'"):
        measured({**given, "label": "x"}, rule, info)
    with pytest.raises(ConfigError, match="no head 'c'"):
        measured({**given, "head": "c"}, rule, info)


def test_words_keep_their_tags() -> None:
    info = TaskFile("tagging", ["O", "B-PER"], 32, "base", "0" * 16)
    rows = pa.table({"tokens": [["Anna", "ran"], ["they", "ran", "home"]]})
    by_case = lambda words: [[0.0, 1.0] if word.istitle() else [1.0, 0.0] for word in words]  # noqa: E731
    found = measured({"kind": "invariance", "change": "lower_case"}, by_case, info, rows)
    assert (found["cases"], found["failures"]) == (1, 1)  # the other is in lower case already
    assert found["examples"][0]["answer"] == "anna: B-PER → O"
    added = {"kind": "invariance", "change": "add", "prepend": "Anna said", "append": "Now"}
    assert measured(added, by_case, info, rows)["failures"] == 0
    with pytest.raises(ConfigError, match="invariance alone"):
        measured({"kind": "minimum", "templates": ["x"], "label": "O"}, by_case, info, rows)


def test_the_same_cases_each_time() -> None:
    rows = pa.table({"text": [f"comfortable garment number {i}" for i in range(50)]})
    wanted = Behaviour(name="typos", kind="invariance", change="typos", rows=10)
    first, again = (behaviours._cases(wanted, rows, "text") for _ in range(2))
    assert first.asked.equals(again.asked)
    assert first.asked.num_rows == 10


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"kind": "invariance"}, "invariance needs change"),
        ({"kind": "invariance", "change": "add"}, "invariance needs append or prepend"),
        ({"kind": "directional", "append": "x"}, "directional needs label"),
        ({"kind": "minimum", "label": "a"}, "minimum needs templates"),
        (
            {"kind": "minimum", "label": "a", "templates": ["{verbs}"], "slots": {"verb": ["x"]}},
            "no slot 'verbs'; did you mean 'verb'",
        ),
    ],
)
def test_what_a_behaviour_needs(behaviour: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Behaviour.model_validate({"name": "it", **behaviour})


def test_a_gate_holds_only_while_a_behaviour_fails_seldom() -> None:

    report = make_measured("1234", "0123456789abcdef", right=0.8).report
    one = {"name": "typos", "cases": 20, "failure_rate": 0.1}
    report = dataclasses.replace(report, behaviours=[one])
    for most, holds in ((0.1, True), (0.05, False)):
        (*_, last) = gate(report, None, PromotionSettings(behaviours={"typos": most}))
        assert (last.what, last.holds) == ("failures of typos", holds)
    with pytest.raises(RegistryError, match="behaviour 'case' was not measured"):
        gate(report, None, PromotionSettings(behaviours={"case": 0.1}))
    empty = dataclasses.replace(report, behaviours=[{**one, "cases": 0}])
    with pytest.raises(RegistryError, match="has no case in the test split"):
        gate(empty, None, PromotionSettings(behaviours={"typos": 0.1}))
