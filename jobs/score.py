"""Files scored in batch by a registered model, through the predictor that serving uses: rows in, Parquet out.

    python -m jobs.score --config jobs/configs/reviews.yaml --score.source URI [--score.output URI]
                         [--score.model reviews@3] [--score.keep '{order: order_id}'] [--score.workers 4]

A row needs only what a request is made of, under `data.columns`: no label. The shards have a row for each of the
source, with `file`, `row`, the input, the columns of `score.keep`, the answer, and `problem` where there is none.
They appear whole, with a manifest, under scores/NAME/FINGERPRINT in storage or in `score.output`; the same files
scored by the same version are not scored again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lib import registry, storage
from lib.artifacts import TASK_FILE
from lib.command import connect, main
from lib.data.redact import told
from lib.data.scoring import build as scoring
from lib.data.scoring.plan import Planned, plan
from lib.errors import ModelError
from lib.evaluation.scoring import check_resources
from lib.settings import Settings


def score(settings: Settings) -> None:
    wanted = settings.score.model or f"{settings.name}@{registry.CHAMPION}"
    ref = registry.resolve(*registry.parse_reference(wanted))
    planned = plan(settings, str(ref), storage.checksum(storage.join(ref.uri, registry.VERSION_FILE)))
    task = storage.read_json(storage.join(ref.uri, TASK_FILE)).get("task")
    if task != planned.task:
        raise ModelError(f"{ref} is a {task} model, but task is {settings.task}; choose another score.model")
    manifest = planned.manifest()
    if manifest:
        print(f"scores {planned.fingerprint} are there already, of the same input and model: skipped")
    else:
        connect()
        check_resources(settings.score.workers, settings.serving, "score.workers")
        print(f"scoring {planned.reading.files[0].name} with {ref}", flush=True)
        manifest = scoring.run(planned, partial(registry.open_directory, ref.uri))
    report(planned, manifest)


def report(planned: Planned, manifest: dict[str, Any]) -> None:
    rows, seconds = manifest["rows"], manifest["seconds"]
    print(f"model        {manifest['model']} ({manifest['engine']})")
    print(f"rows         {rows:,} in {seconds:,.0f} s; {manifest['bad']['rows']:,} bad")
    if (redacted := manifest.get("redacted")) is not None:
        print(f"redacted     {told(redacted)}")
    for line in manifest["bad"]["first"]:
        print(f"  {line}")
    for name, counts in manifest["figures"].items():
        shown = ", ".join(f"{label} {number:,}" for label, number in counts.items())
        print(f"{name:12} {shown or 'none'}")
    print(f"written to   {storage.display(planned.uri)}")


if __name__ == "__main__":
    main(score)
