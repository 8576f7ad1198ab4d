"""What is asked of a block's rows, and the shard that their answers make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.data import blocks
from lib.data.blocks import Block
from lib.data.scoring.plan import KEPT, Planned
from lib.errors import ConfigError
from lib.tasks import Asked, load_task

BAD_SHOWN = 20


def shard_name(block: Block) -> str:
    return f"part-{block.fragment:05d}-{block.number:05d}.parquet"


def asked_of(planned: Planned, rows: pa.Table) -> Asked:
    """What is asked of a block's rows."""
    inputs = {name: blocks.flat(rows[name]) for name in planned.reading.columns if name in planned.texts}
    return load_task(planned.task).ask(inputs, planned.settings.data)


def kept_of(planned: Planned, rows: pa.Table) -> dict[str, pa.Array]:
    """The columns of a block that are carried into its shard."""
    return {name: blocks.flat(rows[KEPT + name]) for name in planned.settings.score.keep}


def write_shard(
    planned: Planned,
    uri: str,
    shard: str,
    positions: np.ndarray,
    kept: dict[str, pa.Array],
    asked: pa.Table,
    answers: pa.Table,
    bad: dict[int, str],
) -> dict[str, Any]:
    """Write a block's rows and answers, all of one length; what they come to, for `Total`."""
    if taken := kept.keys() & {*asked.column_names, *answers.column_names}:
        raise ConfigError(
            f"score.keep: {sorted(taken)[0]!r} is the name of a column of the scores; choose another"
        )
    files, numbers = positions >> blocks.ROW_BITS, positions & ((1 << blocks.ROW_BITS) - 1)
    table = pa.table(
        {"file": pa.array([planned.reading.files[i].name for i in files], pa.string())}
        | {"row": pa.array(numbers + 1, pa.int64()), **kept}
        | {name: asked[name] for name in asked.column_names}
        | {name: answers[name] for name in answers.column_names}
        | {"problem": pa.array([bad.get(i) for i in range(len(positions))], pa.string())}
    )
    with storage.open_file(storage.join(uri, shard), "wb") as file:
        pq.write_table(table, file, compression="zstd")
    found, file_rows = np.unique(files, return_counts=True)
    good = pa.array([i for i in range(len(positions)) if i not in bad], pa.int64())
    return {
        "shard": shard,
        "rows": len(positions),
        "bad_rows": len(bad),
        "bad": [(int(positions[i]), bad[i]) for i in sorted(bad)[:BAD_SHOWN]],
        "files": dict(zip(found.tolist(), file_rows.tolist(), strict=True)),
        "tallies": load_task(planned.task).tally(answers.take(good)),
    }
