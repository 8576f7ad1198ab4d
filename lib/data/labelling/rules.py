"""Weak labels: rules that vote, and what their votes weigh.

Rules are matched by RE2 through Arrow, on texts as models see them (`lib.text.normalise`). A rule is right with
probability a, its accuracy, where it speaks, and wrong evenly over the other labels. Of what several rules say, the likeliest
label is then that of the weighted majority, where a vote weighs log(a (C - 1) / (1 - a)) (Nitzan and Paroush 1982, "Optimal
decision rules in uncertain dichotomous choice situations"), and its probability is the confidence.

Accuracies are given, measured on rows that have a label, or estimated from how the rules agree, by the EM algorithm of
Dawid and Skene (1979, "Maximum likelihood estimation of observer error-rates"): labels are what nobody knows, and rules
speak independently of one another, more often of rows of their own label than of others. A rule votes for one label
alone, so what it answers is whether it speaks, and its error rates are two: how often it does of rows of its label, and of others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.alike.near import UNSPACED
from lib.errors import ConfigError
from lib.heads import Head
from lib.settings import RuleSettings

# What is thought of a rule beforehand counts as much as so many texts.
PRIOR_ROWS = 10.0
ROUNDS = 100
# Two rules that disagree may be wrong either of them.
LEAST_RULES = 3
# No rule is so good or so bad that one vote could not be outvoted.
LEAST, MOST = 0.01, 0.99
# What may stand beside a word: no letter, digit or mark, or one of a script that puts no spaces between words.
_BESIDE = r"[^\pL\pN\pM_]|[" + "".join(rf"\x{{{a:x}}}-\x{{{b - 1:x}}}" for a, b in UNSPACED) + "]"


def pattern_of(rule: RuleSettings) -> str:
    """A rule as RE2."""
    if rule.pattern is not None:
        return rule.pattern
    return "(?i)" + "|".join(_keyword(unicodedata.normalize("NFC", word)) for word in rule.keywords)


def _keyword(word: str) -> str:
    """A word or phrase with any blanks between its parts, bounded where the script puts spaces between words."""
    escaped = r"\s+".join(re.escape(part) for part in word.split())
    before = f"(?:^|{_BESIDE})" if _spaced(word.strip()[:1]) else ""
    after = f"(?:$|{_BESIDE})" if _spaced(word.strip()[-1:]) else ""
    return f"{before}{escaped}{after}"


def _spaced(character: str) -> bool:
    return character.isalnum() and not any(start <= ord(character) < end for start, end in UNSPACED)


def check(rules: Sequence[RuleSettings]) -> None:
    """Raises ConfigError for a pattern that RE2 does not take, or that matches what says nothing."""
    for rule in rules:
        try:
            matches = pc.match_substring_regex(pa.array([""]), pattern_of(rule))[0].as_py()
        except pa.ArrowInvalid as error:
            why = str(error).removeprefix("Invalid regular expression: ")
            raise ConfigError(
                f"label.rules: the pattern of {rule.name!r} is no regular expression of RE2 ({why}); correct it"
            ) from None
        if matches:
            raise ConfigError(f"label.rules: {rule.name!r} matches an empty text, and so all; correct it")


def spoken(texts: pa.Array, rules: Sequence[RuleSettings]) -> np.ndarray:
    """Bool [texts, rules]: which rules speak of which texts."""
    found = np.zeros((len(texts), len(rules)), bool)
    for place, rule in enumerate(rules):
        found[:, place] = np.asarray(pc.fill_null(pc.match_substring_regex(texts, pattern_of(rule)), False))
    return found


@dataclass(frozen=True)
class Voters:
    """The rules of one head."""

    places: list[int]
    """Among all rules."""
    votes: np.ndarray
    """int64 [rules]: the class that each votes for."""
    given: np.ndarray
    """float64 [rules]: accuracy that the configuration says."""
    classes: int

    @classmethod
    def of(cls, rules: Sequence[RuleSettings], head: Head) -> Voters:
        titles = [head.title(label) for label in head.labels]
        places = [place for place, rule in enumerate(rules) if rule.label in titles]
        votes = np.array([titles.index(rules[place].label) for place in places], np.int64)
        given = np.array([rules[place].accuracy for place in places])
        return cls(places, votes, given, len(head.labels))

    def probabilities(self, speaks: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
        """float64 [texts, classes] from which of these rules speak, bool [texts, rules]; even where none does."""
        return posterior(speaks, self.votes, accuracies, self.classes)

    def by_agreement(self, speaks: np.ndarray) -> np.ndarray:
        """Accuracies float64 [rules], estimated from texts whose label nobody knows: bool [texts, rules]. Those that are given,
        where fewer than three rules speak of enough to be told apart."""
        if (speaks.sum(0) > 0).sum() < LEAST_RULES:
            return self.given
        patterns, counts = np.unique(speaks, axis=0, return_counts=True)
        own = np.eye(self.classes, dtype=bool)[self.votes]
        likely = self.probabilities(patterns, self.given)
        accuracies = self.given
        for _ in range(ROUNDS):
            weights = likely * counts[:, None]
            shares = weights.sum(0) / weights.sum()
            # Rows that are of a rule's own label, and among them those of which it speaks.
            mine = weights[:, self.votes]
            hits, misses = (patterns * mine).sum(0), (patterns * (counts[:, None] - mine)).sum(0)
            of_own = np.clip((hits + 1) / (mine.sum(0) + 2), 1e-4, 1 - 1e-4)
            of_others = np.clip((misses + 1) / (counts.sum() - mine.sum(0) + 2), 1e-4, 1 - 1e-4)
            speaking = np.where(own, of_own[:, None], of_others[:, None])
            scores = patterns @ np.log(speaking) + ~patterns @ np.log(1 - speaking) + np.log(shares + 1e-9)
            likely = np.exp(scores - scores.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            before, accuracies = accuracies, _with_prior(hits, hits + misses, self.given)
            if np.abs(accuracies - before).max(initial=0) < 1e-5:
                break
        return accuracies

    def by_gold(self, right: np.ndarray, spoke: np.ndarray) -> np.ndarray:
        """Accuracies float64 [rules], from how often they were right of how often they spoke on rows with a label."""
        return _with_prior(right, spoke, self.given)


def _with_prior(right: np.ndarray, spoke: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The mean of a Beta distribution that begins as PRIOR_ROWS texts of the accuracy `given`."""
    accuracies: np.ndarray = (right + PRIOR_ROWS * given) / (spoke + PRIOR_ROWS)
    return accuracies


