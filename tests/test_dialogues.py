"""Dialogues: every form becomes the same messages; what is wrong with one is told in words."""

from __future__ import annotations

import json

import pytest

from lib import dialogues
from lib.dialogues import MalformedError
from lib.errors import DataError
from lib.settings import DataSettings

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "My screen\nis black."},
    {"role": "assistant", "content": "Raise its brightness."},
]


def data(**values: object) -> DataSettings:
    return DataSettings.model_validate({"source": "x.jsonl", **values})


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": json.dumps(TALK)}),
        (
            "sharegpt",
            {
                "conversations": json.dumps(
                    [
                        {"from": "system", "value": "Be brief."},
                        {"from": "human", "value": " My screen\r\nis black. "},
                        {"from": "gpt", "value": "Raise its brightness."},
                        {"from": "human", "value": "Thanks"},
                    ]
                )
            },
        ),
        (
            "pair",
            {
                "question": "My screen\nis black.",
                "answer": "Raise its brightness.",
                "system": "Be brief.",
            },
        ),
        (
            "alpaca",
            {
                "instruction": "My screen\nis black.",
                "input": "",
                "output": "Raise its brightness.",
                "system": "Be brief.",
            },
        ),
    ],
)
def test_every_form_gives_the_same_messages(form: str, row: dict[str, str]) -> None:
    assert dialogues.form_of(row) == form
    assert dialogues.messages(row) == TALK


def test_the_input_of_alpaca_stands_behind_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Bildschirm", "output": "screen"}
    assert dialogues.messages(row)[0] == {"role": "user", "content": "Translate.\n\nBildschirm"}


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["id", "messages", "question", "answer"], {"messages": "messages"}),
        (["conversations"], {"conversations": "conversations"}),
        (["instruction", "output"], {"instruction": "instruction", "output": "output"}),
        (
            ["instruction", "input", "output", "system"],
            {"instruction": "instruction", "input": "input", "output": "output", "system": "system"},
        ),
        (["question", "answer"], {"question": "question", "answer": "answer"}),
    ],
)
def test_columns_tell_the_form(present: list[str], expected: dict[str, str]) -> None:
    assert dialogues.columns(data(), present) == expected


def test_a_named_form_is_taken_whatever_else_there_is() -> None:
    named = data(dialogue="pair", columns={"question": "q", "answer": "a"})
    assert dialogues.columns(named, ["messages", "q", "a"]) == {"question": "q", "answer": "a"}


def test_columns_of_no_form_are_refused_with_what_is_known() -> None:
    with pytest.raises(
        DataError, match=r"columns 'title', 'body' are those of no form; messages: messages; "
    ):
        dialogues.columns(data(), ["title", "body"])


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ("not json", "holds no list of turns"),
        ('{"role": "user"}', "holds no list of turns"),
        ([{"content": "x"}], "turn 1 has no 'role'"),
        ([{"role": "oracle", "content": "x"}], "turn 1 has the role 'oracle'; known are"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "turn 2 has the role 'tool'"),
        ([{"role": "user", "content": " "}], r"turn 1 \(user\) has no text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "turn 2"),
        ([{"role": "user", "content": "x"}], "has no turn of the assistant"),
        ([*TALK, {"role": "system", "content": "x"}], "turn 4 is a system message"),
    ],
)
def test_what_is_wrong_with_a_dialogue_is_told(turns: object, says: str) -> None:
    text = turns if isinstance(turns, str) else json.dumps(turns)
    with pytest.raises(MalformedError, match=says):
        dialogues.messages({"messages": text})


def test_what_says_nothing_is_empty_and_a_question_may_lack_its_answer() -> None:
    assert dialogues.messages({"messages": None}) == []
    assert dialogues.messages({"messages": "[]"}) == []
    assert dialogues.messages({"question": None, "answer": " "}) == []
    assert dialogues.messages({"question": "x", "answer": None}) == [{"role": "user", "content": "x"}]
    with pytest.raises(MalformedError, match="has an answer but no question: 'x'"):
        dialogues.messages({"question": "", "answer": "x"})


def test_cleaning_mends_the_encoding_and_keeps_the_lines() -> None:
    assert dialogues.clean("  def f():\r\n    return 'cafÃ©'\x00\n") == "def f():\n    return 'café'"
