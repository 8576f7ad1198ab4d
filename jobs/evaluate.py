"""Measure a run's model on the test split, beside baselines computed in the same command.

    python -m jobs.evaluate --config jobs/configs/reviews.yaml [--evaluation.run RUN_ID ...]

Takes the latest finished fine-tuning run of this name, or the one given. A classifier is held against two
baselines, a chat model against its base before fine-tuning and against looked-up answers, a recommender against popularity and
transitions. Writes report.json, report.html,
the figures and every prediction under runs/RUN_ID/evaluation in storage, and metrics and figures to the
tracking database.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from dataclasses import replace

from lib import heads, storage, tracking
from lib.artifacts import DatasetRef, EvalReport
from lib.command import connect, main
from lib.errors import ConfigError, RegistryError
from lib.evaluation import behaviours, chat_report, rankings, rankings_report, text
from lib.evaluation import report as files
from lib.evaluation.before_after import measure as measure_answers
from lib.evaluation.classification import Measured, Subject
from lib.evaluation.scoring import read_task, score, scorers, start_baselines
from lib.evaluation.several import measure_heads
from lib.settings import Settings
from lib.tasks import check_behaviours, judged

PART_CONFIGS = "jobs.finetune told where: runs/RUN_ID/model/PART.yaml"
# What MLflow allows in the name of a metric.
METRIC_SAFE = re.compile(r"[^\w.\- ]")


def evaluate(settings: Settings) -> None:
    if settings.data.parts:
        raise ConfigError(f"a multitask run has a model for each part; give one's --config ({PART_CONFIGS})")
    run = tracking.find_run(settings, "finetune", settings.evaluation.run)
    if not storage.published(run.ref.model_uri):
        raise RegistryError(
            f"run {run.ref.id} has left no model; choose a finished one with --evaluation.run (make ui lists them)"
        )
    info = read_task(run.ref.model_uri)
    dataset = DatasetRef(run.ref.name, info.dataset)
    manifest = dataset.manifest()
    subject = Subject(run.ref.name, run.ref.id, info.task, dataset.fingerprint, [])
    kind = judged(info.task)
    check_behaviours(settings)
    connect()
    began = time.perf_counter()
    print(f"scoring run {run.ref.id} on the test split of {dataset.name}/{dataset.fingerprint}")
    measured = MEASURE[kind](subject, run.ref.model_uri, dataset, settings)
    pages = {"classes": files, "answers": chat_report, "rankings": rankings_report}[kind]
    # The report of an earlier evaluation of the same run gives way to this one.
    with storage.publish(run.ref.evaluation_uri, replace=True) as folder:
        pages.write(measured, folder)
    record(run, measured.report)
    shown = (text if kind == "classes" else pages).render(measured.report)  # type: ignore[attr-defined]
    print(f"\n{shown}\n")
    print(
        f"{manifest['splits']['test']['rows']:,} rows and the baselines in {time.perf_counter() - began:.0f} s"
    )
    # Without a choice, jobs.promote takes the run that was trained last.
    choice = f" --promotion.run {run.ref.id}" if settings.evaluation.run else ""
    print(f"report  {storage.join(run.ref.evaluation_uri, 'report.html')}")
    print(f"next    python -m jobs.promote {shlex.join(sys.argv[1:])}{choice}")


def measure_classes(subject: Subject, model_uri: str, dataset: DatasetRef, settings: Settings) -> Measured:
    """A classifier beside its baselines, which are fitted while it is loaded and run."""
    import ray

    info = read_task(model_uri)
    labels = {head.name: head.labels for head in heads.of_manifest(dataset.manifest())}
    baselines = start_baselines(subject.task, dataset, settings.evaluation)
    pool = scorers(model_uri, settings)
    cases = behaviours.prepare(settings.evaluation.behaviours, dataset, info)
    scored = score(model_uri, dataset, "test", settings, pool)
    behaved = behaviours.measure(cases, pool, info)
    print("waiting for the baselines")
    measured = measure_heads(subject, labels, scored, ray.get(baselines), settings.evaluation)
    return replace(measured, report=replace(measured.report, behaviours=behaved))


MEASURE = {"classes": measure_classes, "answers": measure_answers, "rankings": rankings.measure}


def record(run: tracking.Run, report: EvalReport) -> None:
    """Metrics, figures and the report's page in the run; its tag tells `jobs.promote` that it can be promoted."""
    values = {}
    for name, value in report.metrics.items():
        head, slash, metric = name.partition("/")
        inside = f"{head}/" if slash and head in (report.head, *report.others) else ""
        values[f"test/{inside}{METRIC_SAFE.sub('_', metric if inside else name)}"] = value
    for one in text.reports(report):
        for baseline, figures in one.baselines.items():
            inside = f"test/{one.head}/{baseline}" if one.head else f"test/{baseline}"
            shown = (report.deciding, *(("macro_f1", "accuracy") if report.labels else figures))
            values |= {f"{inside}/{name}": figures[name] for name in shown if name in figures}
        for label, figures in one.per_class.items():
            title = f"{one.head}/{METRIC_SAFE.sub('_', label)}" if one.head else METRIC_SAFE.sub("_", label)
            values[f"test/f1/{title}"] = figures["f1"]
    values |= {f"test/uncalibrated/{name}": value for name, value in report.uncalibrated.items()}
    values |= {f"test/failures/{b['name']}": b["failure_rate"] for b in report.behaviours}
    run.log_metrics(values)
    with storage.local_copy(run.ref.evaluation_uri) as folder:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".png", ".html", ".json"):
                run.log_file(file, "evaluation")
    run.tag(evaluated=report.dataset)


if __name__ == "__main__":
    main(evaluate)
