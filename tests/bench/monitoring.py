"""Surges of negative reviews: how many are found, how soon, and how often there is a false alarm.

    make bench-monitoring
    python -m tests.bench.monitoring --seeds 0 1 2 3 4

The texts, their departments (the topics) and their ratings (1 and 2 are negative) are the sample reviews', each once.
They have no times: these are drawn, with a seed, over WEEKS weeks. The rate follows the hour of the day (a cosine from
40% at 4 in the morning to 160% at 4 in the afternoon) and the day of the week (70% on Saturdays and Sundays); negative
reviews come three hours later in the day, so that the share of them has a season too. COPIES times one negative review
is spread in 40 copies within three hours, with a word or two before it: a story that counts once. Then surges are
planted (lib/opinions/backtest.py) and everything goes through `jobs.monitor`, with the default settings but for a
window of 12 hours, in which the two largest departments have 60 and 37 reviews.

The rival is a fixed threshold of the share, with the same windows, minimum volume and cool-down, chosen with hindsight:
the lowest that has no more false alarms than ours.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lib.opinions import backtest
from lib.opinions.backtest import Outcome
from lib.opinions.store import document_id
from lib.opinions.tables import Opinion
from lib.samples import sample_path
from lib.settings import MonitoringSettings, PlantSettings
from tests.bench.report import Report

WEEKS, COPIES = 12, 6
BEGIN = 2_900 * 604_800  # a Thursday, 0 o'clock
SIZES, SURGES, HOURS = (0.1, 0.2, 0.3), 10, 24
RULES = MonitoringSettings(window_hours=12)
TARGET = 1.0


def reviews() -> list[dict[str, Any]]:
    table = pq.read_table(sample_path("sample://reviews", "data"))
    rows = table.select(["Review Text", "Rating", "Department Name"]).to_pylist()
    return [row for row in rows if row["Review Text"] and row["Department Name"]]


def times(random: np.random.Generator, count: int, late: int) -> np.ndarray:
    """`count` times, int64 seconds since 1970, drawn from the rate of each hour; `late` hours later in the day."""
    hours = np.arange(WEEKS * 168)
    daily = 1 - 0.6 * np.cos((hours % 24 - 4 - late) / 24 * 2 * np.pi)
    weekend = np.isin(hours // 24 % 7, (2, 3))  # weeks begin on a Thursday
    rate = daily * np.where(weekend, 0.7, 1.0)
    drawn = random.choice(hours, count, p=rate / rate.sum())
    return BEGIN + drawn * 3600 + random.integers(3600, size=count)


def history(seed: int) -> list[Opinion]:
    random, rows = np.random.default_rng(seed), reviews()
    bad = np.array([row["Rating"] <= 2 for row in rows])
    when = np.where(bad, times(random, len(rows), 3), times(random, len(rows), 0))
    found = [
        opinion(row["Review Text"], row["Department Name"], int(at), is_bad)
        for row, at, is_bad in zip(rows, when, bad.tolist(), strict=True)
    ]
    for story in random.choice(np.flatnonzero(bad), COPIES, replace=False):
        row, begin = rows[story], int(times(random, 1, 0)[0])
        for copy in range(40):
            text = f"{['Seen', 'Shared', 'Read this'][copy % 3]}: {row['Review Text']}"
            found.append(opinion(text, row["Department Name"], begin + int(random.integers(10_800)), True))
    return found


def opinion(text: str, topic: str, time: int, bad: bool) -> Opinion:
    label = "negative" if bad else "positive"
    return Opinion(
        document_id(time, "web", "shop", text), time, "web", "shop", topic, label, float(bad), text
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.monitoring", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="by how much a share rises")
    arguments = parser.parse_args()
    report = Report("monitoring")
    for size in arguments.sizes:
        found: dict[str, list[Outcome]] = {}
        for seed in arguments.seeds:
            wanted = PlantSettings(surges=SURGES, size=size, hours=HOURS, seed=seed)
            documents, planted = backtest.plant(history(seed), RULES, wanted)
            run = backtest.replay(documents, RULES)
            ours = backtest.judge(run.found(), planted, RULES, run.weeks)
            found.setdefault("ours", []).append(ours)
            found.setdefault("fixed", []).append(backtest.calibrated(run, planted, ours.false_alarms)[1])
            for rule in ("z", "cusum"):
                detect = backtest.only(rule, RULES)
                found.setdefault(rule, []).append(backtest.judge(run.by(detect), planted, RULES, run.weeks))
            print(
                f"+{size:g}, seed {seed}: {len(documents):,} documents, {len(ours.delays)} of {SURGES} found",
                flush=True,
            )
        tell(report, size, {name: together(outcomes) for name, outcomes in found.items()})
    report.finish()


def together(outcomes: list[Outcome]) -> Outcome:
    return Outcome(
        sum(o.planted for o in outcomes),
        tuple(delay for o in outcomes for delay in o.delays),
        sum(o.false_alarms for o in outcomes),
        sum(o.weeks for o in outcomes),
    )


def tell(report: Report, size: float, found: dict[str, Outcome]) -> None:
    ours, fixed, case = found["ours"], found["fixed"], f"+{size:g} for {HOURS} h"
    rival = {"rival": "fixed threshold"}
    report.row(f"{case}: found", ours.found, unit="share", theirs=fixed.found, target=TARGET, **rival)
    report.row(
        f"{case}: median delay", ours.delay, unit="h", theirs=fixed.delay, higher_is_better=False, **rival
    )
    report.row(
        f"{case}: false alarms", ours.false_per_week, unit="a week", theirs=fixed.false_per_week,
        higher_is_better=False, **rival,
    )  # fmt: skip
    for rule, name in (("z", "z alone"), ("cusum", "CUSUM alone")):
        alone = found[rule]
        report.row(f"{case}: found, {name}", alone.found, unit="share")
        report.row(f"{case}: false alarms, {name}", alone.false_per_week, unit="a week")


if __name__ == "__main__":
    main()
