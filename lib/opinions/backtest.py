"""How well a detector would have done: planted surges found, how soon, and how often it cried wolf.

A planted surge turns documents of one topic and entity that are not negative into negative ones, each with the
probability that raises the expected share by `size`, from one bucket on for `hours`. An alert belongs to it when its
window ends after the surge began and began before the surge ended; the delay goes from the surge's begin to the end
of the bucket with which it was found. Every other alert is a false alarm.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from sqlalchemy import Engine

from lib import database
from lib.errors import ConfigError, DataError
from lib.opinions import store, watch
from lib.opinions.detect import Counts, scan, sliding
from lib.opinions.tables import Alert, Opinion
from lib.settings import MonitoringSettings, PlantSettings

APPLICATION = "replay"
Found = dict[tuple[str, str], list[int]]
"""Entity and topic → when the windows ended that were called surges, in seconds since 1970."""


@dataclass(frozen=True)
class Planted:
    """A surge from `begins` to `ends`, seconds since 1970."""

    entity: str
    topic: str
    begins: int
    ends: int


@dataclass(frozen=True)
class Outcome:
    planted: int
    delays: tuple[float, ...]
    """Hours, of those that were found."""
    false_alarms: int
    weeks: float
    """In which an alert could have been raised."""

    @property
    def found(self) -> float:
        return len(self.delays) / self.planted if self.planted else math.nan

    @property
    def delay(self) -> float:
        """Median, hours."""
        return float(np.median(self.delays)) if self.delays else math.nan

    @property
    def false_per_week(self) -> float:
        return self.false_alarms / self.weeks


@dataclass(frozen=True)
class Replay:
    """A history that was put through store and watch, and its counts."""

    alerts: list[Alert]
    counts: dict[tuple[str, str], tuple[Counts, Counts]]
    """Entity and topic → documents and negative ones, from `begins` in steps of a bucket."""
    begins: int
    rules: MonitoringSettings

    def found(self) -> Found:
        """What was alerted."""
        found: Found = {}
        for alert in self.alerts:
            found.setdefault((alert.entity, alert.topic), []).append(alert.ends)
        return found

    def by(self, detect: Callable[[Counts, Counts], Sequence[int]]) -> Found:
        """What another detector calls surges: buckets of a series' documents and negative ones."""
        step = self.rules.bucket_s
        return {
            series: [self.begins + (bucket + 1) * step for bucket in detect(*counts)]
            for series, counts in self.counts.items()
        }

    @property
    def weeks(self) -> float:
        length = max((len(documents) for documents, _ in self.counts.values()), default=0)
        hours = length * self.rules.bucket_minutes / 60 - self.rules.min_history_hours
        return max(hours, self.rules.bucket_minutes / 60) / 168


