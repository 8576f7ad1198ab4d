"""From raw rows to a dataset, on Ray Data, in two streaming passes over the source.

    plan    files, columns, checksums → fingerprint; needs no Ray
    scan    read, clean, normalise, map labels, hash         → counts, and 36 bytes a row; 8 more a band
            shuffle the hashes, find the duplicates          → the positions to drop
            find near duplicates (`near_passes`)             → more of them, and rows that change their split
            count keys (`split_passes`)                      → where splits part, by time or label by label
            count labels (`augment.counting`)                → new rows that each is to have
    write   read again, drop, split, augment, tokenise       → Parquet shards
    publish the manifest, and all of it at once

Both passes take personal data out of what they read. Reading, redacting and normalising twice costs 20 µs a row,
tokenising 75: keeping the text between the passes would cost more, in memory or on disk. Only where a model looks for
names, which costs milliseconds, are the blocks kept, without personal data, in the object store. No process ever holds
more than a block of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from lib import heads, storage, tracking
from lib.artifacts import SPLITS
from lib.data import noise, report
from lib.data.alike.near_passes import Source, near_duplicates, straddling
from lib.data.augment.making import making
from lib.data.augment.writing import with_written
from lib.data.clean import REJECTING
from lib.data.labelling import studio
from lib.data.mix import mix
from lib.data.passes import (
    Scanned,
    find_duplicates,
    find_rejected,
    scan,
)
from lib.data.places import Found
from lib.data.plan import SOURCES, Plan
from lib.data.reading import quarantine
from lib.data.recommending import build as recommend
from lib.data.splitting.split import FAR, Cuts
from lib.data.splitting.split_passes import find_cuts
from lib.data.stream import source, tables
from lib.data.write_pass import Writing, Written, write
from lib.errors import DataError
from lib.settings.splitting import Split
from lib.tasks import load_task


def build(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make and publish the dataset on the connected Ray cluster; its manifest. `say` gets progress lines.

    Raises DataError, in one line, for rows that cannot be read or labelled; then nothing is published.
    """
    if plan.parts:
        for part in plan.parts.values():
            if not part.ref.exists():
                build(part, say)
        return mix(plan, say)
    if plan.tables:
        return recommend.build(plan, say)
    with storage.publish_from_workers(plan.ref.uri) as uri:
        say(f"scanning {_source(plan)}")
        read: Callable[[str], Any] = partial(source, plan.reading, plan.texts, plan.rules)
        if plan.rules and plan.rules.names:  # its model reads the rows once, not at each pass
            read = partial(_already, read("redact").materialize())
        scanned, hashes = scan(plan.reading, plan.settings, read("scan"), plan.rules)
        _check_scanned(plan, scanned)
        say(f"scanned {scanned.rows:,} rows")
        found = _found(plan, scanned, read, hashes, say)
        new = making(plan.reading, plan.settings, hashes, scanned.usable, found, say)
        del hashes  # 36 bytes a row and more, in the object store
        say("tokenising and writing")
        packed = with_written(read("write"), plan.reading, plan.settings, found, new, plan.rules)
        written = write(Writing.of(plan, uri, scanned, found, new), packed, scanned.rows, say)
        quarantine.gather(uri)
        _check_written(plan, scanned, written, uri)
        manifest = _manifest(plan, scanned, written, found.cuts)
        if plan.settings.data.label_noise.report:
            manifest["label_noise"] = _label_noise(plan, written, uri, say)
        report.write(uri, manifest)
    return manifest


def _label_noise(plan: Plan, written: Written, uri: str, say: Callable[[str], None]) -> dict[str, Any]:
    """What the manifest says of labels that are probably wrong; leaves tasks for Label Studio, where they are wanted."""
    data = plan.settings.data
    say(f"looking for wrong labels among {len(written.sampled):,} training rows")
    told, tasks = noise.report(written.sampled, data, plan.reading.place)
    if data.label_noise.tasks and tasks:
        folder = storage.join(uri, noise.FOLDER)
        storage.write_json(storage.join(folder, studio.TASKS), tasks)
        config = studio.labelling_config(heads.of_data(data))
        storage.write_bytes(storage.join(folder, studio.CONFIG), config.encode())
    return told


def _already(rows: Any, name: str) -> Any:
    return rows


