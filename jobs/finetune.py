"""Fine-tune a base model on a dataset: Ray Train workers, each with a DeepSpeed engine.

    python -m jobs.finetune --config jobs/configs/reviews.yaml [--training.epochs 2 ...]
    python -m jobs.finetune --config jobs/configs/reviews.yaml --training.resume RUN_ID

Reads the dataset that `jobs.preprocess` made of the same configuration, writes a run (curves, parameters,
environment) to the tracking database and the best checkpoint, as a model directory, to storage.

A worker or a node that is lost does not end a run: it goes on from its latest checkpoint, up to
`training.max_failures` times. After the driver itself was ended, `--training.resume RUN_ID` goes on with
the same run, and `--training.resume auto` with the latest unfinished one of this configuration (a new one
when there is none). Only where it is computed may change in between, such as `training.workers`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lib import storage, tracking
from lib.command import connect, joins_this_machine, main
from lib.data.plan import plan
from lib.planner.check import check
from lib.settings import Settings
from lib.tasks import check_behaviours, deciding_metric, judged
from lib.training import resume


def finetune(settings: Settings) -> None:
    check_behaviours(settings)  # the evaluation would refuse them, after hours
    training, dataset = settings.training, plan(settings, fresh=False).ref
    dataset.manifest()  # absent: one line, before Ray or a run is started
    resumed = resume.find(settings, dataset)
    if joins_this_machine() and not settings.training.ignore_plan and judged(settings.task) != "rankings":
        check(settings)
    connect()
    # Imported only now: ray reads its environment, which connect() completes, when it is first imported.
    from lib.training import curves
    from lib.training.fit import fit

    opened = tracking.resume_run(resumed, settings) if resumed else tracking.start_run("finetune", settings)
    with opened as run:
        run.tag(dataset=dataset.fingerprint)
        workers = " to ".join(map(str, sorted({training.least_workers, training.most_workers})))
        print(f"run {run.ref.id}: {workers} workers, ZeRO-{training.zero_stage}", flush=True)
        result = fit(settings, dataset, run)
        summary = result.summary
        run.log_dict(summary, "training.json")
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "curves.png"
            curves.draw(summary, deciding_metric(settings), picture)
            run.log_file(picture)
        run.log_metrics({f"memory/worker_{i}_peak_gib": m for i, m in enumerate(summary["peak_memory_gib"])})
        run.log_metrics({f"best/{k}": v for k, v in summary["best"].items()})
    speed = summary["tokens"] / max(summary["seconds"], 1e-9)
    print(
        f"trained {summary['rows']:,} rows, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({speed:,.0f} tokens/s, {summary['precision']}), {summary['steps']} steps"
        f"{', stopped early' if summary['stopped_early'] else ''}"
    )
    print(f"peak memory per worker: {', '.join(f'{m:.2f}' for m in summary['peak_memory_gib'])} GiB")
    print("best validation: " + "  ".join(f"{k} {v:.4g}" for k, v in summary["best"].items()))
    print(f"model: {result.model_uri}")
    for part in settings.data.parts:
        config = storage.join(result.model_uri, f"{part}.yaml").removeprefix("file://")
        print(f"part {part}, next: python -m jobs.evaluate --config {config}")
    if settings.data.parts:
        return
    print(f"next: python -m jobs.evaluate --config … --evaluation.run {run.ref.id}")


if __name__ == "__main__":
    main(finetune)
