"""What can be said of an answer beside its reference, and of all answers together.

`AnswerFigures` holds what each answer adds to a figure, so that figures over any part of the dialogues, and over
bootstrap resamples of them, come from the same numbers.

    rouge_l      F1 of the longest common subsequence of words (Lin 2004), rouge-score's, mean over answers
    chrf         character n-gram F-score of the corpus (Popović 2015), sacrebleu's chrF2, 0 to 100
    exact_match  share that equals the reference but for case and white space
    distinct_1, distinct_2   different words, pairs of words / all of them, over all answers (Li et al. 2016)
    repetition   1 - different / all runs of 4 words inside an answer (seq-rep-4: Welleck et al. 2020), mean
    refusals     share that matches a pattern of `evaluation.answers.refusals`
    cut          share that was ended by max_new_tokens

and of dialogues with passages of a knowledge base (`data.grounded`):

    grounded     share of an answer's words that the passages have (K-Precision: Adlakha et al. 2023), mean
    abstained    of dialogues for which no passage was found, share whose answer is a refusal
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.evaluation.intervals import Additive
from lib.evaluation.metrics import Floats

WORD = re.compile(r"[^\W_]+")
REPEATED = 4


class Words:
    """Lower-case words of any script; for ASCII text what rouge-score's own tokeniser gives."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


@dataclass(frozen=True)
class AnswerFigures:
    """Per answer; N answers."""

    rouge_l: Floats
    chrf: Floats
    """[N, 18]: hypothesis, reference and matching n-grams for each of 6 orders."""
    exact_match: Floats
    repetition: Floats
    refusals: Floats
    cut: Floats
    words: list[list[str]]
    tokens: Floats
    """Tokens of each answer, without the one that ends it."""
    grounded: Floats
    """NaN where there were no passages."""
    abstained: Floats
    """NaN where there were passages, or are none in all of the data."""

    def additive(self, metric: str) -> Additive:
        """The figure of this name as sums over answers. Raises KeyError for one that is not such (distinct-n), or that none
        of the answers has."""
        if metric == "chrf":
            return Additive(self.chrf, chrf_score)
        if metric in OF_SOME:
            values = getattr(self, metric)
            counted = ~np.isnan(values)
            if not counted.any():
                raise KeyError(metric)
            sums = np.stack([np.where(counted, values, 0.0), counted.astype(np.float64)], axis=1)
            return Additive(sums, lambda sums: np.asarray(sums[..., 0] / np.maximum(sums[..., 1], 1)))
        if metric not in MEANS:
            raise KeyError(metric)
        return mean_of(getattr(self, metric))

    @property
    def of_some(self) -> list[str]:
        """Those of OF_SOME that there are."""
        return [name for name in OF_SOME if not np.isnan(getattr(self, name)).all()]

    def part(self, rows: Sequence[int] | np.ndarray) -> AnswerFigures:
        """The figures of some answers."""
        chosen = np.asarray(rows, np.int64)
        numbers = {name: value[chosen] for name, value in vars(self).items() if name != "words"}
        return AnswerFigures(**numbers, words=[self.words[i] for i in chosen])

    def summary(self) -> dict[str, float]:
        """Every figure over these answers."""
        low, middle, high = np.quantile(self.tokens, [0.05, 0.5, 0.95])
        return {
            **{name: self.additive(name).value for name in ("rouge_l", "chrf", "exact_match")},
            **{f"distinct_{n}": distinct(self.words, n) for n in (1, 2)},
            **{name: self.additive(name).value for name in ("repetition", "refusals", "cut")},
            **{name: self.additive(name).value for name in self.of_some},
            "tokens_mean": float(self.tokens.mean()),
            "tokens_p5": float(low),
            "tokens_median": float(middle),
            "tokens_p95": float(high),
        }


MEANS = ("rouge_l", "exact_match", "repetition", "refusals", "cut")
OF_SOME = ("grounded", "abstained")
"""Means over some of the answers."""


def figures(
    answers: Sequence[str],
    references: Sequence[str],
    refusals: Sequence[str],
    tokens: Sequence[int],
    cut: Sequence[bool],
    passages: Sequence[str] | None = None,
) -> AnswerFigures:
    """Measure answers against references; `refusals` are regular expressions, matched without regard to case.
    `passages` is what each could rest on; empty where nothing was found."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in refusals]
    words = [Words().tokenize(answer) for answer in answers]
    pairs = list(zip(answers, references, strict=True))
    refused = np.array([float(any(p.search(answer) for p in patterns)) for answer in answers])
    texts = [""] * len(answers) if passages is None else list(passages)
    found = np.array([bool(text) for text in texts], bool)
    grounded = np.full(len(answers), np.nan)
    for i in np.flatnonzero(found):
        grounded[i] = precision(words[i], Words().tokenize(texts[i]))
    return AnswerFigures(
        rouge_l=np.array([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]),
        chrf=chrf_statistics(answers, references),
        exact_match=np.array([float(_plain(answer) == _plain(reference)) for answer, reference in pairs]),
        repetition=np.array([repetition(each) for each in words]),
        refusals=refused,
        cut=np.array(cut, np.float64),
        words=words,
        tokens=np.array(tokens, np.float64),
        grounded=grounded,
        abstained=np.where(found | (passages is None), np.nan, refused),
    )


def mean_of(values: Floats) -> Additive:
    return Additive(np.stack([values, np.ones(len(values))], axis=1), _ratio)


def perplexity_of(losses: Floats, tokens: Floats) -> Additive:
    """exp(summed negative log-likelihood / answer tokens): a mean over tokens, not over answers."""
    return Additive(np.stack([losses, tokens], axis=1), lambda sums: np.exp(_ratio(sums)))


def bits_per_byte_of(losses: Floats, size: Floats) -> Additive:
    """Bits to encode a byte of the answers' text: comparable between tokenisers, as perplexity is not."""
    return Additive(np.stack([losses / np.log(2), size], axis=1), _ratio)


def _ratio(sums: Floats) -> Floats:
    return np.asarray(np.divide(sums[..., 0], sums[..., 1]))


def chrf_statistics(answers: Sequence[str], references: Sequence[str]) -> Floats:
    """[N, 18] counts of sacrebleu's chrF2, in its order: for n = 1 to 6, n-grams of the answer, of the reference, common."""
    metric = _chrf()
    # sacrebleu resamples these counts itself for its own paired bootstrap; it has no public name for them.
    return np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), np.float64)


def chrf_score(sums: Floats) -> Floats:
    """chrF2, 0 to 100, from summed counts [..., 18]."""
    metric = _chrf()
    flat = sums.reshape(-1, sums.shape[-1])
    return np.array([metric._compute_f_score(row) for row in flat]).reshape(sums.shape[:-1])


def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def precision(words: Sequence[str], known: Sequence[str]) -> float:
    """Share of the words that are among the known ones, each as often as it is there; 1 for no words."""
    return (Counter(words) & Counter(known)).total() / len(words) if words else 1.0


def distinct(words: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams / all n-grams over all answers (Li et al. 2016); 0 where there are none."""
    grams = [gram for each in words for gram in _grams(each, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(words: Sequence[str]) -> float:
    """Share of the runs of 4 words of one answer that occurred in it before; 0 for a shorter one."""
    grams = list(_grams(words, REPEATED))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
