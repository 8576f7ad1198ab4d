"""What every pass over a source begins with: its blocks as a Ray dataset, without personal data."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from lib.data import blocks
from lib.data.blocks import Reading
from lib.data.redact import Rules
from lib.data.redact.columns import redact
from lib.progress import data_context

# Ray Data ends a block once it holds this much. Blocks of ours are single rows, most of them larger.
RAY_BLOCK_BYTES = 1 << 20
# Blocks that may wait for each task in the object store.
AHEAD_BLOCKS = 2
SHUFFLE_BYTES = 64 << 20


def source(reading: Reading, texts: frozenset[str], rules: Rules | None, name: str) -> ray.data.Dataset:
    """The packed blocks that a pass begins with: personal data leaves the columns `texts` before anything else sees them.

    So texts are hashed without it, too: an id tells nothing about an address that was in its text, and texts that
    differ in nothing else are duplicates, of which no second one falls into another split.
    """
    return without_personal_data(packed_blocks(reading, name), list(reading.columns), texts, rules)


def without_personal_data(
    packed: ray.data.Dataset, columns: list[str], texts: frozenset[str], rules: Rules | None
) -> ray.data.Dataset:
    """Packed blocks with what was found in `redacted`, counts as JSON; as they are where there are no rules."""
    if rules is None or not texts:
        return packed
    return packed.map_batches(
        redact_block,
        fn_kwargs={"columns": columns, "texts": texts, "rules": rules},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )


def redact_block(row: pa.Table, columns: list[str], texts: frozenset[str], rules: Rules) -> pa.Table:
    """Runs in a task: one block without personal data."""
    block = blocks.from_row(row, columns)
    rows, counts = redact(block.rows, texts, rules)
    return blocks.to_row(replace(block, rows=rows)).append_column("redacted", pa.array([json.dumps(counts)]))


def packed_blocks(reading: Reading, name: str) -> ray.data.Dataset:
    """A dataset of blocks, each packed into one row."""
    fragments = [
        {"fragment": i, "start": start, "end": end} for i, (start, end) in enumerate(reading.fragments())
    ]
    with ray.data.DataContext.current(_context()):
        source = ray.data.from_items(fragments, override_num_blocks=len(fragments))
        source.set_name(name)
        # Asking for another share of a CPU than the next step keeps Ray Data from fusing the two: one
        # reader then feeds many tasks, even when the source is a single file that cannot be cut.
        return source.map_batches(
            read,
            fn_kwargs={"reading": reading},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.5,
            compute=ray.data.TaskPoolStrategy(size=min(parallel_tasks(), len(fragments))),
        )


def _context() -> ray.data.DataContext:
    """Ray Data's settings for both passes."""
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", UserWarning)
    context = data_context()
    context.target_max_block_size = RAY_BLOCK_BYTES
    # Readers are faster than the tokeniser: without a limit they would fill the object store.
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=AHEAD_BLOCKS * blocks.BLOCK_BYTES * parallel_tasks()
    )
    # By default a map task of the shuffle takes 1 GiB of hashes at once.
    context.shuffle_input_batch_bytes = SHUFFLE_BYTES
    return context


def parallel_tasks() -> int:
    """How many tasks may run at a time: a local head has more logical CPUs than cores, and more tasks
    than cores only cost memory and start-up time."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    logical = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
    return max(1, min(logical, os.cpu_count() or 1) if len(nodes) == 1 else logical)


def rows_of(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def read(fragment: pa.Table, reading: Reading) -> Iterator[pa.Table]:
    """Runs in a task: the blocks of one fragment."""
    number, start, end = (fragment[name][0].as_py() for name in ("fragment", "start", "end"))
    for block in blocks.read_blocks(reading, number, (start, end)):
        yield blocks.to_row(block)


def tables(*datasets: ray.data.Dataset | None) -> list[Any]:
    """References to the tables of what was found."""
    return [ref for dataset in datasets if dataset is not None for ref in dataset.to_arrow_refs()]