def posterior(speaks: np.ndarray, votes: np.ndarray, accuracies: np.ndarray, classes: int) -> np.ndarray:
    """P(class | votes) float64 [texts, classes], all classes alike likely before."""
    a = np.clip(accuracies, LEAST, MOST)
    weights = np.log(a * (classes - 1) / (1 - a))
    ballots = np.zeros((len(votes), classes))
    ballots[np.arange(len(votes)), votes] = weights
    scores = speaks.astype(float) @ ballots
    likely = np.exp(scores - scores.max(1, keepdims=True))
    shares: np.ndarray = likely / likely.sum(1, keepdims=True)
    return shares


@dataclass
class Tally:
    """How the rules of one head fared; adds up over blocks."""

    rows: int = 0
    covered: int = 0
    """Rows of which a rule speaks."""
    spoke: list[int] = field(default_factory=list)
    """Each rule → rows."""
    overlaps: list[int] = field(default_factory=list)
    """Of these, where another rule speaks too."""
    conflicts: list[int] = field(default_factory=list)
    """Of these, where another rule votes for another label."""
    judged: list[int] = field(default_factory=list)
    """Rows that have a label, of those where it speaks."""
    right: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, speaks: np.ndarray, votes: np.ndarray, gold: np.ndarray) -> Tally:
        """From bool [rows, rules] and the class of each row that has one, else below 0: int [rows]."""
        together = speaks.sum(1)
        each = [speaks[:, votes == vote].any(1) for vote in np.unique(votes)]
        labels = np.sum(each, axis=0) if each else np.zeros(len(speaks), int)
        judged = speaks & (gold >= 0)[:, None]
        return cls(
            len(speaks),
            int((together > 0).sum()),
            speaks.sum(0).tolist(),
            (speaks & (together > 1)[:, None]).sum(0).tolist(),
            (speaks & (labels > 1)[:, None]).sum(0).tolist(),
            judged.sum(0).tolist(),
            (judged & (votes == gold[:, None])).sum(0).tolist(),
        )

    def add(self, other: Tally) -> None:
        self.rows += other.rows
        self.covered += other.covered
        for name in ("spoke", "overlaps", "conflicts", "judged", "right"):
            mine, more = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(mine or [0] * len(more), more, strict=True)])
