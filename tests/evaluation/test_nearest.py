"""The looked-up answers."""

from __future__ import annotations

from lib.evaluation.nearest import nearest


def test_the_answer_of_the_nearest_question(monkeypatch):
    questions = ["my router is slow", "how do I print a page", "the screen stays black"]
    answers = ["restart it", "press print", "plug it in"]
    asked = ["Screen is black", "print pages how?", "why is the router so slow"]
    found = nearest(questions, answers, asked)
    assert found.answers == ["plug it in", "press print", "restart it"]
    assert "3 training questions" in found.how
    monkeypatch.setattr("lib.evaluation.nearest.CELLS_AT_ONCE", 1)  # one question at a time
    assert nearest(questions, answers, asked).answers == found.answers


def test_questions_without_a_word():
    assert nearest(["?", "!"], ["a", "b"], ["what"]).answers == ["a"]
