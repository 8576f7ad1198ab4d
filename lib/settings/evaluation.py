"""Keys of `evaluation` and `promotion`: how a model is measured, and when it becomes champion."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from lib.errors import nearest
from lib.settings.endpoint import EndpointSettings
from lib.settings.sections import Name, Positive, Section, Share


class Behaviour(Section):
    """One behavioural test of the model (`lib.evaluation.behaviours`)."""

    name: Name
    kind: Literal["invariance", "directional", "minimum"]
    """invariance: the prediction stays; directional: a label's score changes within bounds; minimum: templates
    whose label is known."""
    rows: Positive = 200
    """Rows of the test split, or filled templates, at most."""
    change: (
        Literal[
            "typos", "lower_case", "upper_case", "swapped_case", "contractions", "numbers", "replace", "add"
        ]
        | None
    ) = None
    """invariance: what is done to the text. `replace` takes words of `replace`, `add` what `append` and `prepend` hold."""
    replace: list[Annotated[list[str], Field(min_length=2)]] = []
    """Lists of words that may stand for one another, such as names."""
    append: str = ""
    prepend: str = ""
    change_of_score: tuple[float, float] = (-1.0, 1.0)
    """directional: least and most that the label's score may rise by; `[-0.1, 1]` must not fall by more than 0.1."""
    templates: list[str] = []
    """minimum: texts with `{slots}`."""
    slots: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    label: str | None = None
    """directional: whose score; minimum: what is right."""
    head: str = ""
    """Of a model with several heads; empty is the first."""

    @model_validator(mode="after")
    def _whole(self) -> Behaviour:
        added = bool(self.append or self.prepend)
        needed = {
            "invariance": {"change": self.change is not None},
            "directional": {"label": self.label is not None, "append or prepend": added},
            "minimum": {"label": self.label is not None, "templates": bool(self.templates)},
        }[self.kind]
        if self.change in ("replace", "add"):
            needed |= (
                {"replace": bool(self.replace)} if self.change == "replace" else {"append or prepend": added}
            )
        lacking = [key for key, given in needed.items() if not given]
        if lacking:
            raise ValueError(f"behaviour {self.name!r}: {self.kind} needs {', '.join(lacking)}")
        if self.change_of_score[0] > self.change_of_score[1]:
            raise ValueError(f"behaviour {self.name!r}: change_of_score must rise")
        for template in self.templates:
            for slot in re.findall(r"{(\w+)}", template):
                if slot not in self.slots:
                    raise ValueError(f"behaviour {self.name!r}: no slot {slot!r}{nearest(slot, self.slots)}")
        return self

    @property
    def what(self) -> str:
        """The test in a few words."""
        added = " … ".join(part for part in (self.prepend, self.append) if part)
        if self.kind == "minimum":
            return f"is {self.label}: {self.templates[0]}"
        if self.kind == "directional":
            low, high = self.change_of_score
            return f"{self.label} changes by {low:+g} to {high:+g} with “{added}”"
        return (
            f"same with “{added}”"
            if self.change == "add"
            else f"same with {(self.change or '').replace('_', ' ')}"
        )


REFUSALS = [
    r"^\W*(i'?m|i am|we'?re|we are) (very |so |really )?(sorry|afraid)\b",
    r"\b(i|we) (can'?t|cannot|can not|won'?t|will not|am unable to|'?m unable to|are unable to|'?m not able to|"
    r"am not able to) (help|assist|provide|answer|do|discuss|comply|fulfil|respond|offer|give|share|engage)\b",
    r"\b(i|we) (do not|don'?t) know\b",
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b",
    r"\bi (do not|don'?t) have (access|the ability|enough information|personal|information)\b",
]
"""Openings and phrases by which English models decline; apostrophes may be missing."""


class JudgeSettings(EndpointSettings):
    """A model behind an OpenAI-compatible endpoint that compares answers, each pair in both orders."""

    key_variable: str = "WHORL_JUDGE_KEY"
    """Environment variable that holds the key; empty for an endpoint that wants none."""
    pairs: Positive = 100
    """Generated answers that are judged at most."""


class AnswerSettings(Section):
    """How generated answers are measured: chat alone reads it."""

    dialogues: Positive = 200
    """Test dialogues, evenly spaced, whose last answer is generated. Perplexity is over all of the split."""
    max_new_tokens: Positive = 128
    batch: Positive = 16
    """Dialogues that are generated at a time, their prompts padded on the left."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: probabilities in fp32, answers in bf16 where the processor or GPU has it."""
    refusals: list[str] = REFUSALS
    """Regular expressions, matched without regard to case: an answer that has one counts as a refusal."""
    shown: Positive = 20
    """Conversations on the report's page."""
    judge: JudgeSettings | None = None

    @field_validator("refusals")
    @classmethod
    def _refusals(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return value


class EvaluationSettings(Section):
    """How a run's model is measured on the test split (`jobs.evaluate`)."""

    run: str | None = None
    """Run id; None takes the latest finished fine-tuning run of this name."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Resamples behind the confidence interval."""
    calibration_bins: Positive = 15
    tokens_per_batch: Positive = 8192
    workers: Positive = 1
    """Actors that score the test split, each with the engine that `serving` chooses."""
    baseline_rows: Positive = 200_000
    """Training rows, evenly spaced, that the TF-IDF baseline is fitted on at most."""
    behaviours: list[Behaviour] = []
    """What an answer must and must not depend on."""
    answers: AnswerSettings = AnswerSettings()
    logged_days: Annotated[float, Field(gt=0)] | None = None
    """recommend: estimate what the model would have earned in the place of those that answered in the last days, from what the
    application logged while it explored (`lib.evaluation.logged`)."""


class PromotionSettings(Section):
    """When a candidate becomes champion (`jobs.promote`)."""

    run: str | None = None
    """Run id; None takes the latest evaluated run of this name."""
    metric: str | None = None
    """None: the one that decided the evaluation: `macro_f1`, for chat `perplexity`."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """How much better than each baseline and the present champion the metric must be."""
    behaviours: dict[str, Share] = {}
    """Behaviour of `evaluation.behaviours` → the largest share of its cases that may fail."""
    require: bool = False
    """Fail (exit code 3) when the gate does not hold, instead of keeping the champion."""
    why: Annotated[str, Field(min_length=1, max_length=400)] = "by hand"
    """Written down by `jobs.rollback`."""