def replay(opinions: Sequence[Opinion], rules: MonitoringSettings) -> Replay:
    """Put documents through what serving does with them, in a database of their own, looked at once at the end: the
    detector sees of each bucket only what was before it."""
    silent = rules.model_copy(update={"webhooks": []})
    with tempfile.TemporaryDirectory() as folder:
        engine = database.engine(f"sqlite:///{folder}/replay.db")
        try:
            store.add(APPLICATION, sorted(opinions, key=lambda o: (o.time, o.id)), rules.negative, engine)
            step = rules.bucket_s
            begins = min(o.time for o in opinions) // step * step
            ends = (max(o.time for o in opinions) // step + 1) * step
            now = ends + rules.lateness_minutes * 60
            alerts = watch.look(APPLICATION, silent, now, engine)
            return Replay(alerts, _counts(engine, opinions, begins, ends, step), begins, rules)
        finally:
            engine.dispose()


def _counts(
    engine: Engine, opinions: Sequence[Opinion], begins: int, ends: int, step: int
) -> dict[tuple[str, str], tuple[Counts, Counts]]:
    series = sorted({(o.entity, o.topic) for o in opinions})
    with engine.connect() as db:
        return {one: store.counts(db, APPLICATION, *one, begins, ends, step) for one in series}


def plant(
    opinions: Sequence[Opinion], rules: MonitoringSettings, wanted: PlantSettings
) -> tuple[list[Opinion], list[Planted]]:
    """The documents with surges in them, and where those are: in series with enough documents for an alert, after a
    season of history, so far apart that the cool-down of one hides no other.

    Raises ConfigError when there is no room for so many, or a share cannot rise so much.
    """
    step, random = rules.bucket_s, np.random.default_rng(wanted.seed)
    length = rules.buckets(wanted.hours) * step
    apart = length + rules.buckets(rules.cooldown_hours + rules.window_hours) * step
    places = _room(opinions, rules, length)
    random.shuffle(places)
    planted: list[Planted] = []
    for entity, topic, begins in places:
        if len(planted) == wanted.surges:
            break
        near = [
            p for p in planted if (p.entity, p.topic) == (entity, topic) and abs(p.begins - begins) < apart
        ]
        if not near:
            planted.append(Planted(entity, topic, begins, begins + length))
    if len(planted) < wanted.surges:
        raise ConfigError(
            f"monitoring.replay.plant.surges: this history has room for {len(planted)}, not {wanted.surges}, in "
            f"series of {rules.min_documents} documents a window (monitoring.min_documents) after their first season"
        )
    return _turned(opinions, rules.negative, planted, wanted, random), planted


def _room(opinions: Sequence[Opinion], rules: MonitoringSettings, length: int) -> list[tuple[str, str, int]]:
    """Where a surge of `length` seconds may begin: entity, topic, seconds since 1970."""
    step, by_series = rules.bucket_s, dict[tuple[str, str], list[int]]()
    for o in opinions:
        by_series.setdefault((o.entity, o.topic), []).append(o.time)
    places: list[tuple[str, str, int]] = []
    for (entity, topic), times in sorted(by_series.items()):
        begin, end = min(times) // step, max(times) // step + 1
        documents = np.bincount(np.array(times) // step - begin, minlength=end - begin)
        if sliding(documents, rules.buckets(rules.window_hours)).mean() < rules.min_documents:
            continue
        first = begin + rules.buckets(max(rules.season_hours, rules.min_history_hours))
        places += [(entity, topic, bucket * step) for bucket in range(first, end - length // step)]
    return places


def _turned(
    opinions: Sequence[Opinion],
    negative: str,
    planted: list[Planted],
    wanted: PlantSettings,
    random: np.random.Generator,
) -> list[Opinion]:
    shares = {}
    for series in {(p.entity, p.topic) for p in planted}:
        share = float(np.mean([o.label == negative for o in opinions if (o.entity, o.topic) == series]))
        if share + wanted.size >= 1:
            raise ConfigError(
                f"monitoring.replay.plant.size {wanted.size:g}: of {' / '.join(filter(None, series))} "
                f"{share:.0%} are negative already"
            )
        shares[series] = wanted.size / (1 - share)
    chances = random.random(len(opinions))
    turned = []
    for opinion, chance in zip(opinions, chances.tolist(), strict=True):
        series = (opinion.entity, opinion.topic)
        inside = any((p.entity, p.topic) == series and p.begins <= opinion.time < p.ends for p in planted)
        if inside and opinion.label != negative and chance < shares[series]:
            opinion = replace(opinion, label=negative, score=1.0)
        turned.append(opinion)
    return turned


def judge(found: Found, planted: Sequence[Planted], rules: MonitoringSettings, weeks: float) -> Outcome:
    """Hold what was called a surge against what is one."""
    window = rules.buckets(rules.window_hours) * rules.bucket_s
    delays: list[float] = []
    true = 0
    for p in planted:
        of_it = [e for e in found.get((p.entity, p.topic), ()) if p.begins < e < p.ends + window]
        true += len(of_it)
        if of_it:
            delays.append((min(of_it) - p.begins) / 3600)
    alarms = sum(map(len, found.values()))
    return Outcome(len(planted), tuple(sorted(delays)), alarms - true, weeks)


def above(threshold: float, rules: MonitoringSettings) -> Callable[[Counts, Counts], list[int]]:
    """The rival: a share above one and the same threshold at all times, with the same windows, minimum volume, history
    and cool-down."""

    def detect(documents: Counts, negative: Counts) -> list[int]:
        width, cooldown = rules.buckets(rules.window_hours), rules.buckets(rules.cooldown_hours)
        windows, bad = sliding(documents, width), sliding(negative, width)
        over = (windows >= rules.min_documents) & (bad >= threshold * windows)
        over[: rules.buckets(rules.min_history_hours)] = False
        found: list[int] = []
        for bucket in np.flatnonzero(over).tolist():
            if not found or bucket >= found[-1] + cooldown:
                found.append(bucket)
        return found

    return detect


def calibrated(
    run: Replay, planted: Sequence[Planted], false_alarms: int, step: float = 0.01
) -> tuple[float, Outcome]:
    """The lowest fixed threshold that has no more false alarms than that, and what it comes to."""
    for threshold in np.arange(step, 1 + step, step):
        outcome = judge(run.by(above(float(threshold), run.rules)), planted, run.rules, run.weeks)
        if outcome.false_alarms <= false_alarms:
            return float(threshold), outcome
    raise DataError("no threshold has so few false alarms")  # above 1 there is none


def only(rule: str, rules: MonitoringSettings) -> Callable[[Counts, Counts], list[int]]:
    """Our detector with one of its rules, `z` or `cusum`."""
    off = {"z": {"cusum_limit": math.inf}, "cusum": {"z": math.inf}}[rule]
    alone = rules.model_copy(update=off)
    return lambda documents, negative: [surge.bucket for surge in scan(documents, negative, alone)]
