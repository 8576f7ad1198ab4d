"""Measure a run's model on the test split, beside baselines computed in the same command.

    python -m jobs.evaluate --config jobs/configs/reviews.yaml [--evaluation.run RUN_ID ...]

Takes the latest finished fine-tuning run of this name, or the one given. A classifier is held against two
baselines, a chat model against its base before fine-tuning and against looked-up answers. Writes report.json, report.html,
the figures and every prediction under runs/RUN_ID/evaluation in storage, and metrics and figures to the
tracking database.
"""

from __future__ import annotations

import re
import shlex
import sys
import time

from lib import storage, tracking
from lib.artifacts import DatasetRef, EvalReport
from lib.command import connect, main
from lib.errors import RegistryError
from lib.evaluation import chat_report, text
from lib.evaluation import report as files
from lib.evaluation.before_after import measure as measure_answers
from lib.evaluation.classification import Measured, Subject, measure
from lib.evaluation.scoring import read_task, score, start_baselines
from lib.settings import Settings
from lib.tasks import judged

# What MLflow allows in the name of a metric.
METRIC_SAFE = re.compile(r"[^\w.\- ]")


def evaluate(settings: Settings) -> None:
    run = tracking.find_run(settings, "finetune", settings.evaluation.run)
    if not storage.published(run.ref.model_uri):
        raise RegistryError(
            f"run {run.ref.id} has left no model; choose a finished one with --evaluation.run (make ui lists them)"
        )
    info = read_task(run.ref.model_uri)
    dataset = DatasetRef(run.ref.name, info.dataset)
    manifest = dataset.manifest()
    subject = Subject(run.ref.name, run.ref.id, info.task, dataset.fingerprint, manifest["labels"])
    connect()
    began = time.perf_counter()
    print(f"scoring run {run.ref.id} on the test split of {dataset.name}/{dataset.fingerprint}")
    answers = judged(info.task) == "answers"
    of_kind = measure_answers if answers else measure_classes
    measured = of_kind(subject, run.ref.model_uri, dataset, settings)
    pages = chat_report if answers else files
    # The report of an earlier evaluation of the same run gives way to this one.
    with storage.publish(run.ref.evaluation_uri, replace=True) as folder:
        pages.write(measured, folder)
    record(run, measured.report)
    shown = chat_report.render(measured.report) if answers else text.render(measured.report)
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

    baselines = start_baselines(subject.task, dataset, len(subject.labels), settings.evaluation)
    scored = score(model_uri, dataset, "test", settings)
    print("waiting for the baselines")
    return measure(subject, scored, ray.get(baselines), settings.evaluation)


def record(run: tracking.Run, report: EvalReport) -> None:
    """Metrics, figures and the report's page in the run; its tag tells `jobs.promote` that it can be promoted."""
    values = {f"test/{METRIC_SAFE.sub('_', name)}": value for name, value in report.metrics.items()}
    for baseline, figures in report.baselines.items():
        shown = (report.deciding, *(figures if report.answers else ("macro_f1", "accuracy")))
        values |= {f"test/{baseline}/{name}": figures[name] for name in shown if name in figures}
    for label, figures in report.per_class.items():
        values[f"test/f1/{METRIC_SAFE.sub('_', label)}"] = figures["f1"]
    run.log_metrics(values)
    with storage.local_copy(run.ref.evaluation_uri) as folder:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".png", ".html", ".json"):
                run.log_file(file, "evaluation")
    run.tag(evaluated=report.dataset)


if __name__ == "__main__":
    main(evaluate)
