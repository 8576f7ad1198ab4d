"""Surges of negative opinion in counts by time: a robust z-score over a seasonal baseline, and CUSUM.

T buckets of time; `documents` and `negative` are int arrays [T] of how many there were in each, NaN a float that is not
known. The windows of `monitoring.window_hours` slide by one bucket; a window is named by its last bucket.

Baseline. What is usual for window t is told by the windows at the same time of earlier seasons, t - s, t - 2s, …, of
which those count that have `min_documents`. Their share has the median m_1 and, around it, 1.4826 times the median
absolute deviation s_1 (MAD; the factor makes it a standard deviation for a normal distribution). While there are few
seasons, k of them, they are shrunk towards m_0 and s_0, the same of all windows of that time, as if these were
`shrinkage` = c seasons more: m = (k m_1 + c m_0) / (k + c), and s² likewise. Where fewer than MIN_WINDOWS windows are
full enough, m_0 is the share of all documents together and s_0 is 0. Windows that overlap the one that is judged are
left out.

z-score. (share - m) / max(s, e), the modified z-score of Iglewicz and Hoaglin ("How to Detect and Handle Outliers",
ASQC 1993), who take 3.5 as threshold; e = sqrt(p (1 - p) / n) is the binomial standard error of a share of n
documents, p = (m n + 1/2) / (n + 1), below which no share is steady.

CUSUM. C_t = max(0, C_{t-1} + u_t - k), a surge when C_t > h, then C = 0 again: the upper one-sided cumulative sum of
Page ("Continuous inspection schemes", Biometrika 41, 1954) in the tabular form of Montgomery ("Introduction to
Statistical Quality Control", chapter 9). u_t is how far the negative documents of bucket t alone lie above what is
usual, (x - n m) / sqrt(f n p (1 - p)), where f = max(1, (s / e)²) is how much more shares vary than chance would have
them. By Siegmund's approximation ("Sequential Analysis", 1985) of the average run length,
(exp(2k(h + 1.166)) - 2k(h + 1.166) - 1) / 2k², k = 0.5 and h = 8 have a false alarm each 19,000 buckets.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lib.settings import MonitoringSettings

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NORMAL = 1.4826
"""Standard deviation over MAD of a normal distribution: 1 / 0.6745."""
MIN_WINDOWS = 8
"""Windows that are full enough, for a median of them to say what is usual."""


@dataclass(frozen=True)
class Surge:
    """The window that ends with bucket `bucket`, and by which rules it is a surge."""

    bucket: int
    rules: tuple[str, ...]
    """`z`, `cusum` or both."""
    documents: int
    negative: int
    usual: float
    """m: the share of negative documents that was to be expected."""
    spread: float
    """max(s, e)."""
    z: float
    cusum: float

    @property
    def share(self) -> float:
        return self.negative / self.documents


def sliding(counts: Counts, width: int) -> Counts:
    """Sums [T] of the last `width` buckets up to each; before the first bucket there was nothing."""
    total = np.concatenate([[0], np.cumsum(counts)])
    ends = np.arange(1, len(counts) + 1)
    return np.asarray(total[ends] - total[np.maximum(ends - width, 0)], np.int64)


def robust(values: Floats) -> tuple[float, float]:
    """Median, and 1.4826 times the median absolute deviation from it. NaN for no values."""
    if not len(values):
        return math.nan, math.nan
    middle = float(np.median(values))
    return middle, NORMAL * float(np.median(np.abs(values - middle)))


def standard_error(usual: float, documents: int) -> float:
    """Binomial, of a share of `documents`; above 0 also for a `usual` of 0 and 1."""
    p = (usual * documents + 0.5) / (documents + 1)
    return math.sqrt(p * (1 - p) / documents)


def cusum(deviations: Floats, slack: float, limit: float) -> tuple[Floats, list[int]]:
    """C [T] before a reset, and where it went above `limit` and began at 0 again."""
    sums, above, found = 0.0, [], np.empty(len(deviations))
    for t, value in enumerate(deviations):
        sums = max(0.0, sums + float(value) - slack)
        found[t] = sums
        if sums > limit:
            above.append(t)
            sums = 0.0
    return found, above


@dataclass(frozen=True)
class Series:
    """A topic's and entity's counts, and their windows'."""

    documents: Counts
    negative: Counts
    windows: Counts
    window_negative: Counts
    shares: Floats
    """Of windows that have `min_documents`; NaN of the others."""

    @classmethod
    def of(cls, documents: Counts, negative: Counts, rules: MonitoringSettings) -> Series:
        width = rules.buckets(rules.window_hours)
        windows, window_negative = sliding(documents, width), sliding(negative, width)
        full = windows >= rules.min_documents
        shares = np.full(len(documents), np.nan)
        shares[full] = window_negative[full] / windows[full]
        return cls(documents, negative, windows, window_negative, shares)


