"""Rows of several datasets in one: how a part's rows lie in it, and how they are found again."""

from __future__ import annotations

import pyarrow as pa

PART = "part"
"""Column of the dataset: the part that a row is of."""
SHARED = ("id", "input_ids", "length", "truncated")


def stored(part: str, rows: pa.Table) -> pa.Table:
    """Rows of a part's dataset as the mixed dataset holds them: labels under the part's name."""
    kept = [name for name in rows.column_names if name in SHARED]
    table = rows.select(kept).append_column(PART, pa.array([part] * len(rows), pa.string()))
    for name in rows.column_names:
        if name in ("label", "labels", "tags") or name.startswith("label:"):
            table = table.append_column(f"{part}/{name}", rows[name])
    return table


def own(part: str, rows: pa.Table) -> pa.Table:
    """Rows of one part as its own task knows them: `stored` undone."""
    prefix = f"{part}/"
    names = [name for name in rows.column_names if name in SHARED or name.startswith(prefix)]
    return rows.select(names).rename_columns([name.removeprefix(prefix) for name in names])
