"""What users said of answers, as a source to train on: events and feedback → JSON Lines.

    python -m jobs.curate --config jobs/configs/reviews.yaml [--curation.days 30 ...]

Takes the events of the application that have feedback which teaches something: a label, a correction, a preferred
answer, or a rating of 0.5 and more, which confirms the answer that was given. The same rows make the same file. A
configuration of the task `preference` makes pairs of a chat application's events (`--curation.application support`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter

from lib import events, storage
from lib.command import main
from lib.errors import ConfigError, DataError
from lib.settings import Settings
from lib.tasks import learns_from_feedback, load_task

COLUMNS = {
    "sentiment": "--data.columns.text text --data.columns.label label",
    "chat": "--data.columns.messages messages",
    "preference": "--data.columns.prompt prompt --data.columns.chosen chosen --data.columns.rejected rejected",
}


def curate(settings: Settings) -> None:
    able = learns_from_feedback()
    if settings.task not in able:
        raise ConfigError(
            f"task {settings.task} learns nothing from feedback (those that do: {', '.join(able)})"
        )
    application = settings.curation.application or settings.name
    since = time.time() - settings.curation.days * 86_400 if settings.curation.days else 0.0
    counts: Counter[str] = Counter()
    rows: dict[str, None] = {}  # in the order of their events, each once
    for event in events.read(application, since):
        counts["events"] += 1
        if event["feedback"] is None:
            continue
        counts["with feedback"] += 1
        for row in learned(settings.task, event, counts):
            rows[json.dumps(row, ensure_ascii=False)] = None
    print(", ".join(f"{number:,} {what}" for what, number in counts.items()) or "no events", flush=True)
    if not rows:
        raise DataError(
            f"no feedback on {application} teaches anything; it comes by POST /v1/feedback with label, correction, "
            "preferred or rating"
        )
    content = "".join(f"{line}\n" for line in rows).encode()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    path = storage.join(storage.root(), "curated", settings.name, name)
    storage.write_bytes(path, content)
    print(f"written to   {path}   ({len(rows):,} rows)")
    labels = f" --data.labels '[{', '.join(settings.data.label_names)}]'" if settings.data.label_names else ""
    if settings.data.slices:
        labels += " --data.slices {}"
    print(
        f"next         python -m jobs.preprocess --config … --data.source {path} {COLUMNS[settings.task]}{labels}"
    )


def learned(task: str, event: dict[str, object], counts: Counter[str]) -> list[dict[str, object]]:
    """The rows of one event; none of one whose words were not kept."""
    try:
        rows: list[dict[str, object]] = load_task(task).from_feedback(event)
    except (KeyError, TypeError, IndexError, AttributeError):
        counts["without words, or of another form"] += 1
        return []
    counts["that teach nothing" if not rows else "that teach"] += 1
    return rows


if __name__ == "__main__":
    main(curate)
