"""What a dataset is, as a page to look at: what became of the rows, how long they are, what they are labelled, and some of them.

report.html    beside manifest.json: everything in it comes from there and from the first rows of the shards
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import SPLITS
from lib.pages import BLUE, GREY, LIGHT, RED, embedded, figure, plain, png, render

TEMPLATE = Path(__file__).with_name("report.html.j2")
FILE = "report.html"
# Rows of each split that are shown, and characters of each value.
SHOWN, SHOWN_CHARACTERS = 5, 400
# Labels beyond so many are not drawn: their bars could not be told apart.
MOST_LABELS = 40
COLOURS = {"train": BLUE, "validation": LIGHT, "test": GREY}


def write(uri: str, manifest: dict[str, Any]) -> None:
    """Put `manifest.json` and `report.html` into a dataset whose shards lie under `uri`."""
    storage.write_json(storage.join(uri, "manifest.json"), manifest)
    # As a reader has it: JSON knows no integer keys.
    page = render_page(json.loads(json.dumps(manifest)), examples(uri, manifest))
    storage.write_bytes(storage.join(uri, FILE), page.encode())


def render_page(manifest: dict[str, Any], rows: dict[str, list[dict[str, str]]]) -> str:
    """The page of a manifest; `rows` are the `examples` of its splits."""
    drawn = {
        "what became of the rows": _flow(manifest),
        "lengths": _lengths(manifest),
        "labels": _labels(manifest),
    }
    redacted = dict(manifest.get("redacted", {}))
    return render(
        TEMPLATE,
        manifest=manifest,
        splits={name: manifest["splits"][name] for name in SPLITS},
        kept=sum(manifest["splits"][name]["rows"] for name in SPLITS),
        redacted_rows=redacted.pop("rows", 0),
        redacted=redacted,
        dropped={reason: rows for reason, rows in manifest["dropped"].items() if rows},
        left_out=_left_out(manifest),
        moved=manifest.get("examples", {}).get("moved", []),
        figures={name: embedded(image) for name, image in drawn.items() if image},
        rows=rows,
        settings=json.dumps(manifest["settings"], indent=2, ensure_ascii=False),
    )


def _left_out(manifest: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Why → the rows of which there are examples: `row`, `text` and, of filters, what was `measured`."""
    rows: dict[str, list[dict[str, str]]] = {
        **manifest.get("examples", {}),
        **manifest.get("cleaned", {}).get("rejected", {}),
    }
    return {why: some for why, some in rows.items() if why != "moved"}