def baseline(series: Series, t: int, rules: MonitoringSettings) -> tuple[float, float]:
    """m and s of window t; NaN while nothing came before it."""
    season, width = rules.buckets(rules.season_hours), rules.buckets(rules.window_hours)
    end = t - width + 1  # the first bucket that belongs to the window
    begin = max(0, t - season * rules.seasons)
    earlier = series.shares[begin : max(end, 0)]
    earlier = earlier[~np.isnan(earlier)]
    if len(earlier) >= MIN_WINDOWS:
        anytime, spread = robust(earlier)
    else:
        documents = int(series.documents[begin : max(end, 0)].sum())
        if not documents:
            return math.nan, math.nan
        anytime, spread = float(series.negative[begin:end].sum()) / documents, 0.0
    same = series.shares[t % season : t : season][-rules.seasons :]
    same = same[~np.isnan(same)]
    k, c = len(same), rules.shrinkage
    if not k:
        return anytime, spread
    seasonal, seasonal_spread = robust(same)
    usual = (k * seasonal + c * anytime) / (k + c)
    return usual, math.sqrt((k * seasonal_spread**2 + c * spread**2) / (k + c))


def scan(
    documents: Counts,
    negative: Counts,
    rules: MonitoringSettings,
    start: int = 0,
    known: Collection[int] = (),
) -> list[Surge]:
    """Surges of the buckets from `start` on.

    At the buckets in `known` there was an alert already: nothing is found there nor within the cool-down before and
    after it. The array has to begin `run_in` before `start`, or with the series.
    """
    series = Series.of(documents, negative, rules)
    cooldown, found = rules.buckets(rules.cooldown_hours), list[Surge]()
    spoken = np.array(sorted(known), np.int64)
    memory = rules.buckets(rules.season_hours) * rules.seasons
    # How many documents were there when a bucket's history has to have begun.
    before = sliding(documents, memory)
    sums = 0.0
    for t in range(max(start - cusum_memory(rules), rules.buckets(rules.min_history_hours)), len(documents)):
        if not before[t - rules.buckets(rules.min_history_hours)]:
            continue
        if ((spoken <= t) & (t < spoken + cooldown)).any():
            sums = 0.0
            continue
        usual, spread = baseline(series, t, rules)
        n, x = int(series.windows[t]), int(series.window_negative[t])
        if math.isnan(usual) or not n:
            continue
        error = standard_error(usual, n)
        if documents[t]:
            varies = max(spread, error) * math.sqrt(n * documents[t])  # sqrt(f n_t p (1 - p))
            sums = max(0.0, sums + (negative[t] - documents[t] * usual) / varies - rules.cusum_slack)
        z = (x / n - usual) / max(spread, error)
        fired = {"z": z >= rules.z, "cusum": sums > rules.cusum_limit}
        if not any(fired.values()) or n < rules.min_documents or x / n - usual < rules.min_rise:
            continue
        if ((t < spoken) & (spoken <= t + cooldown)).any():
            continue  # documents that came late tell of it sooner than it was told
        if t >= start:
            names = tuple(name for name, has in fired.items() if has)
            found.append(Surge(t, names, n, x, usual, max(spread, error), z, sums))
        spoken, sums = np.append(spoken, t), 0.0
    return found


def cusum_memory(rules: MonitoringSettings) -> int:
    """Buckets after which it does not matter where a CUSUM began: it was at 0 since, or above its limit."""
    return rules.buckets(rules.season_hours)


def run_in(rules: MonitoringSettings) -> int:
    """Buckets before the first that is judged, which `scan` has to see."""
    season, width = rules.buckets(rules.season_hours), rules.buckets(rules.window_hours)
    return season * rules.seasons + width + cusum_memory(rules)
