"""Back-test the alerts on opinions: put a stored history through the detector that serving uses.

    python -m jobs.monitor --config jobs/configs/reviews.yaml --monitoring.replay.source history.jsonl
    python -m jobs.monitor --config jobs/configs/reviews.yaml --monitoring.replay.plant.surges 10 \\
        [--monitoring.replay.plant.size 0.2] [--monitoring.replay.plant.hours 12] [--monitoring.z 4]

The history is CSV, JSON Lines or Parquet with time, source, entity, text or label, and what it has of topic, id and
score (`monitoring.replay.columns`); rows without a label are put to the champion. Without a source it is what
POST /v1/opinions has left in the database. Prints the alerts that would have been raised; with `plant.surges` surges
are put into it first, and the table tells how many are found, how soon, and how often there is a false alarm, beside
the fixed threshold that has as few of them. Nothing is sent, and nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from lib import registry, storage
from lib.command import main
from lib.data.reading import readers, sources
from lib.errors import ConfigError, DataError
from lib.opinions import backtest, history
from lib.opinions.backtest import Outcome, Planted, Replay
from lib.opinions.judging import judged
from lib.opinions.tables import Opinion
from lib.opinions.webhooks import iso
from lib.settings import MonitoringSettings, Settings

OPTIONAL = ("id", "topic", "text", "label", "score")
SHOWN = 50
TOGETHER = 256


def monitor(settings: Settings) -> None:
    rules = settings.monitoring
    if rules is None:
        raise ConfigError("monitoring is missing; add `monitoring: {}` to the configuration")
    began = time.perf_counter()
    opinions = score(read(settings, rules), settings, rules)
    if not opinions:
        raise DataError(
            f"there are no opinions on {settings.name}; they come by POST /v1/opinions, or name a file with "
            "--monitoring.replay.source"
        )
    if not any(opinion.label == rules.negative for opinion in opinions):
        raise DataError(f"no document has the label {rules.negative!r} (monitoring.negative)")
    wanted, planted = rules.replay.plant, list[Planted]()
    if wanted.surges:
        opinions, planted = backtest.plant(opinions, rules, wanted)
    run = backtest.replay(opinions, rules)
    took = time.perf_counter() - began
    series = len(run.counts)
    print(
        f"{len(opinions):,} documents, {series} topics and entities, {run.weeks:.1f} weeks, in {took:.0f} s\n"
    )
    print(table(run, planted) if planted else alerts(run))


def read(settings: Settings, rules: MonitoringSettings) -> list[Opinion]:
    """The history, as it is."""
    if rules.replay.source is None:
        return list(history.stored(settings.name))
    given = rules.replay.source
    files = sources.find_files([given] if isinstance(given, str) else given, key="monitoring.replay.source")
    return [opinion for file in files for opinion in _rows(file, rules)]


def _rows(file: sources.SourceFile, rules: MonitoringSettings) -> Iterator[Opinion]:
    columns, present = rules.replay.columns.model_dump(), readers.column_names(file)
    needed = {name: columns[name] for name in ("time", "source", "entity")}
    if columns["text"] not in present and columns["label"] not in present:
        needed["label"] = columns["label"]
    for name, column in needed.items():
        if column not in present:
            raise DataError(
                f"{file.name} has no column {column!r} (monitoring.replay.columns.{name}; columns: {', '.join(present)})"
            )
    names = [name for name, column in columns.items() if name in needed or column in present]
    row = 0
    for table in readers.read_tables(file, [columns[name] for name in names], 10_000):
        for values in table.rename_columns(names).to_pylist():
            row += 1
            yield history.opinion(values, f"{file.name} row {row}", rules.negative)


def score(opinions: list[Opinion], settings: Settings, rules: MonitoringSettings) -> list[Opinion]:
    """The opinions, with the champion's label where they had none."""
    from lib.tasks import sentiment

    bare = [place for place, opinion in enumerate(opinions) if not opinion.label]
    if not bare:
        return opinions
    name, _, version = (settings.serving.model or f"{settings.name}@{registry.CHAMPION}").partition("@")
    with storage.local_copy(registry.resolve(name, version).uri) as folder:
        predictor = sentiment.load(folder, settings.serving)
        print(f"{len(bare):,} documents have no label; {name}@{version} is asked", flush=True)
        for begin in range(0, len(bare), TOGETHER):
            some = bare[begin : begin + TOGETHER]
            request = sentiment.Request(inputs=[opinions[place].text for place in some])
            answers = sentiment.predict(predictor, request).results
            for place, answer in zip(some, answers, strict=True):
                label, negative, topic = judged(answer, rules)
                opinion = opinions[place]
                opinions[place] = replace(opinion, label=label, score=negative, topic=opinion.topic or topic)
    return opinions


def table(run: Replay, planted: list[Planted]) -> str:
    """What came of the planted surges, by our detector, each of its rules alone, and the best fixed threshold."""
    rules, weeks = run.rules, run.weeks
    ours = backtest.judge(run.found(), planted, rules, weeks)
    threshold, fixed = backtest.calibrated(run, planted, ours.false_alarms)
    rows = [("z and CUSUM", ours)]
    for name, rule in (("z alone", "z"), ("CUSUM alone", "cusum")):
        rows.append((name, backtest.judge(run.by(backtest.only(rule, rules)), planted, rules, weeks)))
    rows.append((f"share above {threshold:.2f}", fixed))
    head = f"{'':<18}{'found':>12}{'median delay':>15}{'false alarms a week':>21}"
    return "\n".join([head, *(_line(*row) for row in rows)])


def _line(name: str, outcome: Outcome) -> str:
    found = f"{len(outcome.delays)} of {outcome.planted}"
    delay = f"{outcome.delay:.1f} h" if outcome.delays else "-"
    return f"{name:<18}{found:>12}{delay:>15}{outcome.false_per_week:>21.2f}"


def alerts(run: Replay) -> str:
    """The alerts of a history as it is."""
    if not run.alerts:
        return "no alerts"
    found = sorted(run.alerts, key=lambda alert: alert.ends)
    lines = [f"{'window ends':<22}{'negative':>12}{'share':>8}{'usual':>8}{'z':>7}{'CUSUM':>8}  of"]
    for alert in found[:SHOWN]:
        of = " / ".join(filter(None, (alert.entity, alert.topic)))
        lines.append(
            f"{iso(alert.ends):<22}{f'{alert.negative} of {alert.documents}':>12}{alert.share:>8.2f}"
            f"{alert.usual:>8.2f}{alert.z:>7.1f}{alert.cusum:>8.1f}  {of}"
        )
    if len(found) > SHOWN:
        lines.append(f"… and {len(found) - SHOWN:,} more")
    lines.append(f"\n{len(found):,} alerts, {len(found) / run.weeks:.2f} a week")
    return "\n".join(lines)


if __name__ == "__main__":
    main(monitor)
