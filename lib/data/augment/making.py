"""New rows among those of a block, as the write pass has them. What it takes is found between the passes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from lib.artifacts import SPLITS
from lib.base_models import base_directory
from lib.data.augment.counting import Known, said_already, wanted
from lib.data.augment.rows import BY, FROM, Augmentation, augment
from lib.data.augment.thesaurus import Thesaurus, of_embeddings, read
from lib.data.blocks import Block, Reading
from lib.data.places import Found
from lib.settings import AugmentSettings, Settings

# Column of a packed block: what a model wrote for its rows, as JSON.
WRITTEN = "written"
TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Making:
    """What is sent to the tasks that make new rows."""

    by: Augmentation
    known: Known

    def added(
        self,
        rows: pa.Table,
        split: np.ndarray,
        labels: np.ndarray,
        written: dict[str, dict[str, list[str]]],
        block: Block,
    ) -> tuple[pa.Table, np.ndarray, np.ndarray, Counter[str]]:
        """Rows with new ones for training, their splits int8, which of `rows` each is or was made of, and counts.

        `written` are texts of a model by the ids of rows. Rows that train come in an order of chance: training takes them
        window by window, and a window of new rows alone would be no sample.
        """
        trains = np.flatnonzero(split == TRAIN)
        chosen = rows.take(pa.array(trains))
        texts = [written.get(name, {}) for name in chosen["id"].to_pylist()] if written else None
        new = augment(chosen, labels[trains], self.by, self.known, texts)
        none = pa.nulls(rows.num_rows, pa.string())
        whole = pa.concat_tables([rows.append_column(FROM, none).append_column(BY, none), new.rows])
        of = np.concatenate([np.arange(len(split)), trains[new.sources]])
        chance = np.random.default_rng([self.by.seed % 2**64, block.fragment, block.number])
        train = np.flatnonzero(split[of] == TRAIN)
        order = np.concatenate([np.flatnonzero(split[of] != TRAIN), chance.permutation(train)])
        return whole.take(pa.array(order)), split[of][order], of[order], new.counts


def written_for(row: pa.Table) -> dict[str, dict[str, list[str]]]:
    """Id of a row of a packed block → `METHOD:NUMBER` → its texts in the words of a model."""
    found: dict[str, dict[str, list[str]]] = {}
    if WRITTEN in row.column_names:
        found = json.loads(row[WRITTEN][0].as_py())
    return found


def making(
    reading: Reading,
    settings: Settings,
    hashes: Dataset,
    usable: int,
    found: Found,
    say: Callable[[str], None],
) -> Making | None:
    """What new rows are made by, of what the first pass and the searches found; None without `data.augment`."""
    data = settings.data
    if data.augment is None:
        return None
    by = Augmentation(data.augment, data.split.seed, _thesaurus(data.augment, settings, say))
    return Making(
        replace(by, wanted=wanted(reading, data, hashes, found)), Known(said_already(hashes, usable))
    )


def _thesaurus(given: AugmentSettings, settings: Settings, say: Callable[[str], None]) -> Thesaurus:
    if not given.has_synonyms:
        return Thesaurus()
    if given.thesaurus is not None:
        return read(given.thesaurus)
    say("looking for words of like meaning in the base model's embeddings")
    found: Any = ray.remote(_nearest).remote(settings.model.base, given.least_similarity, given.neighbours)
    thesaurus: Thesaurus = ray.get(found)
    return thesaurus


def _nearest(base: str, least: float, count: int) -> Thesaurus:
    """Runs in a task."""
    return of_embeddings(base_directory(base), least, count)
