"""Register a run's model as a version, and make it champion if it meets the gate.

    python -m jobs.promote --config jobs/configs/reviews.yaml [--promotion.run RUN_ID ...]

Takes the evaluated run that was trained last, or the one given. The gate: better than both baselines and than
the present champion, on the same test split. A candidate that does not meet it is registered all the same,
and the champion stays; with `--promotion.require true` the job then ends with exit code 3.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from lib import registry, storage, tracking
from lib.artifacts import DatasetRef, ModelRef, RunRef
from lib.command import connect, main
from lib.direction import lower_is_better
from lib.errors import ConfigError, GateError
from lib.evaluation import before_after, chat, rankings
from lib.evaluation import report as files
from lib.evaluation.classification import Measured, Subject, lead
from lib.evaluation.deciding import deciding
from lib.evaluation.metrics import DECIDING
from lib.evaluation.scoring import read_task, score
from lib.evaluation.several import measure_heads
from lib.evaluation.text import reports, table
from lib.registry import CANDIDATE, CHAMPION, Condition
from lib.settings import Settings
from lib.tasks import judged


def promote(settings: Settings) -> None:
    known = list(DECIDING)
    if (kind := judged(settings.task)) != "classes":
        known = list(chat.MAY_DECIDE if kind == "answers" else rankings.MAY_DECIDE)
    known += [f"{head}/{name}" for head in settings.data.heads for name in DECIDING]
    deciding(settings, known[0], known)
    run = tracking.find_run(settings, "finetune", settings.promotion.run, tag="evaluated")
    if run.ref.name != settings.name:
        raise ConfigError(
            f"run {run.ref.id} is of {run.ref.name!r}, not of {settings.name!r}; give its own --config"
        )
    run.ref.evaluation()  # absent: one line, before a version is made
    candidate = files.read(run.ref.evaluation_uri)
    ref = registry.register(run, candidate.report)
    registry.set_alias(ref, CANDIDATE)
    print(f"run {run.ref.id} is registered as {ref}: {ref.uri}")
    # Another promotion may move the champion while this one measures; then it is measured again.
    while not decide(settings, run, ref, candidate):
        print("the champion has changed meanwhile: comparing again")


def decide(settings: Settings, run: tracking.Run, ref: ModelRef, candidate: Measured) -> bool:
    """Compare with the present champion and act on it; False when that one has been replaced meanwhile.

    Raises GateError when the gate does not hold and must.
    """
    present = registry.champion(ref.name)
    if present == ref:
        print(f"{ref} is the champion already")
        print(f"next: {command('serve.deploy')}")
        return True
    rival = champion_measured(present, candidate, settings) if present else None
    conditions = registry.gate(candidate.report, rival.report if rival else None, settings.promotion)
    print(f"\n{gate_table(conditions)}\n")
    ahead: dict[str, Any] | None = None
    if rival:
        ahead, told = lead_over(rival, candidate, settings)
        print(f"{told.format(present)}")
    held = all(condition.holds for condition in conditions)
    if held and not registry.crown(ref, instead_of=present):
        return False
    registry.note(ref, gate="met" if held else "not met")
    run.log_dict(
        {
            "version": str(ref),
            "champion_before": str(present) if present else None,
            "met": held,
            "lead": ahead,
            "conditions": [{**vars(condition), "holds": condition.holds} for condition in conditions],
        },
        "promotion.json",
    )
    if held:
        print(f"{ref} is {CHAMPION} now" + (f", instead of {present}" if present else ""))
        print(f"next: {command('serve.deploy')}")
        return True
    missed = "; ".join(c.what for c in conditions if not c.holds)
    stays = f"{present} stays {CHAMPION}" if present else f"{ref.name} has no {CHAMPION} yet"
    if settings.promotion.require:
        raise GateError(f"{ref} does not meet the gate ({missed}); {stays}; train or evaluate another run")
    print(f"gate not met ({missed}): {stays}, {ref} is {CANDIDATE}")
    print(f"next: {command('jobs.finetune')}, with other data or settings")
    return True


def champion_measured(present: ModelRef, candidate: Measured, settings: Settings) -> Measured:
    """The champion on the candidate's test split: as it was measured then, if that was the same dataset."""
    lineage = registry.describe(present)
    report, earlier = candidate.report, RunRef(lineage["run"], present.name)
    if storage.published(earlier.evaluation_uri) and earlier.evaluation().dataset == report.dataset:
        return files.read(earlier.evaluation_uri)
    print(f"measuring the champion {present} on dataset {report.dataset}, which it was not measured on")
    with registry.open_version(present):
        info = read_task(present.uri)
    connect()
    dataset = DatasetRef(report.name, report.dataset)
    subject = Subject(present.name, lineage["run"], info.task, report.dataset, [])
    if (kind := judged(info.task)) != "classes":
        measure = before_after.measure if kind == "answers" else rankings.measure
        return measure(subject, present.uri, dataset, settings)
    scored = score(present.uri, dataset, "test", settings)
    labels = {one.head: one.labels for one in reports(report)}
    return measure_heads(subject, labels, scored, {}, settings.evaluation)


def lead_over(rival: Measured, candidate: Measured, settings: Settings) -> tuple[dict[str, Any], str]:
    """How far the candidate is ahead of the present champion, as a record and as a line about `{}`."""
    resamples = settings.evaluation.bootstrap
    metric = settings.promotion.metric or candidate.report.deciding
    kind = judged(candidate.report.task)
    if kind == "classes":
        found = lead(candidate.of(metric), rival.of(metric), resamples)
        return vars(found), f"macro-F1 above {{}}: {found}"
    value, *ends = (chat if kind == "answers" else rankings).lead(candidate, rival, resamples, metric)
    side = "lower is better" if lower_is_better(metric) else "higher is better"
    within = f" (95% interval {ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ""
    return {metric: value, "interval": ends}, f"{metric} beside {{}} ({side}): {value:+.4f}{within}"


def gate_table(conditions: list[Condition]) -> str:
    return table(
        ["gate", "candidate", "must be", "holds"],
        [
            [
                c.what,
                f"{c.value:.4f}",
                f"{bound(c)} {c.threshold:.4f}",
                "yes" if c.holds else "NO",
            ]
            for c in conditions
        ],
    )


def bound(condition: Condition) -> str:
    if condition.at_most:
        return "at most"
    return "below" if lower_is_better(condition.metric) else "above"


def command(module: str) -> str:
    return f"python -m {module} {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    main(promote)
