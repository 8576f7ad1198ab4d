"""How much of what is computed is padding, and whether the examples of a pack see one another.

    make bench-packing

On the tech-support pairs, as SmolLM2 reads them, at a context of 1,024 tokens: the share of pad tokens of our
packs; of one example a row, in random batches and in batches of like lengths; and of packs that take the examples
as they come. Then a few of the examples go through SmolLM2 in fp32, packed and one by one, by our attention and by
transformers' block mask: their losses must agree to 1e-4. The same with a pack whose examples may see one another
shows that the comparison would notice.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tests.bench.report import Report

SOURCE, BASE, CONTEXT = "sample://tech-support", "sample://smollm2-135m-instruct", 1024
# Rows of a batch, where each example is a row.
BATCH = 16
TARGET = 0.03
AGREE = 1e-4


def rows(source: str, base: str) -> pa.Table:
    """The source's dialogues, encoded."""
    from lib.data.reading import readers, sources
    from lib.settings import DataSettings, ModelSettings
    from lib.tasks import chat

    data = DataSettings(source=source)
    tables = []
    for file in sources.find_files([source]):
        columns = chat.columns(data, readers.column_names(file))
        for table in readers.read_tables(file, list(columns.values()), 4096, set(columns.values())):
            arrays = [column.combine_chunks() for column in table.columns]
            prepared = chat.prepare(dict(zip(columns, arrays, strict=True)), data)
            tables.append(prepared.rows.filter(pa.array(prepared.labels >= 0)))
    return chat.encode(pa.concat_tables(tables), ModelSettings(base=base, max_length=CONTEXT))


def padding(lengths: NDArray[np.int32], groups: list[NDArray[np.int64]]) -> float:
    """The share of pad tokens when each group is a batch, padded to its longest row."""
    padded = sum(len(group) * int(lengths[group].max()) for group in groups)
    return 1 - float(lengths.sum()) / padded


def in_packs(lengths: NDArray[np.int32], packs: list[NDArray[np.int64]]) -> float:
    """The share of pad tokens when each pack is padded to the context."""
    return 1 - float(lengths.sum()) / (len(packs) * CONTEXT)


def as_they_come(lengths: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Whole rows in their order, a new pack whenever the next does not fit."""
    packs: list[list[int]] = [[]]
    filled = 0
    for row, length in enumerate(lengths.tolist()):
        if filled + length > CONTEXT:
            packs.append([])
            filled = 0
        packs[-1].append(row)
        filled += length
    return [np.array(pack, np.int64) for pack in packs if pack]


def losses(base: str, table: pa.Table) -> dict[str, NDArray[np.float64]]:
    """Sum of the losses of each row in fp32: one by one, packed in two ways, and with the boundaries left out."""
    import torch

    from lib import causal
    from lib.base_models import base_directory
    from lib.settings import Settings
    from lib.tasks import chat
    from lib.training import packing

    settings = Settings.model_validate(
        {
            "name": "packing",
            "task": "chat",
            "data": {"source": SOURCE},
            "model": {"base": base, "max_length": CONTEXT},
        }
    )
    model = chat.build(base_directory(base), settings).eval()

    def by_row(batch: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        with torch.no_grad():
            found, row = causal.token_losses(model, batch)
        return np.bincount(row.numpy(), found.double().numpy(), minlength=table.num_rows)

    lengths = table["length"].to_numpy()
    numbers = np.empty(len(lengths), np.int32)
    for number, members in enumerate(packing.pack(lengths, CONTEXT)):
        numbers[members] = number
    packed = causal.collate(table.append_column("pack", pa.array(numbers)), 0)
    alone = [by_row(causal.collate(table.slice(i, 1), 0))[0] for i in range(table.num_rows)]
    found = {"one by one": np.array(alone), "packed": by_row(packed)}
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    found["packed, block mask"] = by_row(packed)
    packed["position_ids"] = torch.arange(packed["input_ids"].shape[1]).expand_as(packed["input_ids"])
    found["packed, boundaries left out"] = by_row(packed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--compared", type=int, default=40, help="examples whose losses are compared")
    arguments = parser.parse_args()
    from lib.training import packing

    table = rows(arguments.source, arguments.base)
    lengths = table["length"].to_numpy()
    report = Report("packing")
    tokens, random = int(lengths.sum()), np.random.default_rng(0)
    packs = packing.pack(lengths, CONTEXT)
    report.row("examples", len(lengths), unit="rows")
    report.row("tokens of an example, mean", tokens / len(lengths), unit="tokens")
    report.row(
        "pad tokens, packed", in_packs(lengths, packs), unit="share", target=TARGET, higher_is_better=False
    )
    best_fit = packing.best_fit(lengths, CONTEXT)
    report.row("pad tokens, best-fit decreasing alone", in_packs(lengths, best_fit), unit="share")
    report.row("pad tokens, packed as they come", in_packs(lengths, as_they_come(lengths)), unit="share")
    shuffled = np.array_split(random.permutation(len(lengths)), -(-len(lengths) // BATCH))
    report.row(f"pad tokens, {BATCH} random rows a batch", padding(lengths, shuffled), unit="share")
    alike = np.array_split(np.argsort(lengths, kind="stable"), -(-len(lengths) // BATCH))
    report.row(f"pad tokens, {BATCH} rows of like lengths", padding(lengths, alike), unit="share")
    each = [np.array([i]) for i in range(len(lengths))]
    report.row("pad tokens, each row padded to the context", in_packs(lengths, each), unit="share")
    report.row("packs", len(packs), unit="packs")
    # Examples of all lengths, so that packs hold several and groups of the attention are uneven.
    chosen = np.argsort(lengths, kind="stable")[:: max(1, len(lengths) // arguments.compared)]
    found = losses(arguments.base, table.take(pa.array(chosen)))
    single = found.pop("one by one")
    report.row("loss of an example, mean", float(single.mean()), unit="nats")
    for name, values in found.items():
        apart = float(np.abs(values - single).max())
        target = None if "left out" in name else AGREE
        report.row(f"largest difference, {name}", apart, unit="nats", target=target, higher_is_better=False)
    report.finish()


if __name__ == "__main__":
    main()
