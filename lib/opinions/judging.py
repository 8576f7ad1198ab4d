"""What a sentiment model's answer says about an opinion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lib.errors import ModelError
from lib.settings import MonitoringSettings


class Choice(Protocol):
    label: str


class Answer(Protocol):
    """`lib.tasks.sentiment.Answer`, which stands above."""

    label: str
    scores: dict[str, float]

    @property
    def heads(self) -> Mapping[str, Choice]: ...


def check(labels: list[str], rules: MonitoringSettings) -> None:
    """Raises ModelError when none of a model's labels is the negative one."""
    try:
        rules.check_labels(labels)
    except ValueError as error:
        raise ModelError(f"{error}; the model was trained on others") from None


def judged(answer: Answer, rules: MonitoringSettings) -> tuple[str, float, str]:
    """Label, probability of the negative label, and topic; empty where the model has no head for it.

    Raises ModelError when the model does not know the negative label.
    """
    check(list(answer.scores), rules)
    topic = answer.heads.get(rules.topic_head)
    return answer.label, answer.scores[rules.negative], topic.label if topic else ""
