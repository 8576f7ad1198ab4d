"""Label texts that have no labels: by rules, by models, and by people where these are not sure.

    python -m jobs.label --config jobs/configs/tickets.yaml [--label.annotations export.json ...]

Takes the source of `data.source` and the labels of `data.labels` or `data.heads`, and writes labelled rows that
jobs.preprocess reads, tasks that Label Studio imports for the rows that are least sure, and a report, under
labelled/NAME/FINGERPRINT in storage. What people have said goes back in by `label.annotations`. The fingerprint stands
for the source's content, the annotations and the configuration: what is there is not made again.
"""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from lib import storage
from lib.command import connect, main
from lib.data.labelling import models
from lib.data.labelling.plan import REPORT, ROWS, Planned, plan
from lib.data.labelling.studio import CONFIG, TASKS
from lib.data.reading.shapes import of_source
from lib.settings import Settings
from lib.tasks import load_task


def label(settings: Settings) -> None:
    planned = plan(settings)
    try:
        tell(planned, made(planned))
    finally:
        planned.forget()


def made(planned: Planned) -> dict[str, Any]:
    """The report of the labelled source, which is made if it is not there."""
    if planned.exists():
        print(f"labels {planned.fingerprint} are there already, of the same source and config: skipped")
        report: dict[str, Any] = storage.read_json(storage.join(planned.uri, REPORT))
        return report
    models.check(planned.label.chat, planned.key)
    connect()
    from lib.data.labelling.build import build  # imports ray

    return build(planned)


def tell(planned: Planned, report: dict[str, Any]) -> None:
    print(f"fingerprint  {report['fingerprint']}")
    unsure = ", ".join(f"{rows:,} {why}" for why, rows in report["unsure"].items())
    print(
        f"rows read    {report['rows']:,}; {report['labelled']:,} labelled, {report['empty']:,} empty"
        f"{f'; for people: {unsure}' if unsure else ''}"
    )
    for name, head in report["heads"].items():
        for line in _head(name, head, report["rows"]):
            print(line)
    for name, said in report["people"].get("agreement", {}).items():
        print(
            f"people       {name}: {said['rows']:,} rows by {said['annotators']} annotators, "
            f"{said['labelled_by_several']:,} by several; kappa {_figure(said['kappa'])}, "
            f"alpha {_figure(said['alpha'])}"
        )
    if report["people"].get("not_in_the_source"):
        print(
            f"             {report['people']['not_in_the_source']:,} of the annotated rows are not in the source"
        )
    print(f"written to   {storage.display(planned.uri)}")
    _next(planned, report)


def _head(name: str, head: dict[str, Any], rows: int) -> list[str]:
    lines = [
        f"{name:12} " + (", ".join(f"{label} {n:,}" for label, n in head["labels"].items() if n) or "none")
    ]
    if head["by"]:
        lines.append(f"{'':12} by {', '.join(f'{who} {n:,}' for who, n in head['by'].items())}")
    if head["rules"]:
        lines.append(f"  {'rule':20} {'label':>12}  coverage  overlap  conflict  taken as  on labelled rows")
    for rule in head["rules"]:
        judged = f"{rule['accuracy']:.2f} of {rule['judged']:,}" if rule["judged"] else "-"
        lines.append(
            f"  {rule['name'][:20]:20} {rule['label'][:12]:>12}  {rule['coverage']:>8.1%}  {rule['overlap']:>7.1%}"
            f"  {rule['conflict']:>8.1%}  {rule['accuracy_taken']:>8.2f}  {judged:>16}"
        )
    if trial := head["on_rows_with_a_label"]:
        lines.append(
            f"  of {trial['rows']:,} rows with a label the machine would label {trial['labelled']:,}, "
            f"{trial['right']:,} of them right; without a threshold, {trial['right_without_threshold']:,} right"
        )
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _next(planned: Planned, report: dict[str, Any]) -> None:
    if report["tasks"]:
        folder = storage.display(planned.uri)
        print(
            f"for people   {report['tasks']:,} tasks: {folder}/{TASKS}, with {CONFIG} as labelling configuration; then "
            f"python -m jobs.label {shlex.join(sys.argv[1:])} --label.annotations EXPORT.json"
        )
    if report["labelled"]:
        print(f"next         python -m jobs.preprocess --config … {shlex.join(words(planned))}")


def words(planned: Planned) -> list[str]:
    """How jobs.preprocess reads the labelled rows. Other sources of the configuration stay as they are, where rows have one
    label; several heads have no labels of one source alone."""
    data, uri = planned.settings.data, storage.join(planned.uri, ROWS)
    columns = {"text": "text", **{name: name for name in data.slices}}
    source: dict[str, Any] = {"uri": uri, "columns": columns}
    found: list[str] = []
    for place, head in enumerate(planned.heads):
        column = planned.columns(place)[0]
        if head.name:
            columns[head.name] = column
            found += [f"--data.heads.{head.name}.labels", _yaml(head.labels)]
        else:
            columns["label"] = column
            source["labels"] = {label: label for label in head.labels}
    if data.format != "auto":
        source["format"] = "auto"
    if data.templates:  # those that no other source reads would be an error
        read = _read_by_others(planned.settings)
        kept = {name: template for name, template in data.templates.items() if name in read}
        found += ["--data.templates", _yaml(kept)]
    if data.query is not None:
        found += ["--data.query", "null"]
    return ["--data.source", _yaml(source), *found]


def _read_by_others(settings: Settings) -> set[str]:
    """Columns that the sources of given splits read."""
    data = settings.data
    columns = {**load_task(settings.task).columns(data), **data.slices}
    entries = [entry for split, entries in data.sources.items() if split for entry in entries]
    return {
        column
        for entry in entries
        for column in of_source(entry, columns, frozenset(), data).columns.values()
    }


def _yaml(value: Any) -> str:
    """On one line: YAML takes JSON."""
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main(label)
