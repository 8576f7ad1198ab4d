"""From texts to a labelled source on Ray Data, in two streaming passes over the source.

    survey  read, redact, match the rules      → how they fared, a sample of rows; from these accuracies and temperatures
    label   read again, ask rules and models   → shards of labelled rows, and of each block its least sure rows as tasks
    publish the shards, the tasks, and a report: all of it at once

What the driver holds goes by `label.sample`, `label.tasks` and the number of annotations, never by the number of rows.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import ray
import ray.data

from lib import storage, tracking
from lib.data import stream
from lib.data.labelling import studio
from lib.data.labelling.plan import FORMAT, REPORT, ROWS, Planned
from lib.data.labelling.rows import Fitted, Labeller, actors, label_block
from lib.data.labelling.rules import Tally, Voters
from lib.data.labelling.survey import Surveyed, check, fit, survey
from lib.errors import DataError

Say = Callable[[str], None]


@dataclass
class Labelled:
    """What the second pass wrote."""

    rows: int = 0
    by: dict[str, Counter[str]] = field(default_factory=dict)
    """Head → who → labelled rows."""
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    why: Counter[str] = field(default_factory=Counter)
    """Why rows are for people."""
    written: int = 0
    shards: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """Rows of the source that people have labelled."""
    tasks: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    """Row → how sure, and its task; a little more than are wanted."""


def build(planned: Planned, say: Say = print) -> dict[str, Any]:
    """Label and publish on the connected Ray cluster; the report. `say` gets progress lines.

    Raises DataError or ConfigError, in one line, for what cannot be read or asked; then nothing is published.
    """
    annotations = planned.read_annotations() if planned.annotations else studio.Annotations(planned.heads)
    packed = stream.source(planned.reading, planned.texts, planned.redaction, "survey")
    if planned.redaction and planned.redaction.names:  # its model reads the rows once, not at each pass
        packed = packed.materialize()
    say(f"reading {planned.reading.files[0].name}")
    surveyed = survey(planned, packed)
    check(planned, surveyed)
    say(f"read {surveyed.rows:,} rows")
    fitted, trial = fit(planned, surveyed)
    with storage.publish_from_workers(planned.uri) as uri:
        found = _label(planned, packed, fitted, annotations, uri, say)
        if found.rows != surveyed.rows:
            raise DataError(
                f"the source {planned.reading.files[0].name} changed while it was read; run again"
            )
        # Workers on other machines write to their own disk when the storage root is a plain local path.
        if set(found.shards) - set(storage.ls(storage.join(uri, ROWS))):
            raise DataError(
                f"{storage.display(uri)} lacks shards that workers wrote; WHORL_STORAGE must be a place "
                f"that all machines of the cluster share"
            )
        tasks = _chosen(found.tasks, planned.label.tasks)
        if tasks:
            storage.write_json(storage.join(uri, studio.TASKS), [task for _, task in tasks])
            config = studio.labelling_config(planned.heads)
            storage.write_bytes(storage.join(uri, studio.CONFIG), config.encode())
        report = _report(planned, surveyed, fitted, trial, annotations, found, len(tasks))
        storage.write_json(storage.join(uri, REPORT), report)
    return report


def _label(
    planned: Planned,
    packed: ray.data.Dataset,
    fitted: Fitted,
    annotations: studio.Annotations,
    uri: str,
    say: Say,
) -> Labelled:
    """Second pass, over the same packed blocks again."""
    work, said = (planned, fitted, uri), {"decided": (ray.put(annotations.decided()),)}
    if planned.label.embedding is None and planned.label.chat is None:
        counts = packed.map_batches(
            label_block,
            fn_args=work,
            fn_kwargs=said,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=stream.parallel_tasks()),
        )
    else:
        say("asking models")
        counts = packed.map_batches(
            Labeller, fn_constructor_args=work, fn_kwargs=said, **{**actors(planned), "batch_size": 1}
        )
    found = Labelled()
    for row in stream.rows_of(counts):
        block = json.loads(row["counts"])
        if "problem" in block:
            raise DataError(block["problem"])
        found.rows += block["rows"]
        found.written += block["written"]
        found.shards += block["shards"]
        found.why.update(block["why"])
        found.known.update(block["known"])
        for mine, theirs in ((found.by, block["by"]), (found.labels, block["labels"])):
            for head, more in theirs.items():
                mine.setdefault(head, Counter()).update(more)
        found.tasks |= {task["data"][studio.ROW]: (sure, task) for sure, task in block["tasks"]}
        if len(found.tasks) > 4 * planned.label.tasks + 100:
            kept = _chosen(found.tasks, planned.label.tasks)
            found.tasks = {task["data"][studio.ROW]: (sure, task) for sure, task in kept}
    return found


def _chosen(tasks: dict[str, tuple[float, dict[str, Any]]], most: int) -> list[tuple[float, dict[str, Any]]]:
    """The least sure first; of equals, the one of the least hash."""
    return heapq.nsmallest(most, tasks.values(), key=lambda pair: (pair[0], pair[1]["data"][studio.ROW]))


def _report(
    planned: Planned,
    surveyed: Surveyed,
    fitted: Fitted,
    trial: dict[str, dict[str, Any]],
    annotations: studio.Annotations,
    found: Labelled,
    tasks: int,
) -> dict[str, Any]:
    heads = {}
    for place, head in enumerate(planned.heads):
        name = studio.control(head)
        heads[name] = {
            "labels": {label: found.labels.get(name, Counter())[label] for label in head.labels},
            "by": dict(sorted(found.by.get(name, Counter()).items())),
            "rules": _rules(planned, place, surveyed.tallies.get(place, Tally()), fitted.accuracies[place]),
            "covered": surveyed.tallies.get(place, Tally()).covered,
            "temperatures": {
                model: round(t, 4) for (model, of), t in sorted(fitted.temperatures.items()) if of == place
            },
            "on_rows_with_a_label": trial.get(name, {}),
        }
    people: dict[str, Any] = {}
    if planned.annotations:
        decided = annotations.decided()
        people = {
            "tasks": annotations.tasks,
            "rows": len(decided),
            "not_in_the_source": len(set(decided) - found.known),
            "skipped": annotations.cancelled,
            "unanswered": annotations.unanswered,
            "agreement": annotations.agreement(),
        }
    return {
        "format": FORMAT,
        "name": planned.settings.name,
        "fingerprint": planned.fingerprint,
        "rows": surveyed.rows,
        "empty": surveyed.empty,
        "labelled": found.written,
        "unsure": dict(sorted(found.why.items())),
        "tasks": tasks,
        "heads": heads,
        "people": people,
        "sources": [file.name for file in planned.reading.files],
        "settings": planned.label.model_dump(mode="json"),
        "versions": tracking.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _rules(planned: Planned, place: int, tally: Tally, accuracies: np.ndarray) -> list[dict[str, Any]]:
    """Of each rule: shares of all rows on which it speaks, together with others and against others; its accuracy as it
    was taken, and as it is on rows that have a label."""
    voters = Voters.of(planned.label.rules, planned.heads[place])
    told = []
    for i, number in enumerate(voters.places):
        rule, rows = planned.label.rules[number], max(tally.rows, 1)
        told.append(
            {
                "name": rule.name,
                "label": rule.label,
                "rows": tally.spoke[i],
                "coverage": round(tally.spoke[i] / rows, 4),
                "overlap": round(tally.overlaps[i] / rows, 4),
                "conflict": round(tally.conflicts[i] / rows, 4),
                "accuracy_taken": round(float(accuracies[i]), 4),
                "judged": tally.judged[i],
                "accuracy": round(tally.right[i] / tally.judged[i], 4) if tally.judged[i] else None,
            }
        )
    return told
