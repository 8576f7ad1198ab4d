"""What models answer, and one label of all that was said of a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from lib.data.labelling.deciding import Opinion, decide
from lib.data.labelling.models import Asking, by_tokens, by_words
from lib.data.labelling.studio import TIED
from lib.data.labelling.survey import Sampled
from lib.heads import laid_out
from lib.labels import MISSING
from lib.settings import ChatLabels
from tests.endpoints import Labeller


def shares(logits: np.ndarray | None) -> list[float]:
    assert logits is not None
    odds = np.exp(logits)
    return [round(float(value), 3) for value in odds / odds.sum()]


def told(*letters: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p)} for token, p in letters]
    return {"logprobs": {"content": [{"top_logprobs": top}]}}


def test_letters_are_read_from_the_first_token() -> None:
    assert shares(by_tokens(told((" B", 0.6), ("B", 0.1), ("A", 0.2), ("The", 0.1)), 3)) == [
        0.222,
        0.778,
        0.0,
    ]
    for nothing in (
        {},
        {"logprobs": None},
        {"logprobs": {"content": []}},
        told(("The", 0.9), ("I", 0.1)),
        told(("D", 1)),
    ):
        assert by_tokens(nothing, 3) is None


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("B 85", [0.15, 0.85]),
        ("**B** (85%)", [0.15, 0.85]),
        ("A, 100%", [1.0, 0.0]),
        ("The label is B.", [0.5, 0.5]),
        ("A text that complains: B 70", [0.3, 0.7]),
        ("B, since it is the 3rd sentence that I am most sure of, 90", [0.5, 0.5]),
    ],
)
def test_replies_in_words(reply: str, said: list[float]) -> None:
    assert shares(by_words(reply, 2)) == said


@pytest.mark.parametrize("reply", ["", "positive", "Z 90", "C 50", "A text of kind B"])
def test_a_reply_without_a_letter_says_nothing(reply: str) -> None:
    assert np.isnan(by_words(reply, 2)).all()


def test_a_chat_model_sees_the_labels_of_each_head_and_no_more_of_a_text_than_it_should() -> None:
    heads = laid_out([("mood", ["bad", "good"], 1.0), ("topic", ["size", "price", "colour"], 1.0)])
    described = [[["bad"], ["good"]], [["how it fits"], ["price"], ["the colour", "the pattern"]]]
    with Labeller("k", {"B": ["cheap"], "A": ["small"]}).up() as server:
        asked = ChatLabels(url=server.url, model="m", characters=20)
        found = Asking(asked, heads, described, SecretStr("k")).logits(["small " + "x" * 99, "cheap", "?"])
        assert [values.shape for values in found] == [(3, 2), (3, 3)]
        assert found[1].argmax(1)[:2].tolist() == [0, 1]
        assert np.isnan(found[1][2]).all()
        systems = {body["messages"][0]["content"] for body in server.seen}
        assert any(
            "A. size: how it fits\nB. price\nC. colour: the colour; the pattern\n" in s for s in systems
        )
        assert max(len(body["messages"][1]["content"]) for body in server.seen) == 20 + len(
            "<text>\n\n</text>"
        )


def opinion(name: str, *rows: tuple[float, float] | None) -> Opinion:
    likely = np.array([row or (0.5, 0.5) for row in rows])
    return Opinion(name, likely, np.array([row is not None for row in rows]))


def test_people_go_before_the_source_and_the_source_before_the_machine() -> None:
    #        agreed, sure   agreed, unsure   disagree      one speaks   none   gold   people  tied   people over gold
    rules = [(0.1, 0.9), (0.4, 0.6), (0.05, 0.95), (0.9, 0.1), None, (0.9, 0.1), (0.9, 0.1), (0.9, 0.1), None]
    model = [(0.2, 0.8), (0.3, 0.7), (0.6, 0.4), None, None, None, None, None, None]
    gold = np.array([MISSING] * 5 + [1, MISSING, MISSING, 0])
    people = np.array([MISSING] * 6 + [1, TIED, 1])
    found = decide(
        [opinion("rules", *rules), opinion("chat", *model)],
        gold,
        people,
        np.array([0.0] * 6 + [0.75, 0.5, 1.0]),
        0.8,
    )
    assert found.label.tolist() == [1, 1, 1, 0, MISSING, 1, 1, 0, 1]
    assert found.confidence == pytest.approx([0.85, 0.65, 0.675, 0.9, 0, 1, 0.75, 0.9, 1])
    assert found.sure.tolist() == [True, False, False, True, False, True, True, False, True]
    assert found.why.tolist() == [
        "",
        "not sure",
        "disagreement",
        "",
        "nothing known",
        "",
        "",
        "people disagree",
        "",
    ]
    assert found.by.tolist() == ["rules+chat"] * 3 + ["rules", "", "source", "people", "rules", "people"]


def test_without_anybody_nothing_is_known() -> None:
    nobody = np.full(2, MISSING)
    found = decide([], nobody, nobody, np.zeros(2), 0.0)
    assert not found.sure.any()
    assert found.why.tolist() == ["nothing known"] * 2


def test_logits_that_were_not_given_say_nothing() -> None:
    found = Opinion.of_logits("chat", np.array([[0.0, 2.0], [np.nan, np.nan]]), 2.0)
    assert found.speaks.tolist() == [True, False]
    assert found.likely[0] == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_a_sample_is_the_same_for_any_blocks() -> None:
    rows = [(f"{i * 7919 % 1000:03}", i) for i in range(1000)]
    whole, parts = Sampled(10), Sampled(10)
    whole.add(rows)
    for start in range(0, 1000, 13):
        parts.add(rows[start : start + 13])
    assert parts.rows == whole.rows == sorted(rows)[:10]
