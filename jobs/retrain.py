"""A round of what users said: feedback → source → dataset → checkpoint → figures → champion → endpoint.

    python -m jobs.retrain --config jobs/configs/reviews.yaml [--dotted.key value ...]

`jobs.curate`, and then `jobs.pipeline` on the source that it made; the gate decides whether what comes out answers. Where
nobody has said anything there is nothing to do. Kubernetes runs it each night (k8s/base/retrain.yaml).
"""

from __future__ import annotations

import subprocess
import sys
import time

from lib import events, storage
from lib.artifacts import curated
from lib.command import main
from lib.settings import Settings
from lib.tasks import load_task


def retrain(settings: Settings) -> None:
    if not said_anything(settings):
        print("nobody has said anything of the answers yet: nothing to learn from, and the champion stays")
        return
    run("jobs.curate")
    # How the file that it made is read; said last, these words hold.
    run("jobs.pipeline", *storage.read_json(curated(settings.name, "latest.json"))["words"])


def said_anything(settings: Settings) -> bool:
    """Whether there is an event with feedback; what users did (`recommend`) jobs.curate looks for itself."""
    if hasattr(load_task(settings.task), "gathered"):
        return True
    application, days = settings.curation.application or settings.name, settings.curation.days
    since = time.time() - days * 86_400 if days else 0.0
    return any(event["feedback"] is not None for event in events.read(application, since))


def run(module: str, *more: str) -> None:
    """Run a job on the words that this one was given; its exit code is ours where it fails."""
    code = subprocess.run([sys.executable, "-m", module, *sys.argv[1:], *more]).returncode
    if code:
        print(f"stopped: {module} ended with exit code {code}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main(retrain)