def _found(
    plan: Plan, scanned: Scanned, read: Callable[[str], Any], hashes: Any, say: Callable[[str], None]
) -> Found:
    """What becomes of which rows."""
    data, reading = plan.settings.data, plan.reading
    rejected = find_rejected(scanned, hashes)
    exact = None if data.duplicates == "keep" else find_duplicates(reading, hashes, plan.settings)
    alike = placed = None
    texts = Source(reading, plan.settings, read, scanned, hashes, rejected)
    if data.near.duplicates == "drop" or data.checks_leakage:
        say("comparing texts")
    if data.near.duplicates == "drop":
        alike = near_duplicates(texts, exact)
    cuts = find_cuts(reading, plan.settings, hashes, exact, alike)
    if data.checks_leakage:
        placed = straddling(texts, exact, alike, cuts=cuts)
    return Found(tables(rejected), tables(exact, alike), tables(placed), cuts)


def _check_scanned(plan: Plan, scanned: Scanned) -> None:
    if scanned.problem:
        raise DataError(scanned.problem)
    share, left_out = plan.settings.data.quarantine.share, scanned.quarantined
    quarantine.check(left_out, plan.reading, scanned.rows, share)
    if not scanned.rows:
        raise DataError(f"the source {_source(plan)} holds no rows")
    if scanned.malformed is not None and not share:
        raise DataError(f"{plan.reading.place(scanned.malformed[0])} {scanned.malformed[1]}")
    unknown = scanned.unknown
    if unknown.first is not None and not share:
        values = ", ".join(repr(v) for v in unknown.values) + (
            ", …" if len(unknown.values) == unknown.SHOWN else ""
        )
        raise DataError(
            f"data.labels: {unknown.rows:,} of {scanned.rows:,} rows hold a label outside the mapping ({values}); "
            f"first: {plan.reading.place(unknown.first)}; add the values to data.labels or correct the source"
        )
    rejected, rows = sum(scanned.rejected.values()), scanned.rows + left_out.unread
    if scanned.empty + scanned.unlabelled + rejected + left_out.rows == rows:
        more = f"; {rejected:,} do not pass data.clean" if rejected else ""
        more += f"; {left_out.rows:,} are in quarantine" if left_out.rows else ""
        raise DataError(
            f"no usable row in {_source(plan)}: of {rows:,}, {scanned.empty:,} have no text "
            f"and {scanned.unlabelled:,} no label{more}"
        )


def _check_written(plan: Plan, scanned: Scanned, written: Written, uri: str) -> None:
    if written.refused is not None:
        raise DataError(f"{plan.reading.place(written.refused[0])} {written.refused[1]}")
    share = plan.settings.data.quarantine.share
    quarantine.check(written.quarantined, plan.reading, written.rows, share)
    before = {why: n for why, n in written.quarantined.reasons.items() if why != quarantine.UNENCODABLE}
    if written.rows != scanned.rows or before != scanned.quarantined.reasons:
        raise DataError(f"the source {_source(plan)} changed while it was read; run again")
    rows = sum(count.rows for count in written.splits.values())
    for split, count in written.splits.items():
        share = plan.settings.data.shares[split]
        if share and not count.rows and (why := _emptied_by_the_check(plan, written, rows)):
            raise DataError(f"the {split} split would be empty: {why}")
        if share and not count.rows:
            raise DataError(f"the {split} split would be empty: {_why_empty(plan, split, rows)}")
        if split in plan.settings.data.sources and not count.rows:
            raise DataError(
                f"the {split} split would be empty: no row of data.{split}_source is left; all are empty or "
                f"duplicates of rows before them"
            )
        # Workers on other machines write to their own disk when the storage root is a plain local path.
        if len([f for f in storage.ls(storage.join(uri, split)) if f in count.shards]) < len(count.shards):
            raise DataError(
                f"{storage.display(uri)} lacks shards that workers wrote; WHORL_STORAGE must be a place "
                f"that all machines of the cluster share"
            )


def _why_empty(plan: Plan, name: str, rows: int) -> str:
    split = plan.settings.data.split
    if split.dates:
        dates = ", ".join(f"{name}_from {begins}" for name, begins in split.dates.items())
        return f"no row of {split.time!r} is of its time ({dates}); give other dates"
    why = f"{rows:,} rows are too few for a share of {plan.settings.data.shares[name]:g}"
    if split.by in ("group", "time"):
        why += f", or too many of them have the same {split.by} ({getattr(split, split.by)!r})"
    return f"{why}; give more rows or another data.split"