def examples(uri: str, manifest: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Split → its first rows: column → value, as a text. Features that only a model reads are left out."""
    return {
        split: [
            {name: value for name, value in zip(table.column_names, values, strict=True) if value}
            for values in zip(*(_texts(table, name, manifest) for name in table.column_names), strict=True)
        ]
        for split in SPLITS
        for table in (_first_rows(uri, split, manifest["splits"][split]["shards"]),)
    }


def _first_rows(uri: str, split: str, shards: list[str]) -> pa.Table:
    if not shards:
        return pa.table({})
    with storage.open_file(storage.join(uri, split, shards[0])) as file:
        parquet = pq.ParquetFile(file)
        shown = [field.name for field in parquet.schema_arrow if _is_shown(field)]
        for batch in parquet.iter_batches(SHOWN, columns=shown):
            return pa.Table.from_batches([batch])
    return pa.table({})


def _is_shown(field: pa.Field) -> bool:
    of = field.type.value_type if pa.types.is_list(field.type) else field.type
    is_said: bool = pa.types.is_string(of) or pa.types.is_struct(of)
    return field.name != "id" and (is_said or field.name.partition(":")[0] == "label")


def _texts(table: pa.Table, name: str, manifest: dict[str, Any]) -> list[str]:
    return [_text(name, value, manifest) for value in table[name].to_pylist()]


def _text(name: str, value: Any, manifest: dict[str, Any]) -> str:
    if name.startswith("label") and isinstance(value, int):
        names = manifest.get("heads", {}).get(name.partition(":")[2], manifest["labels"])
        return names[value] if 0 <= value < len(names) else ""
    if isinstance(value, list):
        value = "\n".join(f"{one['role']}: {one['content']}" for one in value) if _is_said(value) else value
        value = " ".join(map(str, value)) if isinstance(value, list) else value
    text = "" if value is None else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _is_said(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict) and {"role", "content"} <= set(value[0])


def _flow(manifest: dict[str, Any]) -> bytes:
    """Rows that went into each split and that were left out, by reason."""
    bars = [(name, manifest["splits"][name]["rows"], COLOURS[name]) for name in SPLITS]
    bars += [(f"left out: {why.replace('_', ' ')}", n, RED) for why, n in manifest["dropped"].items() if n]
    drawn = figure(7.5, 1.2 + 0.36 * len(bars))
    axes = drawn.add_subplot()
    axes.barh(range(len(bars)), [rows for _, rows, _ in bars], 0.7, color=[colour for *_, colour in bars])
    most = max([1, *(rows for _, rows, _ in bars)])
    for place, (_, rows, _) in enumerate(bars):
        axes.text(rows + most * 0.01, place, f"{rows:,}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="rows", xlim=(0, most * 1.14), title=f"{manifest['rows_read']:,} rows were read")
    plain(axes)
    return png(drawn)


def _lengths(manifest: dict[str, Any]) -> bytes | None:
    """Of each split, the share of its rows by length, on a logarithmic axis."""
    lines = [(name, _density(manifest["splits"][name].get("lengths", {}))) for name in SPLITS]
    if not any(len(ends) for _, (ends, _) in lines):
        return None
    drawn = figure(7.5, 3.6)
    axes = drawn.add_subplot()
    for name, (ends, shares) in lines:
        if len(ends):
            axes.stairs(shares, ends, color=COLOURS[name], linewidth=1.8, label=name, fill=name == "train")
    unit = "interactions" if manifest["task"] == "recommend" else "tokens"
    if unit == "tokens":
        axes.axvline(manifest["max_length"], color=RED, linestyle="--", linewidth=1, label="model.max_length")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=f"{unit} in a row", ylabel="share of the split's rows", title="lengths")
    axes.legend(frameon=False)
    plain(axes)
    return png(drawn)


def _density(lengths: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ends [n + 1] of the classes between the shortest and the longest, and the share [n] of the rows in each."""
    from lib.data.shards import LENGTH_ENDS

    if not lengths:
        return np.zeros(0), np.zeros(0)
    counts = {int(end): rows for end, rows in lengths.items()}
    first, last = (int(np.searchsorted(LENGTH_ENDS, end(counts))) for end in (min, max))
    ends = LENGTH_ENDS[first : last + 2]
    rows = np.array([counts.get(int(end), 0) for end in ends[:-1]], float)
    return ends.astype(float), rows / rows.sum()


def _labels(manifest: dict[str, Any]) -> bytes | None:
    """Share of each label in each split."""
    names = list(manifest["labels"])
    if not names or len(names) > MOST_LABELS:
        return None
    drawn = figure(7.5, 1.4 + 0.5 * len(names))
    axes = drawn.add_subplot()
    for place, (split, values) in enumerate(_shares(manifest, names)):
        axes.barh(np.arange(len(names)) + 0.27 * (place - 1), values, 0.25, color=COLOURS[split], label=split)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set(xlabel="share of what is labelled in the split", title="labels")
    axes.legend(frameon=False)
    plain(axes)
    return png(drawn)


def _shares(manifest: dict[str, Any], names: list[str]) -> Iterator[tuple[str, list[float]]]:
    for split in SPLITS:
        counts = manifest["splits"][split]["labels"]
        total = max(sum(counts.values()), 1)
        yield split, [counts.get(name, 0) / total for name in names]
