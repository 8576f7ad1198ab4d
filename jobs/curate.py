"""What users said of answers, as a source to train on: events and feedback → JSON Lines.

    python -m jobs.curate --config jobs/configs/reviews.yaml [--curation.days 30 ...]

Takes the events of the application that have feedback which teaches something: a label, a correction, a preferred
answer, or a rating of 0.5 and more, which confirms the answer that was given. The same rows make the same file. A
configuration of the task `preference` makes pairs of a chat application's events (`--curation.application support`), and one
of `recommend` a file of what users did (POST /v1/interactions), with the columns of its own source.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections import Counter

from lib import events, storage
from lib.artifacts import curated
from lib.command import main
from lib.errors import ConfigError, DataError
from lib.settings import Settings
from lib.tasks import learns_from_feedback, load_task


def curate(settings: Settings) -> None:
    able = learns_from_feedback()
    if settings.task not in able:
        raise ConfigError(
            f"task {settings.task} learns nothing from feedback (those that do: {', '.join(able)})"
        )
    task, application = load_task(settings.task), settings.curation.application or settings.name
    since = time.time() - settings.curation.days * 86_400 if settings.curation.days else 0.0
    if hasattr(task, "gathered"):
        lines = [
            json.dumps(row, ensure_ascii=False) for row in task.gathered(application, since, settings.data)
        ]
        if not lines:
            raise DataError(
                f"nobody did anything that {application} was told; it comes by POST /v1/interactions"
            )
        path = write(lines, settings)
        tell(["--data.format", "jsonl", "--data.source", path], settings)
        return
    counts: Counter[str] = Counter()
    rows: dict[str, None] = {}  # in the order of their events, each once
    columns: dict[str, None] = {}
    for event in events.read(application, since):
        counts["events"] += 1
        if event["feedback"] is None:
            continue
        counts["with feedback"] += 1
        if event["request"] is None or event["answer"] is None:
            counts["without words"] += 1
            continue
        learned = task.from_feedback(event)
        counts["that teach" if learned else "that teach nothing"] += 1
        columns |= {column: None for row in learned for column in row}
        rows |= {json.dumps(row, ensure_ascii=False): None for row in learned}
    print(", ".join(f"{number:,} {what}" for what, number in counts.items()) or "no events", flush=True)
    if not rows:
        raise DataError(
            f"no feedback on {application} teaches anything; it comes by POST /v1/feedback with label, correction, "
            "preferred or rating"
        )
    path = write(list(rows), settings)
    words = ["--data.source", path]
    for column in columns:
        words += [f"--data.columns.{column}", column]
    if settings.data.label_names:
        words += ["--data.labels", f"[{', '.join(settings.data.label_names)}]"]
    if settings.data.slices:
        words += ["--data.slices", "{}"]
    if settings.data.templates:  # its texts are whole already
        words += ["--data.templates", "{}"]
    tell(words, settings)


def tell(words: list[str], settings: Settings) -> None:
    """Say how the file is read, and write it down for jobs.retrain."""
    storage.write_json(curated(settings.name, "latest.json"), {"words": words})
    print(f"next         python -m jobs.preprocess --config … {shlex.join(words)}")


def write(lines: list[str], settings: Settings) -> str:
    """Rows as a file, named by what is in it; where it lies."""
    content = "".join(f"{line}\n" for line in lines).encode()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    path = curated(settings.name, name)
    storage.write_bytes(path, content)
    print(f"written to   {path}   ({len(lines):,} rows)")
    return path


if __name__ == "__main__":
    main(curate)
