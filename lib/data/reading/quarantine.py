"""Rows and files of a source that cannot be used, set aside with the reason: up to a share the job goes on without them.

DATASET/quarantine.jsonl    file, row, reason, why, text: how the row begins, without personal data

Which they are, a pass over a block tells by the block alone, so that both passes agree; a row that is set aside changes
the number of no other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.data.reading.rows import ROW_BITS, beginning
from lib.errors import DataError
from lib.labels import UNKNOWN
from lib.settings import Settings
from lib.tasks import load_task

if TYPE_CHECKING:
    from lib.data.blocks import Block, Reading
    from lib.data.ready import Ready
    from lib.data.redact import Rules

# Reason → what such rows are, for messages.
REASONS = {
    "not_json": "are no JSON objects",
    "not_utf8": "are not UTF-8",
    "wrong_columns": "have another number of columns",
    "wrong_value": "hold a value of another kind",
    "malformed": "have another form",
    "unknown_label": "hold a label outside the mapping",
    "unencodable": "cannot be encoded",
    "damaged": "files are damaged",
}
DAMAGED, UNENCODABLE = "damaged", "unencodable"
FILE = "quarantine.jsonl"
# Where tasks put what each block leaves out, until it is one file.
PARTS = "quarantine"
# Characters that are shown of a row, and of what is wrong with it.
SHOWN_TEXT, SHOWN_WHY = 120, 300
# Of the first rows, so many are told where there are too many.
TOLD = 3


@dataclass(frozen=True)
class Entry:
    """A row, or what a file has behind its last one."""

    position: int
    reason: str
    why: str
    text: str
    rows: int = 1
    """For how many it stands."""


@dataclass
class Quarantined:
    """What a pass has set aside."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Reason → rows, and damaged files."""
    unread: int = 0
    """Rows that are in no block, since they could not be read."""
    damaged: set[int] = field(default_factory=set)
    """Indices of files."""
    first: list[Entry] = field(default_factory=list)
    """In source order."""

    @property
    def rows(self) -> int:
        return sum(self.reasons.values()) - self.reasons[DAMAGED]

    @classmethod
    def among(cls, entries: Sequence[Entry], unread: Sequence[Entry]) -> Quarantined:
        """Of a block, whose `unread` are among its `entries`."""
        found = cls(unread=sum(entry.rows for entry in unread if entry.reason != DAMAGED))
        for entry in entries:
            found.reasons[entry.reason] += entry.rows
            if entry.reason == DAMAGED:
                found.damaged.add(entry.position >> ROW_BITS)
        found.first = list(entries[:TOLD])
        return found

    def add(self, more: Quarantined) -> None:
        """Those of a block, of any place in the source."""
        self.reasons.update(more.reasons)
        self.unread += more.unread
        self.damaged |= more.damaged
        self.first = sorted([*self.first, *more.first], key=lambda entry: entry.position)[:TOLD]

    def to_json(self) -> dict[str, Any]:
        first = [asdict(entry) for entry in self.first]
        return {
            "reasons": dict(self.reasons),
            "unread": self.unread,
            "damaged": sorted(self.damaged),
            "first": first,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Quarantined:
        first = [Entry(**entry) for entry in values["first"]]
        return cls(Counter(values["reasons"]), values["unread"], set(values["damaged"]), first)


def of_block(block: Block, ready: Ready, texts: Collection[str], rules: Rules | None) -> list[Entry]:
    """What is left out of a block before anything is compared, in source order and without personal data; `texts` are the
    columns that say something."""
    positions = block.rows["position"].to_numpy()
    prepared = ready.prepared
    found = list(block.bad)
    unknown = (prepared.labels == UNKNOWN) & ~prepared.empty & ~ready.rejected
    unknown[list(prepared.malformed)] = False
    wrong = {int(row): ("malformed", why) for row, why in prepared.malformed.items()}
    for row in np.flatnonzero(unknown).tolist():
        value = prepared.values[row].as_py()
        wrong[row] = ("unknown_label", f"holds the label {value!r}, which is not in data.labels")
    for row in sorted(wrong):
        found.append(Entry(int(positions[row]), *wrong[row], said(block.rows, row, texts)))
    return without_personal_data(sorted(found, key=lambda entry: entry.position), rules)


def said(rows: pa.Table, row: int, texts: Collection[str]) -> str:
    """How a row begins: its first column that says something."""
    names = sorted(set(rows.column_names) - {"position"}, key=lambda name: name not in texts)
    return next((text for name in names if (text := beginning(str(rows[name][row].as_py() or "")))), "")


def without_personal_data(entries: list[Entry], rules: Rules | None) -> list[Entry]:
    """As they are where there are no rules; cut to what is shown only then, since half an address is none."""
    if entries and rules is not None:
        from lib.data.redact.columns import redact

        table = pa.table(
            {name: pa.array([getattr(e, name) for e in entries], pa.string()) for name in ("why", "text")}
        )
        table, _ = redact(table, {"why", "text"}, rules)
        pairs = zip(entries, table["why"].to_pylist(), table["text"].to_pylist(), strict=True)
        entries = [replace(entry, why=why, text=text) for entry, why, text in pairs]
    return [replace(entry, why=entry.why[:SHOWN_WHY], text=entry.text[:SHOWN_TEXT]) for entry in entries]


def write(entries: Sequence[Entry], reading: Reading, block: Block, uri: str) -> None:
    """Runs in a task: what a block leaves out, where `gather` finds it."""
    if not entries:
        return
    lines = []
    for entry in entries:
        file, row = reading.placed(entry.position)
        told = {"reason": entry.reason, "why": entry.why, "text": entry.text}
        lines.append(json.dumps({"file": file.name, "row": row + 1, **told}, ensure_ascii=False) + "\n")
    name = f"{block.fragment:06d}-{block.number:06d}.jsonl"
    storage.write_bytes(storage.join(uri, PARTS, name), "".join(lines).encode())


def gather(uri: str) -> None:
    """One file of those of the blocks, in source order."""
    folder = storage.join(uri, PARTS)
    if parts := storage.ls(folder):
        with storage.open_file(storage.join(uri, FILE), "wb") as file:
            for name in parts:
                file.write(storage.read_bytes(storage.join(folder, name)))
        storage.remove(folder)


def check(found: Quarantined, reading: Reading, rows: int, share: float) -> None:
    """Raises DataError where more than `share` of the rows, or damaged files with more than that share of the bytes, are set
    aside; `rows` are those that could be read."""
    if not found.first:
        return
    of = rows + found.unread
    lost, size = (
        sum(max(1, reading.files[i].size) for i in which)
        for which in (found.damaged, range(len(reading.files)))
    )
    if found.rows <= share * of and lost <= share * size:
        return
    told = [f"{found.rows:,} of {of:,} rows ({found.rows / max(of, 1):.2%})"] if found.rows else []
    if found.damaged:
        told.append(f"damaged files with {lost / size:.2%} of the bytes")
    reasons = ", ".join(f"{n:,} {REASONS[why]}" for why, n in found.reasons.most_common())
    first = "; ".join(f"{reading.place(entry.position)} {entry.why}" for entry in found.first)
    raise DataError(
        f"data.quarantine: {' and '.join(told)} cannot be used, more than the share of {share:g}: {reasons}; first: {first}; "
        f"correct the source or raise data.quarantine.share"
    )


def manifest(found: Quarantined, reading: Reading, share: float) -> dict[str, Any]:
    """For the manifest: rows and files by reason."""
    return {
        "share": share,
        "rows": found.rows,
        "reasons": {reason: found.reasons[reason] for reason in REASONS if found.reasons[reason]},
        "damaged": [reading.files[index].name for index in sorted(found.damaged)],
    }


def examples(found: Quarantined, reading: Reading, most: int) -> dict[str, list[dict[str, str]]]:
    """The first of them, as the manifest has rows that are left out."""
    rows = [
        {"row": reading.place(entry.position), "measured": entry.why, "text": entry.text}
        for entry in found.first[:most]
    ]
    return {"quarantined": rows} if rows else {}


def set_aside(block: Block, ready: Ready, settings: Settings, rules: Rules | None) -> list[Entry]:
    """What both passes leave out of a block; nothing, where the first of them ends the job."""
    if not settings.data.quarantine.share:
        return []
    return of_block(block, ready, load_task(settings.task).TEXTS, rules)