def _emptied_by_the_check(plan: Plan, written: Written, rows: int) -> str | None:
    """Why a split that would not be empty without `data.leakage` is."""
    if plan.settings.data.leakage != "check":
        return None
    if written.leaking:
        return (
            f"{written.leaking:,} rows say the same as rows of a split behind their own; give other rows, "
            f"or set data.leakage to report"
        )
    if written.moved:
        return (
            f"{written.moved:,} of {rows:,} rows went where their near duplicates are; give more different rows, "
            f"raise data.near.threshold, or set data.leakage to report"
        )
    return None


def _split(split: Split, cuts: Cuts | None) -> dict[str, Any]:
    """What rows were split by, and where by time."""
    found: dict[str, Any] = {"by": split.by}
    if split.by in ("group", "time"):
        found["column"] = getattr(split, split.by)
    if split.by == "time" and cuts is not None and len(cuts.at):
        for name, at in zip(("validation", "test"), cuts.at[0].tolist(), strict=True):
            if at != FAR:
                found[f"{name}_from"] = datetime.fromtimestamp(at, UTC).isoformat()
    return found


def _source(plan: Plan) -> str:
    files = plan.reading.files
    return files[0].name + (f" and {len(files) - 1} more files" if len(files) > 1 else "")


def _manifest(plan: Plan, scanned: Scanned, written: Written, cuts: Cuts | None) -> dict[str, Any]:
    settings = plan.settings
    classes = load_task(settings.task).classes(settings.data)
    share, left_out = settings.data.quarantine.share, written.quarantined
    return {
        **plan.manifest_head(),
        "heads": {name: head.label_names for name, head in settings.data.heads.items()},
        "slices": list(settings.data.slices),
        **({"knowledge": str(plan.knowledge)} if plan.knowledge else {}),
        "rows_read": scanned.rows + written.quarantined.unread,
        "dropped": {
            "empty": scanned.empty,
            "unlabelled": scanned.unlabelled,
            **({"quarantined": written.quarantined.rows} if share else {}),
            **{reason: scanned.rejected[reason] for reason in REJECTING if scanned.rejected[reason]},
            **{reason: rows for reason, rows in written.dropped.items() if reason != "leaking"},
            "leaking": written.leaking if settings.data.leakage == "check" else 0,
            "undersampled": written.undersampled,
            **({"thinned": written.thinned} if written.thinned else {}),
        },
        **({"repeated": written.repeated} if written.repeated else {}),
        **({"quarantine": quarantine.manifest(left_out, plan.reading, share)} if share else {}),
        **({"redacted": dict(sorted(written.redacted.items()))} if plan.rules else {}),
        "cleaned": {
            "changed": dict(scanned.changed),
            "rejected": {
                name: [
                    {"row": plan.reading.place(position), "measured": measured, "text": text}
                    for position, measured, text in samples
                ]
                for name, samples in scanned.samples.items()
            },
        },
        "examples": {
            name: [{"row": plan.reading.place(position), "text": text} for position, text in rows]
            for name, rows in {**scanned.examples, **written.examples}.items()
        }
        | quarantine.examples(left_out, plan.reading, settings.data.clean.samples),
        **({"augmented": dict(sorted(written.augmented.items()))} if settings.data.augment else {}),
        "leakage": {"mode": settings.data.leakage, "moved": written.moved, "leaking": written.leaking},
        "split": _split(plan.settings.data.split, cuts),
        "splits": {name: count.manifest(classes) for name, count in written.splits.items()},
        "sources": _sources(plan, scanned, written),
        "settings": settings.data.model_dump(mode="json", exclude=SOURCES),
        "versions": tracking.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _sources(plan: Plan, scanned: Scanned, written: Written) -> list[dict[str, Any]]:
    """Of each file: rows that were read, and how many of them are in each split, by its weight."""
    reading, found = plan.reading, []
    given = [entry for entries in plan.settings.data.sources.values() for entry in entries]
    for index, (file, checksum) in enumerate(zip(reading.files, plan.checksums, strict=True)):
        kept = written.kept.get(index, [0] * len(SPLITS))
        told = {
            "uri": file.name,
            "rows": scanned.files.get(index, 0),
            "checksum": checksum,
            "source": file.source,
            "kept": dict(zip(SPLITS, kept, strict=True)),
        }
        if file.columns is not None:
            told["query"] = given[file.source].query
        own = given[file.source].model_dump(include={"weight", "columns", "labels"}, exclude_defaults=True)
        found.append(told | own)
    return found
